"""Scaling a running job by hand: servers join, leave and die, and the trainer is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from areal_like.paths import RunPaths
from launch.audit.run import audit_run
from launch.cli import main
from launch.observation.http_json import fetch_json
from launch.observation.reach import RunningJob
from launch.run_directory.rundir import is_over
from tests.support import warm_start
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    finish,
    launcher,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.SlowChecksum",
    "eval.num_prompts=0",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
)


def command(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts `areal-like ARGS` in another shell."""
    return warm_start.Popen(
        [sys.executable, "-m", "launch", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], run: Path) -> tuple[int, str]:
    """Exit code and output of another shell's command, once it has ended."""
    wait_until(lambda: process.poll() is not None, what=f"the end of {process.args}", run_root=run)
    out, _ = process.communicate()
    return process.returncode, out


def status(run: Path, name: str) -> dict[str, object]:
    """/status of a daemon; empty when it does not answer."""
    endpoint = run / "endpoints" / f"{name}.json"
    return (
        fetch_json(json.loads(endpoint.read_text())["http"], "/status") if endpoint.exists() else None
    ) or {}


def samples_of(run: Path, server: str) -> float:
    """Number of samples that a server has finished."""
    peers = status(run, "buffer").get("peers", [])
    assert isinstance(peers, list)
    return max((peer["stats"].get("samples_done", 0) for peer in peers if peer["name"] == server), default=0)


def check_finished_run(run: Path) -> None:
    """Checks the invariants of a run that has ended, after any servers have joined and left."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))), "no step was lost or done twice"
    assert max(row["lag_max"] for row in rows) <= 4
    tickets = json.loads((run / "summary.json").read_text())["tickets"]
    assert tickets["trained"] == 4 * len(rows)
    assert tickets["issued"] == sum(n for state, n in tickets.items() if state != "issued")
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())


@pytest.mark.long
def test_servers_come_and_go_and_the_trainer_is_replaced(
    tmp_path: Path,
    cache: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "x"
    monkeypatch.chdir(tmp_path)
    settings = (
        "trainer.num_steps=100000",
        "trainer.checkpoint_interval=1000",
        "buffer.lease_timeout_s=15",
        "weights.push_deadline_s=30",
    )
    with launcher(*SMALL, *settings, cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"} | cache) as process:

        def trains(num_steps: int) -> None:
            wait_for_steps(num_steps_done(run) + num_steps, run, process=process)

        trains(3)
        stays, leaves, dies = (
            command("rollout", "x", "--join", *name, cwd=tmp_path)
            for name in ((), ("--name", "l"), ("--name", "d"))
        )
        for name in ("rollout-1", "l", "d"):
            wait_until(
                lambda name=name: samples_of(run, name) > 8,
                what=f"samples of {name}, which joined",
                run_root=run,
                process=process,
            )
        os.kill(json.loads((run / "endpoints" / "d.json").read_text())["pid"], signal.SIGKILL)
        assert ended(dies, run)[0] == 1
        trains(4)
        leaves.terminate()
        assert ended(leaves, run)[0] == 0
        # The launcher's own server leaves and is not restarted; one joined server continues alone.
        assert main(["drain", "x", "rollout-0"]) == 0
        assert "rollout-0 has left" in capsys.readouterr().out
        trains(8)
        assert stays.poll() is None and process.poll() is None
        wait_until(
            lambda: "d" not in RunningJob.in_directory(str(run)).servers(),
            what="the buffer to forget the killed server",
            run_root=run,
            process=process,
        )
        assert main(["drain", "x", "rollout-0"]) == 2
        assert "no rollout server 'rollout-0' (servers: rollout-1)" in capsys.readouterr().err

        before = samples_of(run, "rollout-1")
        assert main(["restart", "x", "trainer", "trainer.world_size=2"]) == 0
        wait_until(
            (run / "endpoints" / "trainer-1.json").exists,
            what="the second rank",
            run_root=run,
            process=process,
        )
        done = num_steps_done(run)
        trains(4)
        assert samples_of(run, "rollout-1") > before
        assert json.loads((run / "summary.json").read_text())["steps"] <= done

        process.terminate()
        code, out, err = finish(process, run)
        assert (code, err) == (0, ""), out + err
        assert "did not end in time" not in out
        num_done = num_steps_done(run)
        assert (
            f"stopped after step {num_done} of 100000; continue with: areal-like run name=x resume=latest"
            in out
        )
        assert ended(stays, run)[0] == 0, "the joined server ends with its run"
    assert is_over(RunPaths(run))
    check_finished_run(run)
    wait_until(lambda: not processes_of(run), what="no orphans")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_servers_come_and_go_every_ten_seconds(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    settings = (
        *(setting for setting in SMALL if not setting.startswith("task.")),
        "task._target_=tests.support.rollout_tasks.Checksum",
        "trainer.num_steps=1000000",
        "trainer.lr_schedule=constant",
    )
    with launcher(*settings, cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"}) as process:
        wait_for_steps(3, run, process=process)
        for index in range(30):
            name = f"rollout-joined-{index}"
            joined = command("rollout", "x", "--join", "--name", name, cwd=tmp_path)
            endpoint = run / "endpoints" / f"{name}.json"
            wait_until(
                lambda name=name: samples_of(run, name) > 0,
                what=f"samples of {name}",
                run_root=run,
                process=process,
            )
            time.sleep(10.0)
            if index % 2:
                os.kill(json.loads(endpoint.read_text())["pid"], signal.SIGKILL)
            else:
                joined.terminate()
            ended(joined, run)
            wait_for_steps(num_steps_done(run) + 4, run, process=process)
        process.terminate()
        assert finish(process, run)[0] == 0
    check_finished_run(run)
