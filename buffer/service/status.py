"""The buffer's numbers for /status and for the trainer's `GetRunCounters`.

Also the events of the last minute, and since when each server has had its weights. Pure: times are arguments.
A buffer that has just started covers less than a minute.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

from areal_like.config import Config
from areal_like.promise import promise
from areal_like.selection import selection_report
from areal_like.wire.messages import consumer
from areal_like.wire.messages.hello import Role
from buffer.ledger.ledger import Ledger
from buffer.ledger.state import LedgerState
from buffer.service.peers import ConnectedPeers
from buffer.tables.lease_table import Server
from buffer.tickets import Drop

WINDOW_S = 60.0
_INTERVAL_S = 1.0
_SHORTEST_S = 0.5
"""Shortest time, in seconds, over which rates are meaningful."""
_PER_S = ("samples", "tokens_generated", "tokens_trained")
_PER_MIN = ("steps", "drops")
_MAX_CHANGES = 50
"""Number of newest rows of the table of settings in /status."""


class RateWindow:
    """Rates of counters over the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def see(self, counters: Mapping[str, float], *, now_s: float) -> None:
        """Records the current values of the counters; call it more often than once a second."""
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
        return now_s - self._seen[0][0] if self._seen else 0.0


class RecentNumbers:
    """The part of /status about the last minute."""

    def __init__(self) -> None:
        self._window = RateWindow()
        self._weights: dict[str, tuple[int, float]] = {}
        """By server: version of its weights, and when it was first seen with them."""

    def see(self, state: LedgerState, counters: Mapping[str, float], *, now_s: float) -> None:
        """Records the current numbers. `counters`: `stream_counters`."""
        self._window.see(_counted(state, counters), now_s=now_s)
        before, self._weights = self._weights, {}
        for name, server in state.leases.servers.items():
            known = before.get(name)
            is_same = known is not None and known[0] == server.weights_version
            self._weights[name] = known if known and is_same else (server.weights_version, now_s)

    def rates(
        self, state: LedgerState, counters: Mapping[str, float], *, now_s: float
    ) -> dict[str, float | None]:
        """Rates for /status; None until they are known."""
        values = _counted(state, counters)
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


def _counted(state: LedgerState, counters: Mapping[str, float]) -> dict[str, float]:
    return {
        "samples": counters["samples_accepted"],
        "tokens_generated": counters["tokens_generated"],
        "tokens_trained": counters["tokens_trained"],
        "steps": state.steps.current,
        "drops": state.drops.total(),
    }


def stream_counters(state: LedgerState, peers: ConnectedPeers, *, received_bytes: int) -> dict[str, float]:
    """The ledger's counters, and the counters that servers report in heartbeats."""
    counters = state.counters.summary()
    # Engines also count the tokens of aborted requests, which never become samples.
    counters["tokens_generated"] = max(counters["tokens_generated"], peers.total("tokens_generated"))
    counters["generation_busy_s"] = peers.total("busy_s")
    counters["generation_idle_s"] = peers.total("idle_s")
    counters["received_bytes"] = received_bytes
    return counters


def run_counters(state: LedgerState, peers: ConnectedPeers, *, received_bytes: int) -> consumer.RunCounters:
    """Tickets by state, drops by reason, and counters of the whole run."""
    tickets = {one.value: count for one, count in state.tickets.num_by_state().items()}
    return consumer.RunCounters(
        tickets=tickets | {"issued": state.tickets.num_issued},
        drops={reason.value: state.drops[reason] for reason in Drop},
        counters=stream_counters(state, peers, received_bytes=received_bytes),
    )


def status(
    config: Config,
    ledger: Ledger,
    peers: ConnectedPeers,
    *,
    now_s: float,
    received_bytes: int,
    refused: dict[str, int],
    num_fetches: int,
    recent: RecentNumbers,
    why: dict[str, Any],
) -> dict[str, Any]:
    """The body of /status. `refused`: counts of refused messages and connections, by name; `recent`: the last
    minute; `why`: who waits on whom."""
    state = ledger.state
    totals = run_counters(state, peers, received_bytes=received_bytes)
    return {
        "step": state.steps.current,
        "committed_steps": state.steps.committed + 1,
        "max_staleness": state.bound.current,
        "bound": promise(config, max_staleness=state.bound.current),
        "parts": {"waiting": state.parts.num_loose, "late_running": state.parts.num_late},
        "open_step": {
            "step": state.scheduler.step,
            "recorded": state.scheduler.position,
            "due_and_running": state.scheduler.num_due,
        },
        "newest_version": state.versions.newest,
        "curriculum": state.prompts.curriculum.status() if state.prompts.curriculum else None,
        "paused": state.holds.is_paused,
        "cordoned": sorted(state.holds.cordoned),
        "changes": [dataclasses.asdict(row) for row in state.live.rows[-_MAX_CHANGES:]],
        "closed_because": state.closed_reason,
        "store_trouble": state.store.write_blocked_reason,
        "trainers_lost": {
            str(step): {
                "starts": num_starts,
                "tickets": [ticket.ticket_id for ticket in state.steps.tickets_of(step)],
            }
            for step, num_starts in sorted(state.steps.attempts.items())
        },
        "failed_because": state.failure_reason,
        "tickets": totals.tickets,
        "drops": totals.drops,
        "last_rejection": ledger.intake.last_rejection,
        "counters": totals.counters,
        "rates": recent.rates(state, totals.counters, now_s=now_s),
        "selection": selection_report(totals.counters),
        "lag_histogram": {str(lag): count for lag, count in sorted(state.counters.lag_histogram.items())},
        "fetches_waiting": num_fetches,
        "why": why,
        "buffer_bytes": state.store.num_bytes,
        **refused,
        "peers": _peers_status(
            state.leases.servers, peers, recent, newest_version=state.versions.newest, now_s=now_s
        ),
    }


def _peers_status(
    servers: Mapping[str, Server],
    peers: ConnectedPeers,
    recent: RecentNumbers,
    *,
    newest_version: int,
    now_s: float,
) -> list[dict[str, Any]]:
    entries = []
    for role in Role:
        for peer in peers.of(role):
            entry: dict[str, Any] = {
                "name": peer.hello.name,
                "role": role.value,
                "state": peer.state,
                "http": peer.hello.http_address,
                **({"sessions": peer.hello.sessions_url} if peer.hello.sessions_url else {}),
                "silent_s": round(now_s - peer.last_heard_s, 3),
                "stats": peer.stats,
                "waits": peer.waits,
                "key": peer.key.name if peer.key is not None else "",
            }
            if (server := servers.get(peer.hello.name)) is not None:
                entry["weights_version"] = server.weights_version
                entry["free_samples"] = server.free_samples
                entry["owed_samples"] = server.owed_samples
                entry |= recent.of_server(server, newest_version=newest_version, now_s=now_s)
                if (quarantine := server.health.quarantine) is not None:
                    entry["quarantine"] = {
                        "reason": quarantine.reason,
                        "rest_s": round(max(0.0, quarantine.until_s - now_s), 3),
                    }
            entries.append(entry)
    return entries
