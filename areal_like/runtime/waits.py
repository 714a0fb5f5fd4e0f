"""Named waits of a daemon, listed in its /status, so that a stall shows what the daemon waits for.

A daemon that was stopped for a while (SIGSTOP, a suspended machine) does not count that time: the response
may have been waiting unread in a socket.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping

from areal_like.wire.limits import MAX_WAIT_CHARS, MAX_WAITS

TICK_S = 1.0
"""Interval at which a daemon calls `PendingWaits.tick`."""
_STOPPED_S = 3.0
"""Time without a tick after which the process is considered to have been stopped. A busy event loop is late
by less."""


class PendingWaits:
    """The waits in progress, by name. Several may have the same name; the longest of them counts.

    with waits("buffer: welcome"):
        await link.call(...)
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._ticked_s: float | None = None
        self._awake_since_s = -math.inf
        """When the process last continued after being stopped."""
        self._begun: dict[int, tuple[str, float]] = {}
        """Name and start of each wait, by a unique number: waits of several threads may overlap."""
        self._numbers = itertools.count()
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        """Functions that return further waits, as `durations` does, for parts that have many at a time."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Lists the wait `name` for the duration of the block."""
        number = next(self._numbers)
        self._begun[number] = (name, self._clock())
        try:
            yield
        finally:
            del self._begun[number]

    def tick(self) -> None:
        """Call it every TICK_S, in the daemon's event loop. Without it, the time of stops counts."""
        self._notice_a_stop(now_s := self._clock())
        self._ticked_s = now_s

    def durations(self) -> dict[str, float]:
        """Wait name -> seconds so far, counted since the process last continued after a stop."""
        self._notice_a_stop(now_s := self._clock())
        most_s = now_s - self._awake_since_s
        seconds: dict[str, float] = {}
        for name, since_s in list(self._begun.values()):
            seconds[name] = max(seconds.get(name, 0.0), now_s - since_s)
        seconds |= {name: each for source in self.sources for name, each in source().items()}
        return {name: round(min(each, most_s), 3) for name, each in seconds.items()}

    def longest(self) -> dict[str, float]:
        """The longest waits, limited in number and length of names to what a heartbeat may carry."""
        longest = sorted(self.durations().items(), key=lambda wait: -wait[1])[:MAX_WAITS]
        return {name[:MAX_WAIT_CHARS]: max(0.0, seconds) for name, seconds in longest}

    def _notice_a_stop(self, now_s: float) -> None:
        # Waits may be read before the first tick after a stop.
        if self._ticked_s is not None and now_s - self._ticked_s > _STOPPED_S:
            self._awake_since_s = self._ticked_s = now_s
