"""A dry run says what a resume would change and whether its checkpoint accepts it; it writes nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from areal_like.runtime.command_line import load_config
from launch.cli import main
from launch.run_directory.open_run import open_run


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the run `x` with 23 steps, of which a checkpoint contains 20."""
    monkeypatch.chdir(tmp_path)
    run = open_run(["name=x", "trainer.num_steps=40", "trainer.lr=1e-5"])
    run.close()
    rows = run.paths.checkpoints / "step_000020" / "rows"
    rows.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    tensors = struct.pack("<Q", len(header)) + header + bytes(8)
    for path in (rows / "policy.safetensors", rows.parent / "model.safetensors"):
        path.write_bytes(tensors)
    model = {"files": ["policy.safetensors"], "masters": ["model.safetensors"]}
    (rows / "index.json").write_text(json.dumps({"models": {"policy": model}}))
    state = {"format": 2, "step": 20, "extra": {"stream": {"stream": {"cursor": 1}}}}
    (rows.parent / "trainer_state.json").write_text(json.dumps(state))
    run.paths.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(23)) + '{"st')
    return run.paths.root


def dry(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """The output of a dry run, or its error."""
    code = main(["run", "name=x", *settings, "--dry-run"])
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), err
    return str(out if code == 0 else err)


def test_a_dry_resume_says_what_would_change(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(root)
    out = dry(capsys, "resume=latest", "trainer.lr=3e-5", "trainer.groups_per_step=8")
    assert out.startswith(f"resume of step 20 from {root}, its newest checkpoint\n")
    assert "trainer.lr: 1e-05 -> 3e-05\n" in out and "trainer.groups_per_step: 16 -> 8\n" in out
    assert "the checkpoint of step 20 accepts these settings\n" in out
    assert "with another trainer.groups_per_step, groups that are recorded from step 20 on" in out
    assert "steps 20 to 22 are undone and trained again\n" in out
    assert out.endswith("dry run: nothing was written or started\n")
    assert "no setting changes" in dry(capsys, "resume=auto")
    assert contents(root) == before
    assert load_config(["--config", str(root / "config.yaml")]).trainer.lr == 1e-5


@pytest.mark.long
def test_a_dry_resume_refuses_what_a_resume_would(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot change" in dry(capsys, "resume=latest", "model.path=owner/other")
    assert "raise it, or resume at an earlier step" in dry(capsys, "resume=latest", "trainer.num_steps=10")
    checkpoint = root / "checkpoints" / "step_000020"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for changed, message in (
        ({"format": 9}, "has format 9"),
        ({"extra": {}}, "is a checkpoint of supervised training"),
        ({"extra": {"stream": {"stream": {"num_shards": 2}}}}, "was made with buffer.num_shards=2"),
    ):
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | changed))
        assert message in dry(capsys, "resume=latest")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    whole = (checkpoint / "rows" / "policy.safetensors").read_bytes()
    for left in (whole[:-1], whole[:12], b"", None):
        (checkpoint / "rows" / "policy.safetensors").unlink()
        if left is not None:
            (checkpoint / "rows" / "policy.safetensors").write_bytes(left)
        assert "policy.safetensors cannot be read" in dry(capsys, "resume=latest")
        (checkpoint / "rows" / "policy.safetensors").touch()


def test_a_dry_run_looks_at_the_place_of_its_directory(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a name, it looked for a free one forever: no directory can be made below a file."""
    file = root / "config.yaml"
    file.chmod(0o755)  # an executable file is no directory either
    assert main(["run", f"runs_dir={file}", "--dry-run"]) == 2
    error = f"cannot create the run directory {file}/default: {file} is no directory"
    assert error in capsys.readouterr().err


def test_a_dry_new_run_makes_no_directory(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(capsys, "name=y").startswith(f"new run in {root.parent / 'y'}\n")
    assert "already holds an unfinished run" in dry(capsys)
    assert [path.name for path in root.parent.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective={name: ppo, clip: 0.2}", "unknown key `objective.clip` of Ppo"),
        ("trackers=[wanb]", "trackers.name=wanb: choose one of"),
        ("task={name: data, train: missing.jsonl, reward: exact}", "missing.jsonl"),
        ("task={name: data, train: rows.jsonl, reward: exat}", "task.reward=exat: choose one of"),
    ],
)
def test_a_dry_run_makes_the_parts_of_the_job(
    root: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    (root.parents[1] / "rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    code = main(["run", "name=y", setting, "--dry-run"])
    assert code == 2 and message in capsys.readouterr().err
