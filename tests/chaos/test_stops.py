"""Every role and an engine of a real job are stopped by SIGSTOP for longer than a lease, then continued.

`areal-like why` names it, and nobody else. No daemon ends, nothing is lost, and the job goes on. A stopped
process still has its connections: its peers cannot see that it is not running, and their messages wait in its
socket. An engine that is stopped during a
push, and for longer than `weights.push_deadline_s` and the time in which it has to report its version, is
replaced by its server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from launch.observation.observer import diagnosis, look_at_daemons
from tests.support.launching import (
    finish,
    launcher,
    launcher_log,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

LEASE_TIMEOUT_S = 4.0
SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=8",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=10",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=10",
    f"buffer.lease_timeout_s={LEASE_TIMEOUT_S}",
    "max_staleness=2",
)
ROLES = {
    "buffer": "--name buffer",
    "trainer": "-m trainer --config",
    "server": "--name rollout-1",
    "engine": "-m rollout_server.engine",
}
"""Name -> a part of the command line."""


def process_of(root: Path, role: str) -> int:
    """The process of a role; the older one of two engines."""
    return min(pid for pid, command in processes_of(root).items() if ROLES[role] in command)


def culprit(root: Path, role: str, pid: int) -> str:
    """The name that `areal-like why` has for a process."""
    if role != "engine":
        return {"buffer": "buffer", "trainer": "trainer-0", "server": "rollout-1"}[role]
    views = look_at_daemons(root / "endpoints").values()
    (server,) = [view.name for view in views if view.status and view.status.get("engine_pid") == pid]
    return f"{server}'s engine"


def causes(root: Path) -> list[str]:
    """The names of the causes that `areal-like why` finds."""
    return [cause["name"] for cause in diagnosis(look_at_daemons(root / "endpoints").values())["causes"]]


def first_causes(root: Path) -> list[str]:
    """Its first causes."""
    while not (named := causes(root)):
        time.sleep(0.5)
    return named


def stop_each_role(directory: Path, *, stopped_s: float, num_rounds: int = 1) -> None:
    root = directory / "runs" / "x"
    with launcher(*SETTINGS, cwd=directory) as process:
        wait_for_steps(3, root, process=process)
        wait_until(
            lambda: sum(ROLES["engine"] in command for command in processes_of(root).values()) == 2,
            what="two engines",
            run_root=root,
        )
        daemons = {role: process_of(root, role) for role in ROLES if role != "engine"}
        for role in list(ROLES) * num_rounds:
            pid = process_of(root, role)
            name = culprit(root, role, pid)
            os.kill(pid, signal.SIGSTOP)
            stopped_at_s = time.monotonic()
            named = first_causes(root)
            assert named == [name], f"{role} is stopped, and `why` names {named}"
            time.sleep(max(0.0, stopped_at_s + stopped_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError if role == "engine" else ()):
                os.kill(pid, signal.SIGCONT)
            # The steps of the bound need no new samples; those beyond it do.
            wait_for_steps(num_steps_done(root) + 5, root, process=process)
            # Steps go on without a server that has not recovered yet.
            wait_until(lambda: not causes(root), what="a job without troubles", run_root=root)
        assert {role: process_of(root, role) for role in daemons} == daemons, "\n".join(launcher_log(root))
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    # Steps do not wait for a stopped engine, so its samples may be too old once it continues.
    assert not {reason for reason, count in audit.drops.items() if count} - {"stale"}, audit.drops


@pytest.mark.chaos
def test_each_role_is_stopped_longer_than_a_lease(tmp_path: Path) -> None:
    stop_each_role(tmp_path, stopped_s=12.0)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_each_role_is_stopped_for_half_a_minute(tmp_path: Path) -> None:
    stop_each_role(tmp_path, stopped_s=30.0, num_rounds=3)
