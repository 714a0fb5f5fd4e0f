"""The log of recorded steps: the step in training, the committed steps, and the groups that can be served.

    one step:  being recorded -> full -> in training -> complete -> committed -> released
                                             ^             |            |
                                             +-------------+------------+   a trainer resumes here or earlier

A step that is not released can be served again, position by position. A trainer has *begun* a step when it
has completed the previous steps and received all groups of this one. The number of trainers that have begun a
step is kept until the step is complete, to find data that crashes every trainer.
"""

from __future__ import annotations

from collections.abc import Callable

from buffer.storage.base import Store
from buffer.tables.counters import StreamCounters
from buffer.tables.ticket_table import TicketTable
from buffer.tickets import State, Ticket

MAX_STARTS = 3
"""Trainers that one step may crash. The next trainer is refused, with the ids of the step's tickets."""


class StepLog:
    """Steps are absolute: a run that resumes after K steps begins at step K."""

    def __init__(
        self, store: Store, tickets: TicketTable, counters: StreamCounters, *, groups_per_step: int
    ) -> None:
        self._store = store
        self._tickets = tickets
        self._counters = counters
        self._groups_per_step = groups_per_step
        self.current = 0
        """Optimizer steps that the trainer has completed, which is also the index of its current step."""
        self.committed = -1
        """Last step that a durable checkpoint contains."""
        self.first_kept = 0
        """The first step that is not released."""
        self.num_counted = 0
        """Number of steps whose samples have been counted as trained."""
        self.attempts: dict[int, int] = {}
        """Step -> number of trainers that began it, until it is complete."""
        self.recorded: dict[int, dict[int, Ticket]] = {}
        """Step -> position -> ticket, of steps that are not released."""
        self.num_recorded = 0
        """Groups recorded since the process started; it never decreases."""
        self.on_served: Callable[[Ticket], None] | None = None
        """Called with each group that the trainer receives, including repeated ones."""
        self._served: dict[int, set[int]] = {}
        self._begun = -1

    def restore(self, tickets: list[Ticket], scalars: dict[str, int], attempts: dict[int, int]) -> None:
        """Continues from the rows of an earlier buffer.

        `tickets`: all recorded tickets that are not released.
        """
        self.current = scalars.get("trainer_step", 0)
        self.committed = scalars.get("committed_step", -1)
        self.first_kept = scalars.get("oldest_kept_step", 0)
        self.num_counted = scalars.get("num_steps_counted", 0)
        self.attempts = dict(attempts)
        for ticket in sorted(tickets, key=lambda ticket: (ticket.step, ticket.position)):
            self.add(ticket)

    def begin_at(self, step: int) -> list[Ticket]:
        """Starts the log at `step`, regardless of its previous position.

        Returns the tickets of earlier steps, which are released.
        """
        self.move_to(step)
        self.commit_to(step - 1)
        self.count_until(step)
        return self.release_before(step)

    def add(self, ticket: Ticket) -> None:
        self.num_recorded += 1
        self.recorded.setdefault(ticket.step, {})[ticket.position] = ticket

    def remove(self, ticket: Ticket) -> None:
        del self.recorded[ticket.step][ticket.position]
        if not self.recorded[ticket.step]:
            del self.recorded[ticket.step]

    def tickets_of(self, *steps: int) -> list[Ticket]:
        """Tickets of these steps, by position."""
        return [ticket for step in steps for _, ticket in sorted(self.recorded.get(step, {}).items())]

    def has(self, step: int, ticket_id: int) -> bool:
        """True if this ticket is recorded in this step."""
        return any(ticket.ticket_id == ticket_id for ticket in self.tickets_of(step))

    def tickets_from(self, step: int) -> list[Ticket]:
        """Tickets of this step and later ones, by (step, position)."""
        return self.tickets_of(*sorted(recorded for recorded in self.recorded if recorded >= step))

    def move_to(self, step: int) -> None:
        """Records that the trainer now works on this step."""
        self.current = step
        self._store.put_scalar("trainer_step", step)
        self._count_attempt()

    def complete_current(self) -> None:
        self.reset_attempts(self.current)
        self._served.pop(self.current, None)
        self.move_to(self.current + 1)

    def commit_to(self, step: int) -> None:
        """A durable checkpoint contains steps <= `step`: their tickets are TRAINED, later ones BATCHED."""
        for ticket in self.tickets_of(*range(self.committed + 1, step + 1)):
            self._tickets.move(ticket, State.TRAINED)
        self._tickets.reopen(self.tickets_of(*range(step + 1, self.committed + 1)))
        self.committed = step
        self._store.put_scalar("committed_step", step)

    def release_before(self, step: int) -> list[Ticket]:
        """No checkpoint needs steps before this one: removes and returns their tickets."""
        released = self.tickets_of(*sorted(recorded for recorded in self.recorded if recorded < step))
        for ticket in released:
            self.remove(ticket)
        self.first_kept = max(step, self.first_kept)
        self._store.put_scalar("oldest_kept_step", self.first_kept)
        return released

    def count_until(self, step: int) -> None:
        """Counts the samples of complete steps before `step` as trained; repeated steps count once."""
        if step > self.num_counted:
            for ticket in self.tickets_of(*range(self.num_counted, step)):
                self._counters.count_trained(ticket)
            self._set_num_counted(step)

    def uncount_from(self, step: int) -> None:
        """Steps from `step` on will be repeated with other groups: uncounts their samples."""
        if step < self.num_counted:
            for ticket in self.tickets_of(*range(step, self.num_counted)):
                self._counters.count_trained(ticket, sign=-1)
            self._set_num_counted(step)

    def _set_num_counted(self, step: int) -> None:
        self.num_counted = step
        self._store.put_scalar("num_steps_counted", step)

    def mark_served(self, step: int, position: int) -> None:
        """The trainer has received this group."""
        if self.on_served is not None:
            self.on_served(self.recorded[step][position])
        if step >= self.current:
            self._served.setdefault(step, set()).add(position)
            self._count_attempt()

    def reset_served(self) -> None:
        """Another trainer process has started; it has not received any group."""
        self._served.clear()
        self._begun = -1

    def find_crash_loop(self, *, first: int) -> int | None:
        """The first step from `first` on that MAX_STARTS trainers have begun; None if there is none."""
        looping = [step for step, num_starts in self.attempts.items() if num_starts >= MAX_STARTS]
        return min((step for step in looping if step >= first), default=None)

    def reset_attempts(self, step: int) -> None:
        """Resets the count of a step that is complete, or whose data has changed."""
        if step in self.attempts:
            self._set_attempts(step, 0)

    def trainer_left_cleanly(self) -> None:
        """The trainer left on purpose, so its start of the current step does not count as an attempt.

        Steps that have reached MAX_STARTS get one more attempt.
        """
        left_cleanly = {self.current} if self._begun == self.current else set()
        for step in [
            step for step, num in self.attempts.items() if step in left_cleanly or num >= MAX_STARTS
        ]:
            self._set_attempts(step, self.attempts[step] - 1)
        self._begun = -1

    def _count_attempt(self) -> None:
        """Counts a start of the current step once the trainer has received all of its groups."""
        if self._begun != self.current and len(self._served.get(self.current, ())) == self._groups_per_step:
            self._begun = self.current
            self._set_attempts(self.current, self.attempts.get(self.current, 0) + 1)

    def _set_attempts(self, step: int, num_starts: int) -> None:
        self.attempts[step] = num_starts
        if not num_starts:
            del self.attempts[step]
        self._store.put_attempt(step, num_starts)
