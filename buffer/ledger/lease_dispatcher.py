"""Registration of rollout servers, their heartbeats, and the granting of leases to them."""

from __future__ import annotations

import heapq

from areal_like.wire.messages.producer import Lease, ServerHeartbeat
from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.state import LedgerState
from buffer.tables.lease_table import Server
from buffer.tickets import Ticket

MOST_UNPROVEN = 4
"""Leases of a server that has not delivered a sample yet, while another has."""


class LeaseDispatcher:
    """The ledger's operations for rollout servers, except deliveries of samples (`SampleIntake`)."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._tickets = state.tickets
        self._leases = state.leases
        self._evals = state.evals

    def register_server(self, name: str, *, incarnation: int, weights_version: int, now_s: float) -> None:
        """Registers a server. A new incarnation of a known name loses the leases of the old one.

        The caller has admitted the process (`IncarnationTable`).
        """
        lost = self._leases.register_server(
            name, incarnation=incarnation, weights_version=weights_version, now_s=now_s
        )
        self._leases.servers[name].is_cordoned = name in self._state.holds.cordoned
        self._lifecycle.lose_leases(lost)

    def remove_server(self, name: str) -> None:
        """A server left; its missing samples are leased again."""
        self._lifecycle.lose_leases(self._leases.remove_server(name))

    def heartbeat(self, name: str, beat: ServerHeartbeat, *, now_s: float) -> None:
        """Updates a registered server's state and credit, and renews its leases."""
        self._leases.heartbeat(name, beat, now_s=now_s)

    def return_leases(self, name: str, lease_ids: list[int]) -> None:
        """A server returned leases; their missing samples are leased again."""
        self._lifecycle.lose_leases(self._leases.return_leases(name, lease_ids))

    def take_back_undelivered(self, name: str, lease_ids: list[int]) -> None:
        """Leases could not be sent to a server. It gets no more leases until its next heartbeat."""
        self.return_leases(name, lease_ids)
        self._leases.clear_credit(name)

    def expire(self, *, now_s: float) -> list[str]:
        """Ends leases that were not renewed in time.

        Returns the names of silent servers, which are removed.
        """
        lost, silent = self._leases.expire(now_s=now_s)
        self._lifecycle.lose_leases(lost)
        return silent

    def grant(self, *, now_s: float) -> dict[str, list[Lease]]:
        """New leases by server: evaluations first, then waiting tickets, then new prompts.

        The server with the most free samples is served first, one ticket at a time, so that no server takes
        all of a small budget. One that has only said what it can do gets a few at first: it may hold all
        tickets of a job and make nothing of them. A sample that failed goes to another server if one can take
        it.
        """
        any_proven = False
        for server in self._leases.servers.values():
            server.health.end_backoff(now_s=now_s)
            any_proven |= server.health.has_delivered
        granted: dict[str, list[Lease]] = {}
        is_blocked = self._state.store.write_blocked_reason or not self._leases.may_grant
        if is_blocked or not self._may_have_work():
            return granted
        with_credit = [
            (-server.free_samples, name)
            for name, server in self._leases.servers.items()
            if _may_take_more(server, any_proven=any_proven)
        ]
        heapq.heapify(with_credit)
        while with_credit:
            server = self._pop_preferred(with_credit)
            weights_step = self._state.versions.step_of(server.weights_version)
            ticket = None if weights_step is None else self._next_for(server, weights_step)
            if ticket is None or weights_step is None:
                continue
            lease = self._lifecycle.lease(ticket, server, weights_step, now_s=now_s)
            granted.setdefault(server.name, []).append(lease)
            if _may_take_more(server, any_proven=any_proven):
                heapq.heappush(with_credit, (-server.free_samples, server.name))
        if granted:
            self._tickets.check_conservation()
        return granted

    def _pop_preferred(self, with_credit: list[tuple[int, str]]) -> Server:
        """Pops the server with the most free samples at which the next ticket did not fail last.

        If there is no such server: the one at which it failed.
        """
        best = heapq.heappop(with_credit)
        server = self._leases.servers[best[1]]
        if with_credit and self._next_failed_at(server) == server.name:
            server = self._leases.servers[heapq.heapreplace(with_credit, best)[1]]
        return server

    def _next_failed_at(self, server: Server) -> str:
        """The server at which the ticket failed last that this one would get next; empty: it did not."""
        ticket_id = self._evals.peek_next(server.weights_version)
        if ticket_id is None and self._is_open:
            ticket_id = self._state.admission.peek_waiting()
        return self._tickets.live[ticket_id].failed_at if ticket_id is not None else ""

    @property
    def _is_open(self) -> bool:
        is_open = not (self._state.closed_reason or self._state.holds.is_paused)
        return is_open and self._state.prompts.order.num_prompts > 0

    def _may_have_work(self) -> bool:
        return (self._is_open and self._state.admission.may_have_work()) or self._evals.has_queued

    def _next_for(self, server: Server, weights_step: int) -> Ticket | None:
        """The ticket that this server may take now, if any."""
        if (ticket_id := self._evals.take_next(server.weights_version)) is not None:
            return self._tickets.live[ticket_id]
        if not self._is_open:
            return None
        return self._state.admission.next_for(server, weights_step, issue=self._lifecycle.issue_train)


def _may_take_more(server: Server, *, any_proven: bool) -> bool:
    is_limited = any_proven and not server.health.has_delivered
    return server.free_samples > 0 and (not is_limited or len(server.leases) < MOST_UNPROVEN)
