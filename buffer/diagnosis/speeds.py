"""Detects a daemon that works, but far slower than before. Pure: times are arguments.

An engine has two speeds, its tokens per second while it has requests, in total and per request; the speed of
a trainer is its steps per second of work. The daemon itself counts its working time, because sampling its
state at heartbeats would miss steps that are shorter than the interval. Each daemon is compared with its own
mean over earlier windows: machines, models and lengths differ too much to compare daemons with one another.
More concurrent requests lower the speed per request, and fewer lower the total; so an engine is slow only if
both have fallen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW_S = 4.0
"""Seconds over which a speed is measured: several heartbeats, and several tokens of a slow engine."""
_SLOW = 0.25
"""Fraction of the usual speed below which a daemon is slow. Varying lengths of completions change it by
less."""
_USUAL_AGAIN = 0.4
"""Fraction above which a slow daemon is no longer slow."""
_SETTLED = 4
"""Number of windows before a speed counts as usual."""
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
        """Adds a daemon's totals: its work (tokens, steps), the seconds in which it had work, and these
        seconds summed over its parallel tasks (at least `busy_s`)."""
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
        """Starts a new window: the daemon has stalled, which is a different kind of cause."""
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
            return  # a slow speed must not become the usual one
        known.slow_since_s = None
        weight = max(_SMOOTHING, 1 / (known.num_windows + 1))
        known.usual = (
            known.usual[0] + weight * (speed[0] - known.usual[0]),
            known.usual[1] + weight * (speed[1] - known.usual[1]),
        )
        known.num_windows += 1
