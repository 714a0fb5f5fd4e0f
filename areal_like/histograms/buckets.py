"""Counts of values by size: what a Prometheus histogram shows, without a lock, a registry or a clock.

The core of the buffer and the loop of the engine count here, in less than a microsecond a value; the page of
metrics reads the counts when it is asked for. One thread counts, others may read: a reader sees a value in
the sum or in the counts a moment earlier than in the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

SHORT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Limits, in seconds, for what a disk or an engine does at once and a fault makes a thousand times slower."""
LONG_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Limits, in seconds, for what lasts as long as a sample or a step: an instant, or an hour with agents."""


class Buckets:
    """Values by size. A value counts in the first bucket whose limit it does not exceed."""

    __slots__ = ("counts", "limits", "total")

    def __init__(self, limits: Sequence[float]) -> None:
        """`limits`: ascending; one more bucket has what exceeds the last."""
        self.limits = tuple(limits)
        self.counts = [0] * (len(self.limits) + 1)
        self.total = 0.0
        """Sum of the values."""

    def observe(self, value: float, *, times: int = 1) -> None:
        """Counts a value; one below zero, of a clock that was set anew, counts as zero."""
        value = max(value, 0.0)
        self.counts[bisect_left(self.limits, value)] += times
        self.total += value * times

    def observe_all(self, values: Iterable[float]) -> None:
        """Counts each of these values."""
        for value in values:
            self.observe(value)

    def cumulative(self) -> list[tuple[str, float]]:
        """(limit, number of values up to it) for each bucket, as Prometheus has them; the last is `+Inf`."""
        found, total = [], 0
        names = (*(str(float(limit)) for limit in self.limits), "+Inf")
        for name, count in zip(names, list(self.counts), strict=True):
            total += count
            found.append((name, float(total)))
        return found
