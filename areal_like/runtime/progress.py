"""Measures how long something has made no progress: limits apply to that time, never to the total time.

Pure: signs and times come in as arguments, so the same code runs in server, trainer and launcher.
"""

from __future__ import annotations

from collections.abc import Hashable


class ProgressClock:
    """Measures the time since anything changed. Times are seconds on one monotonic clock."""

    def __init__(self, *, now_s: float) -> None:
        self._signs: dict[str, Hashable] = {}
        self.last_s = now_s
        """Time of the last progress; before the first, the start time of the clock."""
        self.num_changes = 0
        """Calls of `observe` that saw a change, and of `advance`."""

    def observe(self, source: str, sign: Hashable, *, now_s: float) -> None:
        """Records the current sign of a source. A change is progress, and so is a source's first sign."""
        if source not in self._signs or self._signs[source] != sign:
            self._signs[source] = sign
            self.advance(now_s=now_s)

    def advance(self, *, now_s: float) -> None:
        """Resets the stall timer: progress was made, or there is nothing to do."""
        self.last_s = now_s
        self.num_changes += 1
