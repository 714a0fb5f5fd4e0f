"""A running job is scaled by hand: servers join from other shells, leave and die, and the trainer is replaced by a wider one."""

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
from launch.local_job.rundir import is_over
from tests.support.launching import ROOT, launcher, num_steps_done, processes_of, wait_until

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
SMALL = (
    *(
        "name=x",
        "model.warm_start_steps=0",
        "task._target_=tests.support.rollout_tasks.Unhurried",
        "eval.num_prompts=0",
    ),
    *(
        "sampling.group_size=4",
        "trainer.groups_per_step=4",
        "rollout.max_running=16",
        "rollout.queue_samples=8",
    ),
)


def command(*args: str, cwd: Path) -> subprocess.Popen[str]:
    """`areal-like ARGS` in another shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def status(run: Path, name: str) -> dict[str, object]:
    from launch.observation.http_json import fetch_json

    endpoint = run / "endpoints" / f"{name}.json"
    return (
        fetch_json(json.loads(endpoint.read_text())["http"], "/status") if endpoint.exists() else None
    ) or {}


def samples_of(run: Path, server: str) -> float:
    """Samples that a server has finished."""
    peers = status(run, "buffer").get("peers", [])
    assert isinstance(peers, list)
    return max((peer["stats"].get("samples_done", 0) for peer in peers if peer["name"] == server), default=0)


def audited(run: Path) -> None:
    """What must hold of a run that has ended, whoever came and went."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))), "no step was lost or done twice"
    assert max(row["lag_max"] for row in rows) <= 4
    books = json.loads((run / "summary.json").read_text())["tickets"]
    assert books["trained"] == 4 * len(rows) and books["issued"] == sum(
        n for state, n in books.items() if state != "issued"
    )
    report = audit_run(run)
    assert report.is_clean, "\n".join(report.lines())


def test_servers_come_and_go_and_a_wider_trainer_takes_over_in_one_run(
    tmp_path: Path, cache: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "x"

    def trains(num_steps: int, what: str) -> None:
        done = num_steps_done(run)
        wait_until(lambda: num_steps_done(run) > done + num_steps, timeout_s=90, what=what)

    settings = ("trainer.num_steps=100000", "trainer.checkpoint_interval=1000")
    with launcher(*SMALL, *settings, cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"} | cache) as process:
        wait_until(lambda: num_steps_done(run) > 3, timeout_s=120, what="training")
        stays, leaves, dies = (
            command("rollout", "x", "--join", *name, cwd=tmp_path)
            for name in ((), ("--name", "l"), ("--name", "d"))
        )
        for name in ("rollout-1", "l", "d"):
            wait_until(
                lambda name=name: samples_of(run, name) > 8,
                timeout_s=90,
                what=f"samples of {name}, which joined",
            )
        os.kill(json.loads((run / "endpoints" / "d.json").read_text())["pid"], signal.SIGKILL)
        dies.communicate(timeout=60)
        trains(4, "training without the guest that died")
        leaves.terminate()
        leaves.communicate(timeout=60)
        assert (dies.returncode, leaves.returncode) == (1, 0)
        # The one that the launcher started leaves; it is not started again, and one guest goes on alone.
        drained = command("drain", "x", "rollout-0", cwd=tmp_path)
        out, _ = drained.communicate(timeout=60)
        assert drained.returncode == 0 and "rollout-0 has left" in out, out
        trains(8, "training on one guest's samples")
        assert stays.poll() is None and process.poll() is None
        refused = command("drain", "x", "rollout-0", cwd=tmp_path)
        out, _ = refused.communicate(timeout=60)
        assert refused.returncode == 2 and "no rollout server 'rollout-0' (servers: rollout-1)" in out

        before = samples_of(run, "rollout-1")
        restarted = command("restart", "x", "trainer", "trainer.world_size=2", cwd=tmp_path)
        out, _ = restarted.communicate(timeout=60)
        assert restarted.returncode == 0, out
        wait_until(
            lambda: (run / "endpoints" / "trainer-1.json").exists(), timeout_s=90, what="the second rank"
        )
        done = num_steps_done(run)
        trains(4, "training on two ranks")
        assert samples_of(run, "rollout-1") > before
        assert json.loads((run / "summary.json").read_text())["steps"] <= done

        started_s = time.monotonic()
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), out + err
        assert time.monotonic() - started_s < 30
        num_done = num_steps_done(run)
        assert (
            f"stopped after step {num_done} of 100000; go on with: areal-like run name=x resume=latest" in out
        )
        stays.communicate(timeout=30)
        assert stays.returncode == 0, "the guest ends with its run"
    assert is_over(RunPaths(run))
    audited(run)
    wait_until(lambda: not processes_of(run), timeout_s=10, what="no orphans")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_servers_come_and_go_every_ten_seconds(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    settings = (
        "task._target_=tests.support.rollout_tasks.Checksum",
        "trainer.num_steps=1000000",
        "trainer.lr_schedule=constant",
    )
    with launcher(*SMALL, *settings, cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"}) as process:
        wait_until(lambda: num_steps_done(run) > 3, timeout_s=120, what="training")
        for index in range(30):
            name = f"rollout-guest-{index}"
            guest = command("rollout", "x", "--join", "--name", name, cwd=tmp_path)
            endpoint = run / "endpoints" / f"{name}.json"
            wait_until(lambda: samples_of(run, name) > 0, timeout_s=90, what="samples of a guest")  # noqa: B023
            time.sleep(10.0)
            if index % 2:
                os.kill(json.loads(endpoint.read_text())["pid"], signal.SIGKILL)
            else:
                guest.terminate()
            guest.communicate(timeout=60)
            done = num_steps_done(run)
            wait_until(
                lambda done=done: num_steps_done(run) > done + 4,
                timeout_s=90,
                what="training without the guest",
            )
        process.terminate()
        assert process.wait(timeout=60) == 0
    audited(run)
