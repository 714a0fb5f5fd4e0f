"""`areal-like profile` on a real job of two ranks with keys, and its messages for mistakes."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path

import pytest

from areal_like.paths import write_json
from launch.cli import main
from tests.support.keys import make_keys
from tests.support.launching import TEST_LIMIT_S, areal_like, finish, launcher, wait_for_steps

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)
SMALL = (
    "name=x",
    "model.warm_start_steps=5",
    "sampling.group_size=2",
    "trainer.entropy_coef=1e-6",  # so that groups without any advantage are run, too
    "trainer.groups_per_step=4",
    "trainer.num_steps=5000",
    "trainer.world_size=2",
    "rollout.max_running=16",
    "eval.num_prompts=0",
)
STEP_PARTS = {"wait", "compute", "reduce", "update", "forward", "head", "objective", "backward", "optimizer"}


@pytest.mark.chaos
def test_two_ranks_of_a_running_job_record_the_same_steps(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    root, out = tmp_path / "runs" / "x", tmp_path / "out"
    with launcher(*SMALL, f"security.keys={tmp_path / 'keys'}", cwd=tmp_path) as process:
        wait_for_steps(1, root, process=process)
        for mistake, message in (
            (("--rank", "2"), "there is no rank 2 (ranks: 0 to 1)"),
            (("--steps", "51"), "steps must be 1 to 50"),
        ):
            refused = areal_like("profile", "x", *mistake, cwd=tmp_path)
            assert (refused.returncode, refused.stdout) == (2, "") and message in refused.stderr, refused
            assert len(refused.stderr.splitlines()) == 1
        shown = areal_like("profile", "x", "--steps", "2", "--rank", "all", "--out", str(out), cwd=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, ""), shown
        steps = {
            rank: sorted(int(file.name.split("step")[1][:-8]) for file in out.glob(f"trace-rank{rank}-*"))
            for rank in (0, 1)
        }
        assert steps[0] == steps[1] == [steps[0][0], steps[0][0] + 1]
        for trace in out.glob("trace-*"):
            assert f"  {trace}" in shown.stdout
            assert (root / "profiles" / trace.name).read_bytes() == trace.read_bytes()
            events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
            names = {event.get("name", "").removeprefix("areal: ") for event in events}
            assert names >= STEP_PARTS | {"snapshot", "aten::mm"}, names
        assert "rank 0     rank 1" in shown.stdout and "aten::mm" in shown.stdout
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process, root)
    assert (code, err) == (0, "")
    assert main(["profile", str(root)]) == 2, "the job is over"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "there is no run 'nope'"),
        (["RUN"], "no trainer of"),
        (["RUN", "--steps", "0"], "use at least 1"),
        (["RUN", "--steps", "many"], "invalid int value"),
        (["RUN", "--timeout", "nan"], "--timeout nan"),
        (["RUN", "--out", "/proc/x"], "--out /proc/x"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert main(["profile", *(word.replace("RUN", str(tmp_path)) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_a_trainer_that_is_gone_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    write_json(tmp_path / "endpoints" / "trainer-0.json", {"role": "trainer", "http": "127.0.0.1:9"})
    assert main(["profile", str(tmp_path)]) == 2
    assert "rank 0 at 127.0.0.1:9 does not respond" in capsys.readouterr().err
