"""Gathers the facts for the watchdog from ledger and peers, once a second."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from typing import Any

from areal_like.config import Config
from areal_like.runtime.metrics import Metrics
from areal_like.wire.messages.hello import Role
from areal_like.wire.messages.producer import Purpose
from buffer.diagnosis.bottleneck import PoolTotals
from buffer.diagnosis.facts import JobFacts, LeaseFacts, PeerFacts, ServerFacts, WaitLimits
from buffer.diagnosis.life_times import LifeTimes, Timeline, is_held_back
from buffer.diagnosis.watchdog import INTERVAL_S, Wakefulness, Watchdog
from buffer.ledger.ledger import Ledger
from buffer.service.peers import ConnectedPeers
from buffer.tables.lease_table import Server
from buffer.tickets import State, Ticket

_NUM_LEASES = 8
_LOST_S = 300.0
"""Seconds for which a server that was removed as silent is remembered, unless it comes back."""


class JobWatch:
    """The watchdog of one buffer. Times are those of its event loop."""

    def __init__(
        self, config: Config, metrics: Metrics, ledger: Ledger, peers: ConnectedPeers, *, now_s: float
    ) -> None:
        self._ledger = ledger
        self._peers = peers
        self._close_after = config.close_after
        self._contradicts_close = config.contradicts_close[0]
        self._watchdog = Watchdog(metrics, limits=WaitLimits.of(heartbeat_s=config.daemon.heartbeat_s))
        self._awake = Wakefulness(now_s=now_s)
        self._timeline = Timeline()
        LifeTimes(metrics, clock=time.monotonic).watch(ledger.state)
        self._lost: dict[str, float] = {}
        self._world_size = 0
        self._since: dict[str, float] = {}
        """Start time of each current problem of the buffer itself."""
        self._wait_s = 0.0
        self._reserved_s = 0.0
        self._looked_s = now_s
        self._due_s = now_s

    def lost(self, name: str, *, now_s: float) -> None:
        """Notes that a rollout server sent nothing and was removed."""
        self._lost[name] = now_s

    def tick(self, *, now_s: float, interval_s: float) -> None:
        """Call it whenever the buffer's timer fires; examines the job about once a second."""
        self._awake.tick(now_s=now_s, next_s=now_s + interval_s)
        self._timeline.look(self._ledger.state)
        if now_s < self._due_s:
            return
        self._due_s = now_s + INTERVAL_S
        facts = self.facts(now_s=now_s)
        ranks = self._peers.of(Role.TRAINER)
        waits = [peer.waits for peer in ranks]
        if any(name.startswith("buffer: ") for wait in waits for name in wait):
            self._wait_s += now_s - self._looked_s
            if is_held_back(self._ledger.state):
                self._ledger.state.counters.count("held_back_s", now_s - self._looked_s)
            self._reserved_s += (now_s - self._looked_s) * facts.is_reserving
        self._looked_s = now_s
        self._watchdog.look(
            facts,
            load=PoolTotals(
                at_s=now_s,
                wait_s=self._wait_s,
                reserved_s=self._reserved_s,
                busy_s=self._peers.total("busy_s"),
                idle_s=self._peers.total("idle_s"),
                starved_s=self._peers.total("starved_s"),
            ),
            max_staleness=self._ledger.state.bound.current,
        )

    def report(self) -> dict[str, Any]:
        """`why` in /status."""
        return self._watchdog.report()

    def facts(self, *, now_s: float) -> JobFacts:
        ledger, state = self._ledger, self._ledger.state
        servers = ledger.servers
        self._lost = {
            name: lost_s
            for name, lost_s in self._lost.items()
            if name not in servers and now_s - lost_s < _LOST_S
        }
        ranks = self._peers.of(Role.TRAINER)
        self._world_size = max((peer.hello.world_size for peer in ranks), default=self._world_size)
        return JobFacts(
            servers=tuple(self._servers(now_s=now_s)),
            ranks=tuple(
                PeerFacts(
                    name=peer.hello.name,
                    silent_s=self._awake.silent_s(peer.last_heard_s, now_s=now_s),
                    state=peer.state,
                    waits=peer.waits,
                    stats=peer.stats,
                )
                for peer in ranks
            ),
            world_size=self._world_size,
            open_step=state.scheduler.step,
            num_recorded=state.scheduler.position,
            num_groups=state.settings.groups_per_step,
            group_size=state.settings.group_size,
            overdue=state.settings.overdue,
            close_after=self._close_after,
            contradicts_close=self._contradicts_close,
            num_ready=state.tickets.count(Purpose.TRAIN, State.READY),
            num_parts=state.parts.num_loose,
            trainer_step=ledger.state.steps.current,
            oldest_leases=tuple(self._oldest_leases(now_s=now_s)),
            lost_servers={name: now_s - lost_s for name, lost_s in self._lost.items()},
            store_trouble=ledger.state.store.write_blocked_reason,
            store_trouble_s=self._lasting(
                "store", bool(ledger.state.store.write_blocked_reason), now_s=now_s
            ),
            paused_s=self._lasting("paused", state.holds.is_paused, now_s=now_s),
            closed_s=self._lasting("closed", bool(ledger.state.closed_reason), now_s=now_s),
            is_finished=ledger.state.is_finished,
            loop_late_s=self._awake.late_s,
        )

    def _servers(self, *, now_s: float) -> Iterator[ServerFacts]:
        for name, server in self._ledger.servers.items():
            peer = self._peers.named(name)
            if peer is None:  # of an earlier buffer, and it has not registered yet
                continue
            yield ServerFacts(
                name=name,
                silent_s=self._awake.silent_s(peer.last_heard_s, now_s=now_s),
                state=server.state.value,
                waits=peer.waits,
                stats=peer.stats,
                held_back=_held_back(server),
                lies=_lies(server),
            )

    def _oldest_leases(self, *, now_s: float) -> Iterator[LeaseFacts]:
        state = self._ledger.state
        train = (
            lease
            for lease in state.leases.live.values()
            if state.tickets.live[lease.ticket_id].purpose is Purpose.TRAIN
        )
        for lease in heapq.nsmallest(_NUM_LEASES, train, key=lambda lease: lease.granted_s):
            ticket = state.tickets.live[lease.ticket_id]
            yield LeaseFacts(
                ticket_id=lease.ticket_id,
                server=lease.server,
                age_s=max(0.0, now_s - lease.granted_s),
                is_due=self._is_due(ticket),
                is_late=ticket.state is State.CLOSED,
            )

    def _is_due(self, ticket: Ticket) -> bool:
        """True if no step after the open one may train on the group; with `close` none is due."""
        state, oldest_step = self._ledger.state, ticket.oldest_possible_step
        if state.settings.overdue == "close" or oldest_step is None:
            return False
        deadline = state.bound.deadline(oldest_step, max_staleness=ticket.max_staleness)
        return deadline <= state.scheduler.step

    def _lasting(self, name: str, is_so: bool, *, now_s: float) -> float:
        """Seconds for which a condition has held; 0 if it does not hold."""
        if not is_so:
            self._since.pop(name, None)
            return 0.0
        return now_s - self._since.setdefault(name, now_s)


def _lies(server: Server) -> str:
    quarantine = server.health.quarantine
    return quarantine.reason if quarantine is not None and quarantine.is_for_lies else ""


def _held_back(server: Server) -> str:
    if server.is_cordoned:
        return "cordoned by an operator"
    quarantine = server.health.quarantine
    return f"quarantined ({quarantine.reason})" if quarantine is not None else ""
