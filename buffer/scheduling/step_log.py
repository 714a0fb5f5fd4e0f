"""Where the trainer is among the recorded steps, and what of them can still be served.

    one step:  being recorded -> full -> in training -> complete -> committed -> released
                                             ^             |            |
                                             +-------------+------------+   a trainer comes back at this step or an earlier one

A step that is not released can be served again, place by place. How often a trainer has *begun* each step (it has all of its groups, and
has finished the steps before) is kept until the step is complete: data that crashes every trainer is found by that.
"""

from __future__ import annotations

from buffer.storage.base import Store
from buffer.tables.counters import StreamCounters
from buffer.tables.ticket_table import TicketTable
from buffer.tickets import State, Ticket

MAX_STARTS = 3
"""Trainers that one step may cost. The next is refused, with the names of the step's tickets."""


class StepLog:
    """Steps are absolute: a run that goes on after K steps begins at step K."""

    def __init__(
        self, store: Store, register: TicketTable, statistics: StreamCounters, *, groups_per_step: int
    ) -> None:
        self._store = store
        self._register = register
        self._statistics = statistics
        self._groups_per_step = groups_per_step
        self.current = 0
        """Optimizer steps that the trainer has completed: the index of the one it works on."""
        self.committed = -1
        """Last step that a durable checkpoint contains."""
        self.first_kept = 0
        """Steps before it are released."""
        self.num_counted = 0
        """Steps whose data were learned from at least once."""
        self.attempts: dict[int, int] = {}
        """Step -> how often a trainer began it, while it is not complete."""
        self.recorded: dict[int, dict[int, Ticket]] = {}
        """Step -> position -> ticket, of steps that are not released."""
        self.num_recorded = 0
        """Tickets recorded in this life, ever more."""
        self._served: dict[int, set[int]] = {}
        self._begun = -1

    def restore(self, tickets: list[Ticket], marks: dict[str, int], attempts: dict[int, int]) -> None:
        """What an earlier life knew. `tickets`: all that have a place and are not released."""
        self.current = marks.get("trainer_step", 0)
        self.committed = marks.get("committed_step", -1)
        self.first_kept = marks.get("oldest_kept_step", 0)
        self.num_counted = marks.get("num_steps_counted", 0)
        self.attempts = dict(attempts)
        for ticket in sorted(tickets, key=lambda ticket: (ticket.step, ticket.position)):
            self.put(ticket)

    def begin_at(self, step: int) -> list[Ticket]:
        """The stream starts here, whatever was before; returns the tickets of earlier steps, which are released."""
        self.move_to(step)
        self.commit_to(step - 1)
        self.count_to(step)
        return self.keep_from(step)

    def put(self, ticket: Ticket) -> None:
        """The ticket was recorded at its place."""
        self.num_recorded += 1
        self.recorded.setdefault(ticket.step, {})[ticket.position] = ticket

    def take_out(self, ticket: Ticket) -> None:
        """Its place is free again."""
        del self.recorded[ticket.step][ticket.position]
        if not self.recorded[ticket.step]:
            del self.recorded[ticket.step]

    def of(self, *steps: int) -> list[Ticket]:
        """Tickets of these steps in recorded order."""
        return [ticket for step in steps for _, ticket in sorted(self.recorded.get(step, {}).items())]

    def from_on(self, step: int) -> list[Ticket]:
        """Tickets of this step and later ones in recorded order."""
        return self.of(*sorted(recorded for recorded in self.recorded if recorded >= step))

    def move_to(self, step: int) -> None:
        """The trainer works on this step now."""
        self.current = step
        self._store.put_mark("trainer_step", step)
        self._note_start()

    def done(self) -> None:
        """The trainer has done the step it worked on."""
        self.forget_attempts(self.current)
        self._served.pop(self.current, None)
        self.move_to(self.current + 1)

    def commit_to(self, step: int) -> None:
        """A durable checkpoint contains this step and no later one: tickets up to it are TRAINED, and those after it are not."""
        for ticket in self.of(*range(self.committed + 1, step + 1)):
            self._register.move(ticket, State.TRAINED)
        self._register.take_back(self.of(*range(step + 1, self.committed + 1)))
        self.committed = step
        self._store.put_mark("committed_step", step)

    def keep_from(self, step: int) -> list[Ticket]:
        """No checkpoint needs steps before this one; returns their tickets, which are forgotten."""
        released = self.of(*sorted(recorded for recorded in self.recorded if recorded < step))
        for ticket in released:
            self.take_out(ticket)
        self.first_kept = max(step, self.first_kept)
        self._store.put_mark("oldest_kept_step", self.first_kept)
        return released

    def count_to(self, step: int) -> None:
        """Steps before `step` are complete: books what was learned in them, once, however often a trainer repeats them."""
        if step > self.num_counted:
            for ticket in self.of(*range(self.num_counted, step)):
                for sample in ticket.learned_from:
                    self._statistics.trained(sample, step=ticket.step)
            self._set_counted(step)

    def uncount_from(self, step: int) -> None:
        """Steps from `step` on will be done again, and not with the same groups: takes that back."""
        if step < self.num_counted:
            for ticket in self.of(*range(step, self.num_counted)):
                for sample in ticket.learned_from:
                    self._statistics.untrained(sample, step=ticket.step)
            self._set_counted(step)

    def _set_counted(self, step: int) -> None:
        self.num_counted = step
        self._store.put_mark("num_steps_counted", step)

    def served(self, step: int, position: int) -> None:
        """The trainer was given this group."""
        if step >= self.current:
            self._served.setdefault(step, set()).add(position)
            self._note_start()

    def new_trainer(self) -> None:
        """Another process begins: it has been given nothing."""
        self._served.clear()
        self._begun = -1

    def crash_loop(self, *, first: int) -> int | None:
        """A step from `first` on that has cost as many trainers as it may."""
        return next(
            (step for step, num in sorted(self.attempts.items()) if step >= first and num >= MAX_STARTS), None
        )

    def forget_attempts(self, step: int) -> None:
        """The step is done, or its data are others now."""
        if step in self.attempts:
            self._set_attempts(step, 0)

    def trainer_left_cleanly(self) -> None:
        """The trainer left on purpose: that it began its step is no mark against it. What cost too many gets one more try later."""
        peaceful = {self.current} if self._begun == self.current else set()
        for step in [step for step, num in self.attempts.items() if step in peaceful or num >= MAX_STARTS]:
            self._set_attempts(step, self.attempts[step] - 1)
        self._begun = -1

    def _note_start(self) -> None:
        if self._begun != self.current and len(self._served.get(self.current, ())) == self._groups_per_step:
            self._begun = self.current
            self._set_attempts(self.current, self.attempts.get(self.current, 0) + 1)

    def _set_attempts(self, step: int, num_starts: int) -> None:
        self.attempts[step] = num_starts
        if not num_starts:
            del self.attempts[step]
        self._store.put_attempt(step, num_starts)
