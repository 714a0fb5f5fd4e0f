"""Named waits of a daemon, listed in its /status, so that a stall shows what the daemon waits for."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping

from areal_like.wire.limits import MAX_WAIT_CHARS, MAX_WAITS


class PendingWaits:
    """The waits in progress, by name. Several may have the same name; the longest of them counts.

    with waits("buffer: welcome"):
        await link.call(...)
    """

    def __init__(self) -> None:
        self._begun: dict[int, tuple[str, float]] = {}
        """Name and start of each wait, by a number of its own: waits of several threads may overlap."""
        self._numbers = itertools.count()
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        """Further waits, as `durations` returns them: of parts that have many at a time."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Lists the wait `name` for the duration of the block."""
        number = next(self._numbers)
        self._begun[number] = (name, time.monotonic())
        try:
            yield
        finally:
            del self._begun[number]

    def durations(self) -> dict[str, float]:
        """Wait name -> seconds so far."""
        now_s = time.monotonic()
        seconds: dict[str, float] = {}
        for name, since_s in list(self._begun.values()):
            seconds[name] = max(seconds.get(name, 0.0), round(now_s - since_s, 3))
        return seconds | {name: each for source in self.sources for name, each in source().items()}

    def longest(self) -> dict[str, float]:
        """The longest waits, as many and as much of their names as a heartbeat may carry."""
        longest = sorted(self.durations().items(), key=lambda wait: -wait[1])[:MAX_WAITS]
        return {name[:MAX_WAIT_CHARS]: max(0.0, seconds) for name, seconds in longest}
