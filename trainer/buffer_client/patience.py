"""The limits of one wait of the training thread. Pure: times come in as arguments."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from areal_like.errors import DeadlineError

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Patience:
    """Either limit ends the wait; by default there is none."""

    name: str
    """What is waited for, for error messages."""
    started_s: float
    timeout_s: float = math.inf
    """Longest time of the wait."""
    stall_s: float = math.inf
    """Longest time of it in which no rollout server makes progress."""
    setting: str = ""
    """The setting behind `stall_s`."""
    _num_warnings: int = 0

    def check(self, *, now_s: float, progressed_s: float, servers: Callable[[], str]) -> None:
        """Raises DeadlineError at a limit. Warns now and then of a wait that progress has made long.

        `progressed_s`: time of the last progress of any rollout server; `servers`: describes them.
        """
        waited_s = now_s - self.started_s
        if waited_s > self.timeout_s:
            raise DeadlineError(f"waited {self.timeout_s:g} s for {self.name}")
        if now_s - max(self.started_s, progressed_s) > self.stall_s:
            raise DeadlineError(
                f"waited {waited_s:.0f} s for {self.name}, and no rollout server has made progress for "
                f"{self.stall_s:g} s ({self.setting} after rollout.generate_timeout_s): {servers()}"
            )
        if waited_s > (self._num_warnings + 1) * self.stall_s:
            self._num_warnings += 1
            log.warning(
                "waiting for %s since %.0f s while the rollout servers make progress: %s",
                self.name,
                waited_s,
                servers(),
            )
