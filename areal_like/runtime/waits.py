"""Named waits of a daemon, listed in its /status, so that a stall shows what the daemon waits for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class PendingWaits:
    """The waits in progress, by name. Use it from one thread, and each name for one wait at a time.

    with waits("buffer: welcome"):
        await link.call(...)
    """

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        """Further waits, as `durations` returns them: of parts that have many at a time."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Lists the wait `name` for the duration of the block."""
        self._since_s[name] = time.monotonic()
        try:
            yield
        finally:
            del self._since_s[name]

    def durations(self) -> dict[str, float]:
        """Wait name -> seconds so far."""
        now_s = time.monotonic()
        own = {name: round(now_s - since_s, 3) for name, since_s in list(self._since_s.items())}
        return own | {name: seconds for source in self.sources for name, seconds in source().items()}
