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
    """The limits of one wait, by default none; the wait ends at the first that is reached."""

    name: str
    """The object of the wait, for error messages."""
    started_s: float
    timeout_s: float = math.inf
    """Longest time of the wait."""
    stall_s: float = math.inf
    """Longest time without progress of any rollout server."""
    setting: str = ""
    """The setting behind `stall_s`."""
    _num_warnings: int = 0

    def check(self, *, now_s: float, progressed_s: float, servers: Callable[[], str]) -> None:
        """Raises DeadlineError at a limit. Warns periodically about a long wait during which there is
        progress.

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
