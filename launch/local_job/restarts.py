"""Decides when a dead process is started again: a pure state machine without processes or clocks."""

from __future__ import annotations

import math
from enum import StrEnum


class RestartState(StrEnum):
    """The states of a supervised process."""

    RUNNING = "running"
    """Started and not known to be dead."""
    WAITING = "waiting"
    """Dead; will be started again after a delay."""
    GIVEN_UP = "given up"
    """Died too often in a row; not started again."""


class Restarts:
    """The restart policy of one process. Times are seconds on any one monotonic clock.

        RUNNING --died--> WAITING --due, started--> RUNNING
           \\--died too often--> GIVEN_UP
        RUNNING --replaced--> WAITING (due at once)

    The delay doubles with each death in a row, from `base_s` to `max_s`. A process that ran for at least
    `healthy_s`, or a call of `made_progress`, resets the count of deaths. After more than `max_quick_deaths`
    deaths the process is not started again.
    """

    def __init__(
        self,
        *,
        now_s: float,
        base_s: float = 0.5,
        max_s: float = 30.0,
        healthy_s: float = 30.0,
        max_quick_deaths: int = 3,
    ) -> None:
        self._base_s, self._max_s = base_s, max_s
        self._healthy_s, self._max_quick_deaths = healthy_s, max_quick_deaths
        self.state = RestartState.RUNNING
        self.num_quick_deaths = 0
        """Deaths in a row, each after less than `healthy_s` and without progress."""
        self.due_s = now_s
        """When WAITING: time of the next start."""
        self.is_replacing = False
        """True while the process is asked to end for its replacement."""
        self._started_s = now_s
        self._died_s = -math.inf

    def died(self, *, now_s: float) -> None:
        """Records an unexpected end of the process: RUNNING -> WAITING or GIVEN_UP."""
        assert self.state is RestartState.RUNNING
        self._died_s = now_s
        self.is_replacing = False
        self.num_quick_deaths = 1 if now_s - self._started_s >= self._healthy_s else self.num_quick_deaths + 1
        if self.num_quick_deaths > self._max_quick_deaths:
            self.state = RestartState.GIVEN_UP
            return
        self.state = RestartState.WAITING
        self.due_s = now_s + min(self._max_s, self._base_s * 2 ** (self.num_quick_deaths - 1))

    def replaced(self, *, now_s: float) -> bool:
        """Records an orderly end; True if the next process is to be started now: RUNNING -> WAITING."""
        if not self.is_replacing:
            return False
        self.is_replacing = False
        self.state, self.due_s = RestartState.WAITING, now_s
        return True

    def made_progress(self, *, at_s: float) -> None:
        """Records that at `at_s` the process got further than any before it: earlier deaths no longer
        count."""
        self.num_quick_deaths = min(self.num_quick_deaths, int(at_s <= self._died_s))

    def is_due(self, *, now_s: float) -> bool:
        """True when it is time to start the process again."""
        return self.state is RestartState.WAITING and now_s >= self.due_s

    def started(self, *, now_s: float) -> None:
        """Records that the process was started again: WAITING -> RUNNING."""
        assert self.state is RestartState.WAITING
        self.state = RestartState.RUNNING
        self._started_s = now_s
