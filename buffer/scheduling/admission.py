"""The admission gate: chooses the train ticket that a server may take now, a waiting ticket or a new one.

A server with weights of step s may take a ticket while all ready and running groups fit into the free
positions of the steps up to deadline(s) (`staleness.py`) and up to the end of the run. A position that was
freed in a step that a trainer repeats counts as free, no matter how many later steps are recorded. Waiting
tickets with a sample or lease have a deadline already and are leased before those without. A new ticket is
issued only if no ticket waits, because it would take the oldest ticket's budget and, on a small server, its
slots.

With `buffer.overdue=close` the age of tokens is bounded when a position is recorded, and admission has to
keep both pools busy without letting samples grow old. It limits the work in progress:

    running + recordable + partial / 2  <=  limit

running: samples that are to be made, late ones included. recordable: complete samples of whole groups, and
parts. partial: complete samples of groups that are neither complete nor closed. So a sample begins for each
one that is trained on. A limit on complete samples alone would make all free slots begin together, be closed
together and complete together, in waves in which the trainer waits. Large groups hold many partial samples
for long: counted fully, they would leave slots empty, and not at all, let waves through.

The limit follows the trainer (`step_done`). With N samples in a step, 1.25 N samples should be recorded or
recordable when the trainer has completed a step: more only grow older, and with fewer it will soon wait. The
limit moves by a quarter of the difference, between N and what the servers have room for plus .4 N, and at
most to `close_after + 1` steps: more groups would not be complete in time. While the trainer has no full
step, all of that is allowed at once. So an engine whose samples take longer the more of them run gets as
many as the trainer needs, and no more samples begin than the run has positions for. As without closing, a
group begins only if it and all samples in progress fit into the steps up to its server's weights +
`max_staleness`: when weights reach the servers slowly, the trainer waits for them, and no sample is
generated that will be too old.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from areal_like.wire.messages.producer import Purpose
from buffer.scheduling.staleness import StalenessBound
from buffer.scheduling.step_log import StepLog
from buffer.scheduling.step_scheduler import StepScheduler
from buffer.settings import LedgerSettings
from buffer.tables.lease_table import LeaseTable
from buffer.tables.parts import PartTable
from buffer.tables.ticket_table import TicketTable
from buffer.tickets import State, Ticket

_STOCK_STEPS = 1.25
"""Steps' worth of complete samples that the trainer should find when it has completed a step."""
_GAIN = 0.25
"""Change of the limit for each missing sample."""
_WAITING_STEPS = 0.4
"""Steps' worth of samples that may be in progress in addition to those that the servers can run."""
_FIRST_STEPS = 1.75
"""Steps' worth of samples in progress before the first step."""


class Admission:
    """The queue of waiting tickets, and the budget for new ones."""

    def __init__(
        self,
        settings: LedgerSettings,
        *,
        tickets: TicketTable,
        parts: PartTable,
        leases: LeaseTable,
        steps: StepLog,
        scheduler: StepScheduler,
        bound: StalenessBound,
    ) -> None:
        self._settings = settings
        self._leases = leases
        self._steps = steps
        self._tickets = tickets
        self._parts = parts
        self._scheduler = scheduler
        self._bound = bound
        self._limit = _FIRST_STEPS * self._step_samples
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

    def _may_take(self, ticket: Ticket | None, weights_step: int) -> bool:
        if ticket is None:
            num_needed = self._num_unrecorded() + self._num_positions_of_parts()
            return num_needed < self._num_free_positions(weights_step)
        oldest_step = ticket.oldest_possible_step
        if oldest_step is not None and weights_step >= oldest_step:
            return True
        # It would get an earlier deadline. A ticket that begins now gets its deadline now, like a new ticket.
        not_begun = _has_not_begun(ticket)
        max_staleness = self._bound.current if not_begun else ticket.max_staleness
        # Other tickets that have not begun get their deadlines later, one after the other. If they
        # counted here, they could block each other forever after the bound was lowered.
        num_with_deadline = self._num_unrecorded() - self._scheduler.num_without_deadline + not_begun
        num_with_deadline += self._num_positions_of_parts()
        return num_with_deadline <= self._num_free_positions(weights_step, max_staleness=max_staleness)

    def _may_close(self, ticket: Ticket | None, weights_step: int) -> bool:
        """As `_may_take`, if groups are closed."""
        if ticket is not None and not _has_not_begun(ticket):
            # Later its tokens would be too old at once.
            return weights_step >= self._scheduler.num_full_steps - self._bound.current
        size = self._settings.group_size
        num_begun = self._num_unrecorded_samples - self._scheduler.num_without_deadline * size
        if num_begun >= self._num_free_positions(weights_step) * size:
            return False
        num_left = self._scheduler.num_free_before(self._settings.num_steps) * size
        is_needed = ticket is not None or self._num_unrecorded_samples < num_left
        return is_needed and self.work_in_progress + size <= self.work_limit

    def step_done(self) -> None:
        """With closing: adapts the limit, when the trainer has completed a step."""
        size = self._settings.group_size
        num_ahead = self._scheduler.num_taken_from(self._steps.current)
        ready = self._tickets.count(Purpose.TRAIN, State.READY)
        stock = (num_ahead + ready) * size + self._parts.num_loose
        self._limit = self.work_limit + _GAIN * (_STOCK_STEPS * self._step_samples - stock)

    @property
    def work_limit(self) -> float:
        """With closing: the largest work in progress, in samples."""
        step = self._step_samples
        most = self._leases.num_slots + _WAITING_STEPS * step
        most = min(most, (min(self._settings.close_after, self._bound.current) + 1) * step)
        is_waited_for = self._scheduler.num_full_steps <= self._steps.current
        # Parts that do not fill a position must leave room for another group.
        least = max(step, 2 * self._settings.group_size)
        return max(least, most if is_waited_for else min(self._limit, most))

    @property
    def work_in_progress(self) -> float:
        """With closing: samples that are being made or are to be recorded, as they count for admission."""
        not_begun = self._scheduler.num_without_deadline * self._settings.group_size
        return self._num_unrecorded_samples - not_begun - self._tickets.num_partial / 2

    @property
    def _step_samples(self) -> int:
        return self._settings.groups_per_step * self._settings.group_size

    @property
    def _num_unrecorded_samples(self) -> int:
        return (
            self._num_unrecorded() * self._settings.group_size + self._parts.num_loose + self._parts.num_late
        )

    def _is_waiting(self, not_begun: bool, ticket_id: int) -> bool:
        ticket = self._tickets.live.get(ticket_id)
        if ticket is None or not ticket.unleased:
            return False
        return not_begun == _has_not_begun(ticket)

    def _num_unrecorded(self) -> int:
        """Groups that will need a position: ready or running."""
        return self._tickets.count(Purpose.TRAIN, State.QUEUED, State.LEASED, State.READY)

    def _num_positions_of_parts(self) -> int:
        """Positions that parts will need, which a run has left that closed groups before it was resumed."""
        return -(-(self._parts.num_loose + self._parts.num_late) // self._settings.group_size)

    def _num_free_positions(self, weights_step: int, *, max_staleness: int | None = None) -> int:
        """Free positions at which a group with weights of this step can be recorded.

        `max_staleness`: the ticket's bound; None: the current bound.
        """
        max_staleness = self._bound.current if max_staleness is None else max_staleness
        deadline = self._bound.deadline(weights_step, max_staleness=max_staleness)
        return self._scheduler.num_free_before(min(deadline + 1, self._settings.num_steps))


def _has_not_begun(ticket: Ticket) -> bool:
    return ticket.state is not State.CLOSED and ticket.oldest_possible_step is None
