"""Waits of a daemon: how long each is, and that a daemon that was stopped does not count that time."""

import json
import os
import signal
import time
from pathlib import Path

from areal_like.runtime.waits import TICK_S, PendingWaits
from tests.support.daemon_process import DaemonProcess


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def run(self, waits: PendingWaits, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            waits.tick()


def test_time_in_which_a_daemon_was_stopped_does_not_count() -> None:
    clock = Clock()
    waits = PendingWaits(clock=clock)
    waits.sources.append(lambda: {"engine: a token": clock.now_s - 100.0})
    with waits("weights: rollout-0 to activate version 10"):
        clock.run(waits, 3.0)
        assert set(waits.durations().values()) == {3.0}
        clock.now_s += 12.0  # stopped; the heartbeat comes before the next tick
        assert set(waits.longest().values()) == {0.0}
        clock.run(waits, 6.0)
        assert set(waits.longest().values()) == {6.0}
        clock.now_s += 12.0  # stopped again; the tick comes first
        waits.tick()
        assert set(waits.longest().values()) == {0.0}
    assert list(waits.durations()) == ["engine: a token"]


def test_a_wait_without_ticks_counts_from_its_begin() -> None:
    clock = Clock()
    waits = PendingWaits(clock=clock)
    with waits("buffer: welcome"):
        clock.now_s += 30.0
        with waits("buffer: welcome"):
            clock.now_s += 1.0
            assert waits.durations() == {"buffer: welcome": 31.0}


def test_a_stopped_process_begins_its_waits_anew(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "serve")
    try:
        daemon.wait_ready()
        while json.loads(daemon.get("/status")[1])["waiting_on"].get("a signal", 0.0) < 0.9:
            time.sleep(0.05)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        time.sleep(4.0)
        os.kill(daemon.process.pid, signal.SIGCONT)
        after_s = json.loads(daemon.get("/status")[1])["waiting_on"]["a signal"]
        assert after_s < time.monotonic() - stopped_s - 3.9
    finally:
        daemon.close()
