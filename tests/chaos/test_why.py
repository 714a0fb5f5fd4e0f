"""Daemons of a real job run at a tenth of their speed, the network is cut, and an operator holds a job back:
`areal-like why` names them.

What stands still altogether is in `test_stops.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from areal_like.wire.messages.consumer import StartTraining
from launch.observation.observer import diagnosis, look_at_daemons
from tests.chaos.job import CALL_TIMEOUT_S, running_job
from tests.chaos.proxy import Faults
from tests.chaos.test_stops import ROLES, SETTINGS, culprit, first_causes, process_of
from tests.support.launching import areal_like, finish, launcher, wait_for_steps

pytestmark = pytest.mark.chaos
USUAL_S = 40.0
"""Time in which the speeds become known."""
LONGER_THAN_A_LEASE_S = 15.0


@contextlib.contextmanager
def at_a_fraction(pid: int, *, period_s: float = 1.0, runs_s: float = 0.1) -> Iterator[None]:
    """The process runs for `runs_s` of each `period_s`."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not is_over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(period_s - runs_s)
            os.kill(pid, signal.SIGCONT)
            time.sleep(runs_s)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def until_healthy(root: Path) -> None:
    while diagnosis(look_at_daemons(root / "endpoints").values())["causes"]:
        time.sleep(0.5)


@pytest.mark.timeout(900)
def test_what_runs_at_a_tenth_of_its_speed_is_named(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "x"
    with launcher(*SETTINGS, "max_staleness=8", cwd=tmp_path) as process:
        wait_for_steps(3, root, process=process)
        time.sleep(USUAL_S)
        for role in ROLES:
            until_healthy(root)
            pid = process_of(root, role)
            name = culprit(root, role, pid)
            with at_a_fraction(pid):
                named = first_causes(root)
            assert named == [name], f"{role} is slow, and `why` names {named}"
        process.terminate()
        assert finish(process, root)[0] == 0


def test_a_slow_engine_with_little_work_is_named(tmp_path: Path) -> None:
    """Rewards limit the job, and engines are idle most of the time."""
    root = tmp_path / "runs" / "x"
    settings = [each.replace(".Checksum", ".SlowChecksum") for each in SETTINGS]
    with launcher(*settings, "max_staleness=8", cwd=tmp_path) as process:
        wait_for_steps(3, root, process=process)
        time.sleep(2 * USUAL_S)
        until_healthy(root)
        pid = process_of(root, "engine")
        name = culprit(root, "engine", pid)
        with at_a_fraction(pid, period_s=2.0, runs_s=0.1):
            named = first_causes(root)
            time.sleep(LONGER_THAN_A_LEASE_S)
            later = {
                cause["name"] for cause in diagnosis(look_at_daemons(root / "endpoints").values())["causes"]
            }
        assert named == [name] and later <= {name}, (named, later)
        until_healthy(root)
        process.terminate()
        assert finish(process, root)[0] == 0


def names(status: dict[str, Any]) -> set[str]:
    return {cause["name"] for cause in status["why"]["causes"]}


@pytest.mark.parametrize("has_trainer", [False, True])
def test_who_is_cut_off_is_named(tmp_path: Path, has_trainer: bool) -> None:
    """The servers alone, and all peers: then it is the buffer's network."""
    servers = {"rollout-0", "rollout-1"}
    culprits = {"buffer"} if has_trainer else servers
    with running_job(tmp_path, buffer={"lease_timeout_s": 10.0}) as job:
        for name in servers:
            job.produce(name)
        with job.trainer() if has_trainer else contextlib.nullcontext():
            job.buffer.wait_status(
                lambda status: len(status["peers"]) == 2 + has_trainer and not names(status)
            )
            job.proxy.faults = Faults(drop=1.0)
            first = job.buffer.wait_status(names)
            assert names(first) <= culprits
            # Longer than a lease: servers are removed, and stay named.
            time.sleep(LONGER_THAN_A_LEASE_S)
            assert names(job.buffer.status()) == culprits
            job.proxy.faults = Faults()
            job.buffer.wait_status(lambda status: not names(status) & culprits)


def test_an_operator_who_holds_back_is_named(tmp_path: Path) -> None:
    def operate(*words: str) -> None:
        done = areal_like(*words, cwd=tmp_path)
        assert done.returncode == 0, done

    servers = {"rollout-0", "rollout-1"}
    with running_job(tmp_path) as job:
        for name in servers:
            job.produce(name)
        job.buffer.wait_status(lambda status: servers <= {peer["name"] for peer in status["peers"]})
        for name in servers:
            operate("cordon", "job", name)
        with job.trainer() as client, ThreadPoolExecutor(1) as thread:
            client.call(StartTraining(step=0), timeout_s=CALL_TIMEOUT_S)
            groups = thread.submit(lambda: list(client.groups(0)))
            first = job.buffer.wait_status(names)
            assert names(first) == servers
            assert all("cordoned" in cause["what"] for cause in first["why"]["causes"])
            operate("pause", "job")
            job.buffer.wait_status(lambda status: names(status) == {"an operator"})
            operate("resume", "job")
            for name in servers:
                operate("uncordon", "job", name)
            assert len(groups.result()) == 8
            job.buffer.wait_status(lambda status: not names(status))
