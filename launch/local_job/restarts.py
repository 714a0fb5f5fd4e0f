"""When a daemon that died is started again: a pure state machine without processes or clocks.

    RUNNING --died--> WAITING --due--> RUNNING
       \\--died too often--> GIVEN_UP

A life of at least `healthy_s`, or one that is known to have got on, forgets the deaths before it. Delays double from `base_s` to `max_s`.
"""

from __future__ import annotations

import math
from enum import StrEnum


class Phase(StrEnum):
    """What the supervised process is doing."""

    RUNNING = "running"
    """Started and not known to be dead."""
    WAITING = "waiting"
    """Dead; starts again when its delay is over."""
    GIVEN_UP = "given up"
    """Died too often in too short a time; never started again."""


class Restarts:
    """The restart policy of one process. Times are seconds on any one monotonic clock."""

    def __init__(
        self,
        *,
        now_s: float,
        base_s: float = 0.5,
        max_s: float = 30.0,
        healthy_s: float = 30.0,
        max_quick_deaths: int = 3,
    ) -> None:
        self._base_s, self._max_s, self._healthy_s, self._max_quick_deaths = (
            base_s,
            max_s,
            healthy_s,
            max_quick_deaths,
        )
        self.phase = Phase.RUNNING
        self.num_deaths = 0
        """Deaths since the first start."""
        self.num_quick_deaths = 0
        """Deaths since the last healthy life."""
        self.due_s = now_s
        """When WAITING: time of the next start."""
        self._started_s = now_s
        self._died_s = -math.inf

    def died(self, *, now_s: float) -> None:
        """The process has ended unasked: RUNNING -> WAITING or GIVEN_UP."""
        assert self.phase is Phase.RUNNING
        self.num_deaths += 1
        self._died_s = now_s
        self.num_quick_deaths = 1 if now_s - self._started_s >= self._healthy_s else self.num_quick_deaths + 1
        if self.num_quick_deaths > self._max_quick_deaths:
            self.phase = Phase.GIVEN_UP
            return
        self.phase = Phase.WAITING
        self.due_s = now_s + min(self._max_s, self._base_s * 2 ** (self.num_quick_deaths - 1))

    def got_on(self, *, at_s: float) -> None:
        """The process did, at that time, what its predecessors did not: their deaths are forgotten, its own since then is not."""
        self.num_quick_deaths = min(self.num_quick_deaths, int(at_s <= self._died_s))

    def is_due(self, *, now_s: float) -> bool:
        """Whether it is time to start the process again."""
        return self.phase is Phase.WAITING and now_s >= self.due_s

    def started(self, *, now_s: float) -> None:
        """The process was started again: WAITING -> RUNNING."""
        assert self.phase is Phase.WAITING
        self.phase = Phase.RUNNING
        self._started_s = now_s
