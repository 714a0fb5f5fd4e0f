"""Which train ticket a server may take now: one that came back and waits, or a new one.

A server with weights of step s may take a ticket while everything ready and running fits into the free places of the steps up to
deadline(s) (`bounds.py`), and of the run. A place that was emptied in a step that a trainer does again is free however far later steps are
recorded. A ticket that has begun has a deadline already and goes before those that have not; a new one is issued
only when none waits, because it would take the oldest ticket's budget, and on a small server its slots.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from areal_like.wire.messages.producer import Purpose
from buffer.scheduling.staleness import StalenessBound
from buffer.scheduling.step_scheduler import StepScheduler
from buffer.settings import LedgerSettings
from buffer.tables.leases import Server
from buffer.tables.ticket_table import TicketTable
from buffer.tickets import State, Ticket


class Admission:
    """Reads the books of others; its own are the tickets that wait."""

    def __init__(
        self,
        settings: LedgerSettings,
        *,
        register: TicketTable,
        recorder: StepScheduler,
        bound: StalenessBound,
    ) -> None:
        self._settings = settings
        self._register = register
        self._recorder = recorder
        self._bound = bound
        self._waiting: list[tuple[bool, int]] = []
        """Heap of train tickets with unleased samples: those that have begun first (they have deadlines), the oldest first. An entry that
        no longer says what is so is skipped."""

    def wait(self, ticket: Ticket) -> None:
        """Samples of this ticket have to be leased again."""
        heapq.heappush(self._waiting, (ticket.floor is None, ticket.ticket_id))

    @property
    def waiting(self) -> list[int]:
        """Tickets that wait, in the order in which they will be taken."""
        return [
            ticket_id for begins, ticket_id in sorted(set(self._waiting)) if self._waits(begins, ticket_id)
        ]

    def has_work(self) -> bool:
        """Cheap test before servers are looked at. No weights are newer than the open step, so it finds as many places as any."""
        return bool(self._waiting) or self._num_to_place() < self._num_places(self._recorder.step)

    def next_for(self, server: Server, weights_step: int, *, issue: Callable[[], Ticket]) -> Ticket | None:
        """The ticket that this server may take, with weights of this step, if any. `issue`: makes a new one."""
        while self._waiting and not self._waits(*self._waiting[0]):
            heapq.heappop(self._waiting)
        if self._waiting:
            return self._take_waiting(server, weights_step)
        num_samples = self._settings.group_size + self._settings.num_greedy
        may_issue = self._num_to_place() < self._num_places(weights_step) and server.can_take(num_samples)
        return issue() if may_issue else None

    def _take_waiting(self, server: Server, weights_step: int) -> Ticket | None:
        begins, ticket_id = self._waiting[0]
        ticket = self._register.live[ticket_id]
        # The deadline of one that begins is set now, as if it were new.
        max_staleness = self._bound.max_staleness if begins else ticket.max_staleness
        # Others that have not begun get their deadlines later, each in its turn. If they counted, then after the bound was
        # lowered they could forbid one another for ever.
        num_with_deadline = self._num_to_place() - self._recorder.num_without_deadline + begins
        lowers_floor = ticket.floor is None or weights_step < ticket.floor
        finds_no_place = lowers_floor and num_with_deadline > self._num_places(
            weights_step, max_staleness=max_staleness
        )
        if finds_no_place or not server.can_take(len(ticket.unleased)):
            return None
        heapq.heappop(self._waiting)
        ticket.max_staleness = max_staleness
        return ticket

    def _waits(self, begins: bool, ticket_id: int) -> bool:
        ticket = self._register.live.get(ticket_id)
        return ticket is not None and bool(ticket.unleased) and begins == (ticket.floor is None)

    def _num_to_place(self) -> int:
        """Groups that will need a place: ready or running."""
        return self._register.count(Purpose.TRAIN, State.QUEUED, State.LEASED, State.READY)

    def _num_places(self, weights_step: int, *, max_staleness: int | None = None) -> int:
        """Places for what a server with weights of this step samples: free ones in the run's steps within its bound.

        `max_staleness`: of a ticket that was issued before; None: of a new one.
        """
        max_staleness = self._bound.max_staleness if max_staleness is None else max_staleness
        deadline = self._bound.deadline(weights_step, max_staleness=max_staleness)
        return self._recorder.num_free_before(min(deadline + 1, self._settings.num_steps))
