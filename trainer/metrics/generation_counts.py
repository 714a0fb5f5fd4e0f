"""Counters of the buffer in the rows of steps: tokens that were generated, and how busy the engines were."""

from __future__ import annotations

import time
from collections.abc import Callable

from areal_like.wire.messages.consumer import RunCounters

_INTERVAL_S = 5.0
_NAMES = ("tokens_generated", "generation_busy_s", "generation_idle_s")


class GenerationCounts:
    """Asks the buffer for its counters once in a while: a request in each step would cost short ones time."""

    def __init__(self, ask: Callable[[], RunCounters]) -> None:
        self._ask = ask
        self._due_s = 0.0

    def of_row(self) -> dict[str, float]:
        """Columns for the row of the step that ends now; none if the buffer was asked a short while ago."""
        if time.monotonic() < self._due_s:
            return {}
        self._due_s = time.monotonic() + _INTERVAL_S
        counters = self._ask().counters
        return {name: counters.get(name, 0.0) for name in _NAMES}
