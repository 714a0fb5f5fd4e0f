"""What has happened within the last minute, and since when each server has its weights.

Pure: counters and times come in. A buffer that has just started knows less than a minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from buffer.ledger.snapshot import LedgerSnapshot
from buffer.tables.lease_table import Server

WINDOW_S = 60.0
_INTERVAL_S = 1.0
_SHORTEST_S = 0.5
"""Rates over less time say nothing."""
_PER_S = ("samples", "tokens_generated", "tokens_trained")
_PER_MIN = ("steps", "drops")


class RateWindow:
    """Rates of counters over the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def see(self, counters: Mapping[str, float], *, now_s: float) -> None:
        """Takes the values of the counters now; call it more often than once a second."""
        if self._seen and now_s < self._seen[-1][0] + _INTERVAL_S:
            return
        self._seen.append((now_s, dict(counters)))
        # The first entry is the newest one that is at least WINDOW_S old.
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - WINDOW_S:
            self._seen.popleft()

    def rate(self, name: str, value: float, *, now_s: float) -> float | None:
        """Increase of a counter per second, `value` being its value now; None if it is not known yet."""
        if not self._seen or now_s - self._seen[0][0] < _SHORTEST_S:
            return None
        since_s, first = self._seen[0]
        # A trainer that resumes at an earlier step makes some counters smaller.
        return max(0.0, value - first.get(name, 0.0)) / (now_s - since_s)

    def seconds(self, *, now_s: float) -> float:
        """Length of the window."""
        return now_s - self._seen[0][0] if self._seen else 0.0


class RecentNumbers:
    """The part of /status about the last minute."""

    def __init__(self) -> None:
        self._window = RateWindow()
        self._weights: dict[str, tuple[int, float]] = {}
        """By server: version of its weights, and when it was first seen with them."""

    def see(
        self,
        snapshot: LedgerSnapshot,
        counters: Mapping[str, float],
        servers: Mapping[str, Server],
        *,
        now_s: float,
    ) -> None:
        """Takes the numbers as they are now. `counters`: the ledger's and those of servers' heartbeats."""
        self._window.see(_counters(snapshot, counters), now_s=now_s)
        before, self._weights = self._weights, {}
        for name, server in servers.items():
            known = before.get(name)
            is_same = known is not None and known[0] == server.weights_version
            self._weights[name] = known if known and is_same else (server.weights_version, now_s)

    def rates(
        self, snapshot: LedgerSnapshot, counters: Mapping[str, float], *, now_s: float
    ) -> dict[str, float | None]:
        """Rates for /status; None until they are known."""
        values = _counters(snapshot, counters)
        rates: dict[str, float | None] = {
            "window_s": round(min(WINDOW_S, self._window.seconds(now_s=now_s)), 1)
        }
        for names, suffix, scale in ((_PER_S, "per_s", 1.0), (_PER_MIN, "per_min", 60.0)):
            for name in names:
                rate = self._window.rate(name, values[name], now_s=now_s)
                rates[f"{name}_{suffix}"] = None if rate is None else round(rate * scale, 3)
        return rates

    def of_server(self, server: Server, *, newest_version: int, now_s: float) -> dict[str, Any]:
        """Leases and weights of one server, for its entry in /status."""
        version, since_s = self._weights.get(server.name, (server.weights_version, now_s))
        granted_s = [lease.granted_s for lease in server.leases.values()]
        return {
            "leases": len(granted_s),
            "oldest_lease_s": round(now_s - min(granted_s), 3) if granted_s else None,
            "weights_age_s": round(now_s - since_s, 3) if version == server.weights_version else 0.0,
            "versions_behind": max(0, newest_version - server.weights_version),
        }


def _counters(snapshot: LedgerSnapshot, counters: Mapping[str, float]) -> dict[str, float]:
    return {
        "samples": counters["samples_accepted"],
        "tokens_generated": counters["tokens_generated"],
        "tokens_trained": counters["tokens_trained"],
        "steps": snapshot.trainer_step,
        "drops": sum(snapshot.drops.values()),
    }
