"""Whole jobs with the real daemons and a very small budget: what a person gets, and what is left when things are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.test_metrics_page import named_columns
from tests.support.launching import areal_like, launcher, num_steps_done, processes_of, wait_until

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=20",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "eval.num_prompts=8",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=10",
)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The run's directory; nothing of the run may be alive after the test."""
    path = tmp_path / "runs" / "x"
    yield path
    left = processes_of(path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "orphans"


def finish(process: subprocess.Popen[str], *, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a launcher that ends by itself."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def test_a_run_survives_its_launcher_and_a_server_and_adds_up(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (*SMALL, "trainer.num_steps=40", "max_staleness=1", "trainer.checkpoint_interval=20")
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        wait_until(lambda: num_steps_done(root) > 3, timeout_s=90, what="training")
        process.kill()
        wait_until(lambda: not processes_of(root), timeout_s=35, what="all daemons and engines end")
    num_before = num_steps_done(root)
    assert num_before < 40 and (root / "checkpoints" / f"step_{num_before:06d}").exists(), (
        "the trainer drained by itself"
    )

    again = ("name=x", "resume=latest", "trainer.world_size=2", "rollout.num_servers=2")
    with launcher(*again, cwd=tmp_path, environment=cache) as process:
        wait_until(lambda: num_steps_done(root) > num_before + 3, timeout_s=90, what="training goes on")
        victim = next(
            pid
            for pid, command in processes_of(root).items()
            if "rollout_server --config" in command and "rollout-1" in command
        )
        os.kill(victim, signal.SIGKILL)
        code, out, err = finish(process, timeout_s=90)
    assert (code, err) == (0, ""), out + err
    assert "rollout-1 ended (killed by SIGKILL): starting it again" in out
    summary = json.loads((root / "summary.json").read_text())
    tickets = summary["tickets"]
    assert summary["steps"] == 40 and summary["resumed_from_step"] == num_before and tickets["trained"] == 160
    assert tickets["issued"] == sum(count for state, count in tickets.items() if state != "issued")
    assert summary["max_trained_lag"] <= 1
    assert {
        "reward_first",
        "reward_last",
        "eval_before",
        "eval_after",
        "wall_seconds",
        "tokens_generated",
        "tokens_trained",
    } <= set(summary)
    assert {
        "mean_trained_lag",
        "weights_version",
        "generation_idle_fraction",
        "trainer_idle_fraction",
    } <= set(summary)
    assert (root / "checkpoints" / "step_000040" / "model.safetensors").exists()
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(40)) and all(
        set(row) <= named_columns() for row in rows
    )
    assert {path.name for path in (root / "logs").glob("*.log")} >= {
        "buffer.log",
        "rollout-0.log",
        "trainer-0.log",
        "trainer-1.log",
    }

    replay = areal_like("replay", "x", cwd=tmp_path)
    assert replay.returncode == 2 and "buffer.retain_trajectories=true" in replay.stderr, (
        "what was not kept cannot be replayed"
    )


def test_a_model_that_does_not_exist_is_one_message(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    with launcher(*SMALL, "model.path=./nowhere", cwd=tmp_path, environment=cache) as process:
        code, _, err = finish(process, timeout_s=60)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "model.path=./nowhere" in err


def test_a_port_in_use_is_one_message(tmp_path: Path, root: Path, cache: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launcher(*SMALL, f"buffer.port={port}", cwd=tmp_path, environment=cache) as process:
            code, _, err = finish(process, timeout_s=60)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and str(port) in err
