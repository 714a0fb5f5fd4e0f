"""Decides when a process that has ended is restarted: the policy of launcher, Ray driver and rollout server.

Pure: no process and no clock. The owner of the processes reports what happens to them, with the time, and
asks when the next start is due. Left out: the meaning of exit codes, because each owner has its own, and the
text for the user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

_MOST_DOUBLINGS = 16
"""Maximum number of doublings of a pause, so that the result fits into a float."""


class RestartState(StrEnum):
    """The states of a supervised process."""

    WAITING = "waiting"
    """It is not running, and is started at `due_s`."""
    RUNNING = "running"
    """It was started and is not known to have ended."""
    GIVEN_UP = "given up"
    """It has failed too often in a row and is not restarted."""


@dataclass(frozen=True, kw_only=True)
class RestartLimits:
    """How many failures in a row are allowed, and how long to wait after each."""

    max_failures: int = 3
    """Failures in a row after which the process is still restarted."""
    healthy_s: float = 30.0
    """Uptime in seconds after which earlier failures no longer count; infinite: only progress resets them."""
    first_pause_s: float = 0.5
    """Seconds between the first failure and the next start; doubles with each failure in a row."""
    longest_pause_s: float = 30.0
    """Longest such pause, in seconds."""


class Restarts:
    """The starts of one process. Times are seconds on any one monotonic clock.

    WAITING --started--> RUNNING --failed--> WAITING, after a pause
                            |-----failed--> GIVEN_UP, after more than `max_failures` in a row
                            `-----left----> WAITING, and nothing is counted
    """

    def __init__(self, limits: RestartLimits, *, now_s: float) -> None:
        """The first start is due at once."""
        self._limits = limits
        self._started_s = now_s
        self._failed_s = -math.inf
        self.state = RestartState.WAITING
        self.due_s = now_s
        """When WAITING: time of the next start."""
        self.num_failures = 0
        """Consecutive failures: each after less than `healthy_s` of uptime, and without progress since the
        last one."""

    def is_due(self, *, now_s: float) -> bool:
        """True when it is time for the next start."""
        return self.state is RestartState.WAITING and now_s >= self.due_s

    def started(self, *, now_s: float) -> None:
        """Records a start, or the beginning of one that may fail: WAITING -> RUNNING."""
        assert self.state is RestartState.WAITING
        self.state, self._started_s = RestartState.RUNNING, now_s

    def failed(self, *, now_s: float) -> None:
        """Records an unexpected end: RUNNING -> WAITING or GIVEN_UP."""
        assert self.state is RestartState.RUNNING
        limits = self._limits
        is_quick = now_s - self._started_s < limits.healthy_s
        self.num_failures = self.num_failures + 1 if is_quick else 1
        self._failed_s = now_s
        if self.num_failures > limits.max_failures:
            self.state = RestartState.GIVEN_UP
            return
        doubled_s = limits.first_pause_s * 2.0 ** min(self.num_failures - 1, _MOST_DOUBLINGS)
        self.state = RestartState.WAITING
        self.due_s = now_s + min(limits.longest_pause_s, doubled_s)

    def left(self, *, now_s: float, pause_s: float = 0.0) -> None:
        """Records an end that is not a failure of the process, which is restarted: RUNNING -> WAITING."""
        assert self.state is RestartState.RUNNING
        self.state, self.due_s = RestartState.WAITING, now_s + pause_s

    def made_progress(self, *, at_s: float) -> None:
        """Records that a process got further at `at_s` than any before it: failures before that time no
        longer count."""
        self.num_failures = min(self.num_failures, int(at_s <= self._failed_s))
