"""The admission gate: chooses the train ticket that a server may take now, a waiting ticket or a new one.

A server with weights of step s may take a ticket while all ready and running groups fit into the free
positions of the steps up to deadline(s) (`staleness.py`) and up to the end of the run. A position that was
freed in a step that a trainer repeats counts as free, no matter how many later steps are recorded. Waiting
tickets with a sample or lease have a deadline already and are leased before those without. A new ticket is
issued only if no ticket waits, because it would take the oldest ticket's budget and, on a small server, its
slots.

With `buffer.overdue=close` the age of tokens is bounded when a position is recorded, and admission only has
to keep both pools busy. A new group may begin while

* the complete samples that can be recorded fill less than INVENTORY steps: more of them would only grow old;
* all groups that are not closed, and the parts that wait, fit into the positions of the next `close_after`
  steps: otherwise, when the trainer is the slower pool, groups would be too many to be complete in time. Late
  samples do not count, so they never hold back others;
* all of these, late samples included, fit into the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from areal_like.wire.messages.producer import Purpose
from buffer.scheduling.staleness import StalenessBound
from buffer.scheduling.step_scheduler import StepScheduler
from buffer.settings import LedgerSettings
from buffer.tables.parts import PartTable
from buffer.tables.ticket_table import TicketTable
from buffer.tickets import State, Ticket

INVENTORY = 1.5
"""Steps for which complete samples may wait. With one step's worth and small steps, the trainer waits for
the groups that happen to be slower; with two, tokens are half a step older for nothing."""


class Admission:
    """The queue of waiting tickets, and the budget for new ones."""

    def __init__(
        self,
        settings: LedgerSettings,
        *,
        tickets: TicketTable,
        parts: PartTable,
        scheduler: StepScheduler,
        bound: StalenessBound,
    ) -> None:
        self._settings = settings
        self._tickets = tickets
        self._parts = parts
        self._scheduler = scheduler
        self._bound = bound
        self._waiting: list[tuple[bool, int]] = []
        """Heap of (has not begun, ticket id) of train tickets with unleased samples. A ticket has begun when
        it has a sample or lease, and so a deadline, or is closed. These come first, then the oldest; outdated
        entries are skipped."""

    def add_waiting(self, ticket: Ticket) -> None:
        """Queues a ticket with samples that have to be leased again."""
        heapq.heappush(self._waiting, (_has_not_begun(ticket), ticket.ticket_id))

    @property
    def waiting(self) -> list[int]:
        """Ids of waiting tickets, in the order in which they will be leased."""
        return [
            ticket_id
            for not_begun, ticket_id in sorted(set(self._waiting))
            if self._is_waiting(not_begun, ticket_id)
        ]

    def peek_waiting(self) -> int | None:
        """Id of the ticket that will be leased next, if one is waiting."""
        while self._waiting and not self._is_waiting(*self._waiting[0]):
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def next_size(self, weights_step: int) -> int:
        """Missing samples of the ticket that a server with weights of this step may take now; 0: none.

        The server takes all of them, or leaves the ticket to another one.
        """
        ticket_id = self.peek_waiting()
        ticket = None if ticket_id is None else self._tickets.live[ticket_id]
        may_take = (
            self._may_close(ticket, weights_step)
            if self._settings.closes
            else self._may_take(ticket, weights_step)
        )
        if not may_take:
            return 0
        return len(ticket.unleased) if ticket else self._settings.group_size + self._settings.num_greedy

    def take(self, *, issue: Callable[[], Ticket]) -> Ticket:
        """Takes the ticket whose size `next_size` returned. `issue` makes a new one."""
        if self.peek_waiting() is None:
            return issue()
        not_begun, ticket_id = heapq.heappop(self._waiting)
        ticket = self._tickets.live[ticket_id]
        if not_begun:
            ticket.max_staleness = self._bound.current
        return ticket

    @property
    def is_inventory_full(self) -> bool:
        """True while complete samples fill INVENTORY steps, so that no new group begins."""
        settings = self._settings
        num_complete = self._num_ready_samples() + self._parts.num_loose
        return num_complete >= INVENTORY * settings.groups_per_step * settings.group_size

    def _may_take(self, ticket: Ticket | None, weights_step: int) -> bool:
        if ticket is None:
            return self._num_unrecorded() < self._num_free_positions(weights_step)
        oldest_step = ticket.oldest_possible_step
        if oldest_step is not None and weights_step >= oldest_step:
            return True
        # It would get an earlier deadline. A ticket that begins now gets its deadline now, like a new ticket.
        not_begun = _has_not_begun(ticket)
        max_staleness = self._bound.current if not_begun else ticket.max_staleness
        # Other tickets that have not begun get their deadlines later, one after the other. If they
        # counted here, they could block each other forever after the bound was lowered.
        num_with_deadline = self._num_unrecorded() - self._scheduler.num_without_deadline + not_begun
        return num_with_deadline <= self._num_free_positions(weights_step, max_staleness=max_staleness)

    def _may_close(self, ticket: Ticket | None, weights_step: int) -> bool:
        """As `_may_take`, if groups are closed."""
        bound, size = self._bound.current, self._settings.group_size
        if weights_step < self._scheduler.num_full_steps - bound:
            return False  # its tokens would be too old at once
        if ticket is not None and not _has_not_begun(ticket):
            return True
        num_open = self._num_unrecorded() - (ticket is not None)
        num_samples = num_open * size + self._parts.num_loose
        num_free = self._num_free_positions(
            weights_step, max_staleness=min(self._settings.close_after, bound)
        )
        num_left = self._scheduler.num_free_before(self._settings.num_steps)
        return (
            not self.is_inventory_full
            and num_samples < num_free * size
            and num_samples + self._parts.num_late < num_left * size
        )

    def _is_waiting(self, not_begun: bool, ticket_id: int) -> bool:
        ticket = self._tickets.live.get(ticket_id)
        if ticket is None or not ticket.unleased:
            return False
        return not_begun == _has_not_begun(ticket)

    def _num_unrecorded(self) -> int:
        """Groups that will need a position: ready or running."""
        return self._tickets.count(Purpose.TRAIN, State.QUEUED, State.LEASED, State.READY)

    def _num_ready_samples(self) -> int:
        return self._tickets.count(Purpose.TRAIN, State.READY) * self._settings.group_size

    def _num_free_positions(self, weights_step: int, *, max_staleness: int | None = None) -> int:
        """Free positions at which a group with weights of this step can be recorded.

        `max_staleness`: the ticket's bound; None: the current bound.
        """
        max_staleness = self._bound.current if max_staleness is None else max_staleness
        deadline = self._bound.deadline(weights_step, max_staleness=max_staleness)
        return self._scheduler.num_free_before(min(deadline + 1, self._settings.num_steps))


def _has_not_begun(ticket: Ticket) -> bool:
    return ticket.state is not State.CLOSED and ticket.oldest_possible_step is None
