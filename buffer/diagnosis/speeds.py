"""Notices a daemon that works, and far slower than it did before. Pure: times come in as arguments.

The speed of an engine is its tokens a second while it has requests, and those of one request; the speed of
a trainer is its steps per second of work. The time of work is counted by the daemon: what it does at the
moment of a heartbeat does not measure steps that are shorter than the time between heartbeats. Each is
compared with its own mean of earlier windows: machines, models and lengths differ too much to compare daemons
with one another. With more requests at a time, each of them is slower, and with fewer all of them together
are; so an engine is slow only if both have fallen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW_S = 4.0
"""Time over which a speed is taken: several heartbeats, and several tokens of a slow engine."""
_SLOW = 0.25
"""Fraction of the usual speed below which a daemon is slow. Lengths of answers alone change it by less."""
_USUAL_AGAIN = 0.4
"""Fraction above which a slow daemon is no longer slow."""
_SETTLED = 4
"""Windows before a speed counts as usual."""
_SMOOTHING = 0.1


@dataclass(kw_only=True)
class _Known:
    seen_s: float
    work: float
    busy_s: float
    is_stale: bool = False
    """True: the next observation begins a window."""
    added_s: float
    """`busy_s`, added up over what the daemon worked on in parallel."""
    usual: tuple[float, float] = (0.0, 0.0)
    num_windows: int = 0
    slow_since_s: float | None = None
    share: float = 1.0


@dataclass
class Speeds:
    """The speeds of the daemons of one job, by name. `now_s`: seconds on any monotonic clock."""

    _known: dict[str, _Known] = field(default_factory=dict)

    def observe(self, name: str, *, work: float, busy_s: float, added_s: float, now_s: float) -> None:
        """Takes a daemon's totals: of work (tokens, steps), of the seconds in which it had work, and of these
        seconds added over what it worked on in parallel (at least `busy_s`)."""
        known = self._known.get(name)
        if known is None or work < known.work or busy_s < known.busy_s:  # new, or it counts from zero
            self._known[name] = _Known(seen_s=now_s, work=work, busy_s=busy_s, added_s=added_s)
            return
        known.seen_s = now_s
        if known.is_stale:
            known.work, known.busy_s, known.added_s, known.is_stale = work, busy_s, added_s, False
            return
        if busy_s - known.busy_s < WINDOW_S:
            return
        done = work - known.work
        speed = (done / (busy_s - known.busy_s), done / max(busy_s - known.busy_s, added_s - known.added_s))
        known.work, known.busy_s, known.added_s = work, busy_s, added_s
        self._judge(known, speed, now_s=now_s)

    def forget_window(self, name: str) -> None:
        """Begins a window anew: the daemon has stalled, which is a cause of another kind."""
        if (known := self._known.get(name)) is not None:
            known.is_stale = True

    def keep_only(self, names: Mapping[str, object]) -> None:
        """Forgets daemons that have left."""
        self._known = {name: known for name, known in self._known.items() if name in names}

    def slow(self) -> dict[str, str]:
        """Name -> how slow it is, for daemons that are slow."""
        return {
            name: f"{known.share:.0%} of its usual speed for {known.seen_s - known.slow_since_s:.0f} s"
            for name, known in self._known.items()
            if known.slow_since_s is not None
        }

    @staticmethod
    def _judge(known: _Known, speed: tuple[float, float], *, now_s: float) -> None:
        share = max((now / usual if usual else 1.0) for now, usual in zip(speed, known.usual, strict=True))
        limit = _SLOW if known.slow_since_s is None else _USUAL_AGAIN
        if known.num_windows >= _SETTLED and share < limit:
            known.share = share
            if known.slow_since_s is None:
                known.slow_since_s = now_s - WINDOW_S
            return  # what is slow now must not become the usual speed
        known.slow_since_s = None
        weight = max(_SMOOTHING, 1 / (known.num_windows + 1))
        known.usual = (
            known.usual[0] + weight * (speed[0] - known.usual[0]),
            known.usual[1] + weight * (speed[1] - known.usual[1]),
        )
        known.num_windows += 1
