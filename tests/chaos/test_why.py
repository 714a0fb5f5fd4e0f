"""Daemons of a real job run at a tenth of their speed, and the network is cut: `areal-like why` names them.

What stands still altogether is in `test_stops.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.observation.observer import diagnosis, look_at_daemons
from tests.chaos.job import running_job
from tests.chaos.proxy import Faults
from tests.chaos.test_stops import NAMED_WITHIN_S, ROLES, SETTINGS, causes_within, culprit, process_of
from tests.support.launching import finish, launcher, wait_for_steps

pytestmark = pytest.mark.chaos
USUAL_S = 40.0
"""Time in which the speeds become known."""


@contextlib.contextmanager
def at_a_tenth(pid: int) -> Iterator[None]:
    """The process runs for .1 s of each second."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not is_over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.9)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def until_healthy(root: Path) -> None:
    end_s = time.monotonic() + 60
    while diagnosis(look_at_daemons(root / "endpoints").values())["causes"]:
        assert time.monotonic() < end_s, "a daemon is still named a minute after it runs again"
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
            with at_a_tenth(pid):
                named = causes_within(root, seconds=2 * NAMED_WITHIN_S)
            assert named == [name], f"{role} is slow, and `why` names {named}"
        process.terminate()
        assert finish(process, root)[0] == 0


@pytest.mark.timeout(120)
def test_servers_that_are_cut_off_are_named(tmp_path: Path) -> None:
    with running_job(tmp_path, buffer={"lease_timeout_s": 10.0}) as job:
        for name in ("rollout-0", "rollout-1"):
            job.produce(name)
        job.buffer.wait_status(lambda status: len(status["peers"]) >= 2)
        job.proxy.faults = Faults(drop=1.0)
        status = job.buffer.wait_status(lambda status: status["why"]["causes"], timeout_s=NAMED_WITHIN_S)
        named = {cause["name"] for cause in status["why"]["causes"]}
        assert named == {"rollout-0", "rollout-1"}
        job.proxy.faults = Faults()
        job.buffer.wait_status(lambda status: not status["why"]["causes"], timeout_s=30)
