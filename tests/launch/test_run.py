"""Whole jobs with the real daemons and a very small budget: their results, and their end when processes
die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.trace.reading import read_processes
from tests.jobs.test_metrics_page import named_columns
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.trackers import scalars, wandb_history

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=20",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "eval.num_prompts=8",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=30",
)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The run's directory; nothing of the run may be alive after the test."""
    path = tmp_path / "runs" / "x"
    yield path
    left = processes_of(path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "processes of the run are left"


@pytest.mark.long
def test_a_run_survives_its_launcher_and_a_server(tmp_path: Path, root: Path, cache: dict[str, str]) -> None:
    """Half a minute: two starts of a whole job, the first as a user's, and forty steps."""
    settings = (
        *SMALL,
        "trainer.num_steps=40",
        "max_staleness=1",
        "trainer.checkpoint_interval=20",
        "eval.interval=10",
        "eval.sets={plain: {}, sampled: {num_prompts: 4, num_samples: 3, temperature: 0.8, k: [1, 3]}}",
        "resume=auto",
        "trackers=[tensorboard, {name: wandb, mode: offline}, {_target_: tests.support.trackers.Hanging}]",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache, is_forked=False) as process:
        wait_for_steps(3, root, process=process)
        process.kill()
        wait_until(lambda: not processes_of(root), what="all daemons and engines end", run_root=root)
    num_before = num_steps_done(root)
    assert num_before < 40
    assert (root / "checkpoints" / f"step_{num_before:06d}").exists(), "the orphaned trainer did not drain"

    again = ("name=x", "resume=auto", "trainer.world_size=2", "rollout.num_servers=2")
    with launcher(*again, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(num_before + 3, root, process=process)
        victim = next(
            pid
            for pid, command in processes_of(root).items()
            if "rollout_server --config" in command and "rollout-1" in command
        )
        os.kill(victim, signal.SIGKILL)
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert f"resume of step {num_before} from {root}" in out
    assert "rollout-1 ended (killed by SIGKILL): starting it again" in out
    _check_summary(json.loads((root / "summary.json").read_text()), num_before=num_before)
    third = areal_like("run", "name=x", "resume=auto", cwd=tmp_path)
    assert third.returncode == 0 and "is finished" in third.stdout and "wall time" in third.stdout
    assert (root / "checkpoints" / "step_000040" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(40))
    assert all(set(row) <= named_columns() for row in rows)
    rewards = {row["step"]: pytest.approx(row["reward_mean"]) for row in rows}
    assert scalars(root / "tensorboard")["train/reward_mean"] == rewards
    evaluated = [json.loads(line) for line in (root / "evaluations.jsonl").read_text().splitlines()]
    passed = {
        row["step"]: pytest.approx(row["pass_at_k"]["3"]) for row in evaluated if row["set"] == "sampled"
    }
    assert scalars(root / "tensorboard")["eval/sampled/pass@3"] == passed
    (tracked,) = (root / "wandb").glob("offline-run-*")
    history = wandb_history(tracked)
    reward = "train/reward_mean"  # the last evaluation has a row of its own
    assert {row["_step"]: row[reward] for row in history if row["_step"] < 40 or reward in row} == rewards
    averages = _check_evaluations(root)
    assert {step: pytest.approx(avg) for step, avg in averages.items()} == {
        row["eval/step"]: row["eval/sampled/avg@3"] for row in history if "eval/sampled/avg@3" in row
    }
    logs = {path.name for path in (root / "logs").glob("*.log")}
    assert "tracker Hanging did not end" in (root / "logs" / "trainer-0.log").read_text()
    assert logs >= {"buffer.log", "rollout-0.log", "trainer-0.log", "trainer-1.log"}
    _check_trace(root, tmp_path)

    # test_resumption.py covers the command line, which would import torch here.
    code = f"from pathlib import Path; from trainer.replay.recording import *; Recording(Path({str(root)!r}))"
    replay = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert replay.returncode == 1 and "buffer.retain_trajectories=true" in replay.stderr, (
        "trajectories that were not kept cannot be replayed"
    )


def _check_trace(root: Path, cwd: Path) -> None:
    """Every daemon has spans, on clocks that agree with the rows' times; the report is written."""
    written = areal_like("trace", "x", cwd=cwd)
    assert written.returncode == 0 and "is off by" not in written.stdout, written.stderr
    processes = read_processes(root / "spans")
    assert all(
        one.rtt_s is not None and abs(one.offset_s) < 0.5 for one in processes if one.daemon != "buffer"
    )
    lanes = {(one.daemon, span.lane) for one in processes for span in one.spans}
    expected = {("trainer-0", lane) for lane in ("step", "pushes", "checkpoints", "evaluation of sampled")}
    expected |= {("trainer-1", "step"), ("buffer", "ledger"), ("buffer", "steps being recorded")}
    assert lanes >= expected | {("rollout-0", "samples"), ("rollout-0", "weights")}
    steps = {
        span.arguments["step"]: span.end_s
        for one in processes
        if one.daemon == "trainer-0"
        for span in one.spans
        if span.name == "update"
    }
    for row in map(json.loads, (root / "metrics.jsonl").read_text().splitlines()):
        assert row["step"] not in steps or -0.1 < row["time_unix_s"] - steps[row["step"]] < 30
    assert len(steps) > 20
    assert areal_like("report", "x", cwd=cwd).returncode == 0
    assert "held out: sampled" in (root / "report.html").read_text()


def _check_summary(summary: dict[str, object], *, num_before: int) -> None:
    tickets = summary["tickets"]
    assert isinstance(tickets, dict)
    assert (summary["steps"], summary["resumed_from_step"]) == (40, num_before)
    assert tickets["trained"] == 160
    assert tickets["issued"] == sum(count for state, count in tickets.items() if state != "issued")
    assert isinstance(summary["max_trained_lag"], int) and summary["max_trained_lag"] <= 1
    selection = summary["selection"]
    assert selection["trained"]["samples"] == 640 <= selection["offered"]["samples"]
    assert sum(selection["groups_trained_by_solve_rate"].values()) == 160
    assert set(summary) >= {
        "reward_first",
        "reward_last",
        "eval_before",
        "eval_after",
        "wall_seconds",
        "tokens_generated",
        "tokens_trained",
        "mean_trained_lag",
        "weights_version",
        "generation_idle_fraction",
        "trainer_idle_fraction",
    }


def _check_evaluations(root: Path) -> dict[int, float]:
    """Both sets, also of the steps that were trained twice, in one row each. Returns `avg` of the second."""
    rows = [json.loads(line) for line in (root / "evaluations.jsonl").read_text().splitlines()]
    places = [(row["step"], row["set"]) for row in rows]
    assert len(set(places)) == len(places)
    assert {(step, name) for step in (0, 40) for name in ("plain", "sampled")} <= set(places)
    assert {step for step, _ in places} <= {0, 10, 20, 30, 40}
    for row in rows:
        num_samples, ks = (3, {"1", "3"}) if row["set"] == "sampled" else (1, {"1"})
        assert (row["num_samples"], set(row["pass_at_k"]), row["num_failed"]) == (num_samples, ks, 0)
        assert row["ci_low"] <= row["avg"] <= row["ci_high"]
        # Between steps the engines may have newer weights by the time at which they begin.
        assert 0 <= row["oldest_step"] <= row["newest_step"] <= 40
        assert row["step"] not in (0, 40) or row["oldest_step"] == row["step"]
        assert row["pass_at_k"][max(ks)] >= row["pass_at_k"]["1"]
    summary = json.loads((root / "summary.json").read_text())
    last = {row["set"]: row for row in rows if row["step"] == 40}
    assert {name: ends["after"] for name, ends in summary["evaluations"].items()} == last
    assert summary["eval_after"] == last["plain"]["avg"]
    return {row["step"]: row["avg"] for row in rows if row["set"] == "sampled"}


def test_a_model_that_does_not_exist_is_one_message(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    with launcher(
        *SMALL, "model.path=./nowhere", cwd=tmp_path, environment=cache, is_forked=False
    ) as process:
        code, _, err = finish(process, root)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "model.path=./nowhere" in err
    assert not root.exists()


def test_a_port_in_use_is_one_message(tmp_path: Path, root: Path, cache: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launcher(*SMALL, f"buffer.port={port}", cwd=tmp_path, environment=cache) as process:
            code, _, err = finish(process, root)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and str(port) in err
    assert not root.exists()
