"""Registration of rollout servers, their heartbeats, and the granting of leases to them.

Servers report the fingerprint of their task's content when they register; the directory of peers admits only
those that agree with the first one. The ledger remembers the fingerprint. If it has changed since an earlier
buffer, prompt indices refer to other prompts: tickets that are issued but not recorded are cancelled, and the
order of prompts and the curriculum restart. Recorded groups contain their prompts' tokens, so they are
trained on. (A changed configuration of the task is detected when the buffer starts, and handled when a
trainer starts.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from areal_like.wire.messages.producer import Lease, Purpose, ServerHeartbeat
from buffer.ledger.lifecycle import TicketRules
from buffer.tables.lease_table import Server
from buffer.tables.server_order import FRONT, Place
from buffer.tickets import Drop, State

log = logging.getLogger(__name__)

CONTENT = "shape:content"
"""Scalar with the content under which prompts were issued; 0 or absent: not known (an earlier release)."""
MOST_UNPROVEN = 4
"""Maximum leases of a server that has not delivered a sample yet, while another server has."""


class LeaseDispatcher(TicketRules):
    """The ledger's operations for rollout servers, except deliveries of samples (`SampleIntake`)."""

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

    def set_content(self, content: int) -> None:
        """Sets the fingerprint of the content of the servers' task, a positive number; 0: not known."""
        state = self._state
        if not content or content == state.content:
            return
        before, state.content = state.content, content
        state.store.put_scalar(CONTENT, content)
        if not before:
            return
        log.warning("the data of the task has changed: its prompts are issued from the beginning")
        # For a trainer that starts later: the position in its checkpoint refers to the old data.
        state.prompts_changed = state.prompts_changed or bool(state.closed_reason)
        for ticket in state.tickets.of_purpose(Purpose.TRAIN):
            if ticket.state is not State.BATCHED:
                self._lifecycle.drop(ticket, Drop.CANCELLED)
        state.prompts.restart(cursor=0, pending=[])
        state.prompts.forget_outcomes()

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
        all of a small budget. A server that has not delivered anything yet gets only a few at first:
        otherwise it could hold all tickets of a job and deliver none of them. A failed sample goes to another
        server if one can take it.

        Each server has one turn in the order, and another one for each lease that it gets. Servers that
        cannot take anything are skipped, so the time of a grant depends on the number of its leases.
        """
        granted: dict[str, list[Lease]] = {}
        self._leases.end_backoffs(now_s=now_s)
        if self._state.failure_reason or self._store.write_blocked_reason or not self._leases.may_grant:
            return granted
        any_proven = any(server.health.has_delivered for server in self._leases.servers.values())
        passed, kept = FRONT, None
        while needs := self._needs():
            able = self._able(passed, kept, needs, any_proven=any_proven)
            first = server = next(able, None)
            if first is not None and self._next_failed_at(first) == first.name:
                server = next(able, first)
            if first is None or server is None:
                break
            if server is not kept:
                passed = (-server.free_samples, server.name)
            granted.setdefault(server.name, []).append(self._lease(server, now_s=now_s))
            # The server keeps its turn: its next ticket may be one that did not fail there.
            kept = first if (-first.free_samples, first.name) < passed else None
        if granted:
            self._lifecycle.record_ready_groups()  # a group that begins may be due to be closed at once
        return granted

    def _needs(self) -> dict[int, int]:
        """Version of servers' weights -> samples of their next ticket, without versions that get none.

        A server takes a part of an evaluation's ticket, but a train ticket as a whole.
        """
        needs = {}
        is_open = self._is_open
        for version in self._leases.order.versions:
            weights_step = self._versions.step_of(version)
            if weights_step is None:
                continue
            if self._evals.peek_next(version) is not None:
                needs[version] = 1
            elif is_open and (num_samples := self._state.admission.next_size(weights_step)):
                needs[version] = num_samples
        return needs

    def _able(
        self, passed: Place, kept: Server | None, needs: Mapping[int, int], *, any_proven: bool
    ) -> Iterator[Server]:
        """Servers that can take their next ticket, in order: `kept`, and those after position `passed`."""
        if kept is not None and (num_samples := needs.get(kept.weights_version)) is not None:
            can_take = kept.free_samples >= num_samples or not kept.leases
            if can_take and _may_take_more(kept, any_proven=any_proven):
                yield kept
        place = self._leases.order.first(passed, needs)
        while place is not None:
            server = self._leases.servers[place[1]]
            if _may_take_more(server, any_proven=any_proven):
                yield server
            place = self._leases.order.first(place, needs)

    def _next_failed_at(self, server: Server) -> str:
        """The server at which this server's next ticket failed last; empty: it did not fail."""
        ticket_id = self._evals.peek_next(server.weights_version)
        if ticket_id is None:
            ticket_id = self._state.admission.peek_waiting()
        return self._tickets.live[ticket_id].failed_at if ticket_id is not None else ""

    @property
    def _is_open(self) -> bool:
        is_open = not (self._state.closed_reason or self._state.holds.is_paused)
        return is_open and self._state.prompts.order.num_prompts > 0

    def _lease(self, server: Server, *, now_s: float) -> Lease:
        """Leases the next ticket for this server's weights to it."""
        weights_step = self._versions.step_of(server.weights_version)
        assert weights_step is not None
        if (ticket_id := self._evals.take_next(server.weights_version)) is not None:
            ticket = self._tickets.live[ticket_id]
        else:
            ticket = self._state.admission.take(issue=self._lifecycle.issue_train)
        return self._lifecycle.lease(ticket, server, weights_step, now_s=now_s)


def _may_take_more(server: Server, *, any_proven: bool) -> bool:
    is_limited = any_proven and not server.health.has_delivered
    return server.free_samples > 0 and (not is_limited or len(server.leases) < MOST_UNPROVEN)
