"""The buffer's numbers for /status and for the trainer's `GetRunCounters`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from areal_like.selection import selection_report
from areal_like.wire.messages import consumer
from areal_like.wire.messages.hello import Role
from buffer.ledger.ledger import Ledger
from buffer.ledger.snapshot import LedgerSnapshot
from buffer.rates import RecentNumbers
from buffer.service.peers import ConnectedPeers
from buffer.tables.lease_table import Server

_MAX_CHANGES = 50
"""Rows of the table of settings in /status, the newest."""


def stream_counters(
    snapshot: LedgerSnapshot, peers: ConnectedPeers, *, received_bytes: int
) -> dict[str, float]:
    """The ledger's counters, and the counters that servers report in heartbeats."""
    counters = dict(snapshot.counters)
    # Engines also count the tokens of aborted requests, which never become samples.
    counters["tokens_generated"] = max(counters["tokens_generated"], peers.total("tokens_generated"))
    counters["generation_busy_s"] = peers.total("busy_s")
    counters["generation_idle_s"] = peers.total("idle_s")
    counters["received_bytes"] = received_bytes
    return counters


def run_counters(
    snapshot: LedgerSnapshot, peers: ConnectedPeers, *, received_bytes: int
) -> consumer.RunCounters:
    """Tickets by state, drops by reason, and counters of the whole run."""
    tickets = {state.value: count for state, count in snapshot.num_by_state.items()}
    return consumer.RunCounters(
        tickets=tickets | {"issued": snapshot.num_issued},
        drops={reason.value: count for reason, count in snapshot.drops.items()},
        counters=stream_counters(snapshot, peers, received_bytes=received_bytes),
    )


def status(
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
    snapshot = ledger.snapshot()
    totals = run_counters(snapshot, peers, received_bytes=received_bytes)
    return {
        "step": snapshot.trainer_step,
        "committed_steps": snapshot.committed_steps,
        "max_staleness": snapshot.max_staleness,
        "open_step": {
            "step": snapshot.open_step,
            "recorded": snapshot.open_position,
            "due_and_running": snapshot.num_due,
        },
        "newest_version": snapshot.newest_version,
        "curriculum": snapshot.curriculum.status if snapshot.curriculum else None,
        "paused": ledger.state.holds.is_paused,
        "cordoned": sorted(ledger.state.holds.cordoned),
        "changes": [dataclasses.asdict(row) for row in ledger.state.live.rows[-_MAX_CHANGES:]],
        "closed_because": snapshot.closed_reason,
        "store_trouble": snapshot.write_blocked_reason,
        "trainers_lost": {
            str(step): {"starts": attempts.num_starts, "tickets": attempts.ticket_ids}
            for step, attempts in snapshot.attempts.items()
        },
        "failed_because": ledger.state.failure_reason,
        "tickets": totals.tickets,
        "drops": totals.drops,
        "last_rejection": ledger.intake.last_rejection,
        "counters": totals.counters,
        "rates": recent.rates(snapshot, totals.counters, now_s=now_s),
        "selection": selection_report(totals.counters),
        "lag_histogram": {str(lag): count for lag, count in sorted(snapshot.lag_histogram.items())},
        "fetches_waiting": num_fetches,
        "why": why,
        "buffer_bytes": snapshot.num_bytes,
        **refused,
        "peers": _peers_status(
            ledger.servers, peers, recent, newest_version=snapshot.newest_version, now_s=now_s
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
