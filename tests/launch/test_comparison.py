"""`areal-like replay RUN --against OTHER`: equal runs, and the first step and the first thing that differ.

tests/jobs/test_resumption.py compares a real job whose trainer was killed with its replay.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray

from areal_like.runtime.command_line import load_config
from areal_like.wire.records import segment_path
from launch.cli import main
from launch.comparison.rows import compare_rows
from launch.comparison.runs import compare_runs
from launch.comparison.settings import compare_settings
from launch.comparison.weights import compare_weights
from tests.support.launching import TEST_LIMIT_S, areal_like
from tests.support.recorded_run import NUM_STEPS, change_sample, record_run, replay_run, write_at
from trainer.distributed.ranks import Ranks
from trainer.replay.recording import Recording
from trainer.replay.trace import trace_step

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a recorded run; the tests change copies of it."""
    return record_run(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def replayed(recorded: Path) -> Path:
    """A replay of it."""
    return replay_run(recorded, "once")


@pytest.fixture
def copy(recorded: Path) -> Path:
    """A copy of the recorded run beside it."""
    root = recorded.parent / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(recorded, root)
    return root


def test_two_replays_are_equal_to_the_last_bit(
    recorded: Path, replayed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = replay_run(recorded, "twice")
    assert main(["replay", str(replayed), "--against", str(twice), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["equal"], result["tolerance"], result["step"]) == (True, 0, None)
    assert (result["first_step"], result["last_step"]) == (0, NUM_STEPS - 1)
    for kind in ("tokens", "behavior log-probs", "parameters", "moments"):
        assert result["compared"][kind] == NUM_STEPS, kind
    assert result["compared_means"]["loss"] == result["compared_means"]["gradient norm"] == NUM_STEPS
    rows = [json.loads(line) for line in (replayed / "metrics.jsonl").read_text().splitlines()]
    assert min(row["grad_norm"] for row in rows) > 0, "without gradients everything is equal anyway"


def test_a_changed_sample_is_named_with_its_step(
    copy: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = change_sample(copy, step=1, position=2, sample_index=3, token=20)
    assert main(["replay", str(recorded), "--against", str(copy), "--records-only"]) == 1
    out = capsys.readouterr().out
    assert "first difference: step 1, tokens" in out
    assert "tokens: group 2, sample 3, token 20: " in out and f" / {new}\n" in out
    assert "log-probs: group" not in out, "they are as they were"


@pytest.mark.chaos
def test_the_step_that_differs_is_trained_again(
    copy: Path, replayed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_sample(copy, step=1, position=2, sample_index=3, token=20)
    other = replay_run(copy, "of-copy")
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows[1]["loss"] += 0.5  # as a machine that computes wrongly
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["replay", str(replayed), "--against", str(other), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    kinds = [one["kind"] for one in result["differences"]]
    assert (result["step"], kinds[0]) == (1, "tokens")
    assert {"loss", "gradient norm", "parameters"} <= set(kinds)
    assert result["compared"]["parameters"] == 2, "step 0 was equal"
    again = result["replayed"]
    assert again["equal"] == ["advantages", "weights of the loss"]
    assert again["differences"][0]["kind"] == "policy's log-probs"
    assert again["differences"][0]["text"].startswith("group 2, sequence ")
    assert again["rows"][0].endswith("the loss and gradient norm in its row match its records")
    assert f"{other}: its row does NOT match its records: loss {rows[1]['loss']} in" in again["rows"][1]


def test_a_trace_begins_at_a_checkpoint_or_at_step_0(replayed: Path, tmp_path: Path) -> None:
    traced = [trace_run(replayed, tmp_path / "a")]
    without = replayed.parent / "without"
    shutil.copytree(replayed, without, ignore=shutil.ignore_patterns("step_000001", "step_000002"))
    traced.append(trace_run(without, tmp_path / "b"))
    assert [step.pop("first_step") for step, _ in traced] == [2, 0]
    assert traced[0][0] == traced[1][0]
    for name, array in traced[0][1].items():
        assert len(array) and np.array_equal(array, traced[1][1][name]), name
    rows = [json.loads(line) for line in (replayed / "metrics.jsonl").read_text().splitlines()]
    assert (traced[0][0]["loss"], traced[0][0]["grad_norm"]) == (rows[2]["loss"], rows[2]["grad_norm"])


def trace_run(root: Path, out: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Traces step 2 of a replay in this process; returns what it has written."""
    out.mkdir()
    recording = Recording(Path(json.loads((root / "replay.json").read_text())["recording"]))
    config = load_config(["--config", str(root / "config.yaml"), f"name={root.name}"])
    ranks = Ranks.alone()
    try:
        with closing(recording):
            trace_step(config, recording, ranks, step=2, learning_rates=[], out=out)
    finally:
        dist.destroy_process_group()
    return json.loads((out / "step.json").read_text()), dict(np.load(out / "tokens.npz"))


def test_a_damaged_record_is_named(copy: Path, recorded: Path) -> None:
    with closing(sqlite3.connect(copy / "ledger" / "ledger.sqlite3")) as ledger:
        ticket_id, segment, offset = ledger.execute(
            "SELECT ticket_id, segment, offset FROM tickets JOIN samples USING (ticket_id) "
            "WHERE step = 2 AND position = 1 AND sample_index = 0"
        ).fetchone()
    write_at(segment_path(copy / "ledger", segment), offset + 40, b"\xff\xff")
    result = compare_runs(recorded, copy)
    assert (result.step, result.differences[0].kind) == (2, "damaged records")
    assert f"sample 0 of ticket {ticket_id}" in result.differences[0].text


def test_rows_of_a_run_without_kept_trajectories(copy: Path, recorded: Path) -> None:
    with closing(sqlite3.connect(copy / "ledger" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE segments SET retained = 0")
    equal = compare_runs(recorded, copy)
    assert equal.is_equal and "behavior log-probs" not in equal.compared
    assert "retain_trajectories" in "\n".join(equal.lines())
    with closing(sqlite3.connect(copy / "ledger" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute(
            "UPDATE samples SET reward = reward + 1 WHERE sample_index = 1 AND ticket_id = "
            "(SELECT ticket_id FROM tickets WHERE step = 1 AND position = 3)"
        )
    result = compare_runs(recorded, copy)
    assert (result.step, [one.kind for one in result.differences]) == (1, ["rewards"])
    assert "group 3, sample 1" in result.differences[0].text


def test_another_learning_rate_is_the_cause(recorded: Path, replayed: Path) -> None:
    result = compare_runs(replayed, replay_run(recorded, "faster", lr=4e-4))
    assert (result.step, result.differences[0].kind) == (0, "settings")
    assert result.differences[0].text.startswith("lr_base: ")
    assert "loss" not in [one.kind for one in result.differences], "it is that of the same weights"


@pytest.mark.chaos
def test_one_and_two_ranks_are_equal_to_rounding(
    recorded: Path, replayed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded.parents[1]
    run = areal_like("replay", str(recorded), "name=two", "trainer.world_size=2", cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    two = str(recorded.parent / "two")
    assert main(["replay", str(replayed), "--against", two]) == 0
    out = capsys.readouterr().out
    assert "trainer.world_size=1 / 2" in out and "no difference\n" in out, out
    assert main(["replay", str(replayed), "--against", two, "--tolerance", "0", "--records-only"]) == 1
    assert "first difference: step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "COPY", "trainer.lr=1"], "leave settings out"),
        (["--against", "nowhere"], "there is no run 'nowhere'"),
        (["--against", "COPY", "--tolerance", "2"], "use a share from 0 up to 1"),
        (["--json"], "add --against OTHER"),
        (["--against", "COPY"], "have no step in common"),
    ],
)
def test_a_mistake_gets_one_message(
    words: list[str], message: str, copy: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(copy / "ledger" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE tickets SET step = step + 100")
    code = main(["replay", str(recorded), *(str(copy) if word == "COPY" else word for word in words)])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_settings_are_sorted_by_what_they_act_on() -> None:
    ours = {"objective.name": "tis", "trainer.world_size": "1", "task.name": "sort", "daemon.http_port": "1"}
    theirs = dict.fromkeys(ours, "x") | {"trainer.lr_schedule": "linear"}
    found = compare_settings(ours, theirs)
    assert found.of_steps == ["objective.name=tis / x", "trainer.lr_schedule=(none) / linear"]
    assert found.of_rounding == ["trainer.world_size=1 / x"]
    assert found.of_generation == ["task.name=sort / x"]


def test_rows_leave_out_times_and_name_the_first_of_a_kind() -> None:
    ours = {"step": 1, "loss": 0.5, "entropy": 1.0, "kl_k3": 0.25, "step_s": 1.0, "by_label": {"a": {"n": 1}}}
    theirs = {
        "step": 1,
        "loss": None,
        "entropy": 1.5,
        "kl_k3": 0.5,
        "step_s": 2.0,
        "by_label": {"a": {"n": 2}},
    }
    _, found = compare_rows(ours, theirs, tolerance=0.1)
    assert {one.kind: one.text for one in found} == {
        "loss": "loss: 0.5 / None",
        "policy's log-probs": "entropy: 1.0 / 1.5",
        "other metrics": "by_label.a.n: 1 / 2",
    }


def write_tensor(folder: Path, dtype: str, array: NDArray[Any]) -> Path:
    """Writes a model of one tensor `w`."""
    folder.mkdir()
    entry = {"dtype": dtype, "shape": array.shape, "data_offsets": [0, array.nbytes]}
    header = json.dumps({"w": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + array.tobytes()
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_weights_of_any_dtype(tmp_path: Path) -> None:
    ones, half = (np.array(values, dtype=np.float32) for values in ([1, 1], [1, 1.5]))
    a = write_tensor(tmp_path / "a", "F32", ones)
    b = write_tensor(tmp_path / "b", "BF16", (half.view(np.uint32) >> 16).astype(np.uint16))
    difference = compare_weights(a, b)
    assert difference is not None and difference.relative == pytest.approx(0.5 / 2**0.5)
    assert compare_weights(a, a) is None
    c = write_tensor(tmp_path / "c", "F32", ones * np.array([1, np.nan], dtype=np.float32))
    broken = compare_weights(a, c)
    assert broken is not None and broken.relative == np.inf
    d = write_tensor(tmp_path / "d", "F32", ones[:1])
    shape = compare_weights(a, d)
    assert shape is not None and "(2,) / (1,)" in shape.text
