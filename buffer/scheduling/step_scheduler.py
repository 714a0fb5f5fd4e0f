"""The step scheduler: decides which finished group enters the open step, and when the step has to wait.

Every group has a *deadline*: the last step in which its oldest token is within the staleness bound
(`staleness.py`). Groups are recorded earliest deadline first, and among equal deadlines oldest ticket first.
For jobs of equal length this rule meets all deadlines if any order does. With `overdue: wait` a group is
recorded only if all running groups can still meet their deadlines afterwards: for every deadline d before
its own, the number of running tickets due by d must not exceed the number of free positions of the steps up
to d (Hall's condition). So a short completion never takes a position that a long one will need, in the open
step or a later one. Admission counts in the same way, so a healthy run has no stale drops at all. With
`overdue: drop` and `overdue: close` no position is reserved. With `close` the deadline of a running
group is the step before the one at which it is closed; that of a ready group only decides the order.

The deadline of a running ticket is a lower bound (its leases count as if sampled entirely with the weights at
the time of the lease). This can make a step wait a little longer than necessary; it never records a group
that is too stale, because recording uses the versions of the samples themselves.

Positions are assigned in order. A position that an operator freed (a *hole*) is filled next, within the
bound. So the other positions of the step do not change, and each group stays with the rank that trains on it.
The step of a hole is the trainer's current step or a later one, and the trainer cannot complete it before the
hole is filled. So no weights are newer than that step, and no lag is negative. After a restart the recorded
positions alone determine this state: the open position follows the last taken one, and every free position
before it is a hole.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection

StepPosition = tuple[int, int]
"""(step, position in the step)"""
_MANY_OUTDATED = 64
"""Outdated entries that the heap of deadlines may have in addition to one for each running ticket."""


class StepScheduler:
    """Assigns step positions in order. Pure: handles only ticket ids and steps.

    ticket: RUNNING (track) -> READY (add_ready) -> recorded (assign) | dropped (remove)
    """

    def __init__(
        self, *, groups_per_step: int, num_steps: int, wait_for_overdue: bool, ready_expires: bool = True
    ) -> None:
        """`wait_for_overdue`: reserve positions for running tickets. `ready_expires`: a ready ticket that
        misses its deadline is overdue, too."""
        self._ready_expires = ready_expires
        self._groups_per_step = groups_per_step
        self._num_steps = num_steps
        self._wait_for_overdue = wait_for_overdue
        self.num_changes = 0
        """Number of changes of tickets and positions, by which a caller can tell that nothing has changed."""
        self.step = 0
        """The open step: the one being recorded."""
        self.position = 0
        """The next free position in the open step that is not a hole."""
        self._holes: set[StepPosition] = set()
        self._heap: list[tuple[int, int]] = []
        self._ready: set[int] = set()
        self._tracked: dict[int, tuple[int | None, int | None]] = {}
        self._num_due: Counter[int] = Counter()
        self.num_without_deadline = 0
        """Running tickets without a sample and without a lease."""
        self._by_latest_deadline: list[tuple[int, int]] = []
        """Heap of (latest deadline, running ticket), with outdated entries."""

    def num_free_before(self, step: int) -> int:
        """Free positions of the steps before this one, holes included."""
        num_behind_last = (step - self.step) * self._groups_per_step - self.position
        return max(0, num_behind_last) + sum([hole < step for hole, _ in self._holes])

    def num_taken_from(self, step: int) -> int:
        """Recorded positions of this step and later ones."""
        num_passed = (self.step - step) * self._groups_per_step + self.position
        return max(0, num_passed) - sum(hole >= step for hole, _ in self._holes)

    @property
    def num_full_steps(self) -> int:
        """Steps, counted from step 0, that have no free position."""
        return self._first_free[0] if self._holes else self.step

    def track(self, ticket_id: int, *, earliest_deadline: int | None, latest_deadline: int | None) -> None:
        """Sets the bounds on a running ticket's deadline; None: not known yet."""
        if self._tracked.get(ticket_id) == (earliest_deadline, latest_deadline):
            return
        self.remove(ticket_id)
        self._tracked[ticket_id] = (earliest_deadline, latest_deadline)
        if earliest_deadline is None:
            self.num_without_deadline += 1
        else:
            self._num_due[earliest_deadline] += 1
        if latest_deadline is not None:
            heapq.heappush(self._by_latest_deadline, (latest_deadline, ticket_id))
            if len(self._by_latest_deadline) > 2 * len(self._tracked) + _MANY_OUTDATED:
                self._remove_outdated()

    def remove(self, ticket_id: int) -> None:
        """Removes a ticket that is no longer running or ready."""
        self.num_changes += 1
        self._ready.discard(ticket_id)
        if ticket_id not in self._tracked:
            return
        earliest, _ = self._tracked.pop(ticket_id)
        if earliest is None:
            self.num_without_deadline -= 1
        else:
            self._num_due[earliest] -= 1
            if not self._num_due[earliest]:
                del self._num_due[earliest]

    def add_ready(self, ticket_id: int, *, deadline: int) -> None:
        """Marks a ticket as READY. Its group is complete, so its deadline is exact."""
        self.remove(ticket_id)
        self._ready.add(ticket_id)
        heapq.heappush(self._heap, (deadline, ticket_id))

    def next_overdue(self, first: int) -> int | None:
        """A running or ready ticket whose deadline is before step `first`; None if there is none."""
        running = self._by_latest_deadline
        while running and running[0][0] < first:
            latest, ticket_id = running[0]
            if self._tracked.get(ticket_id, (None, None))[1] == latest:
                return ticket_id
            heapq.heappop(running)
        head = self._head() if self._ready_expires else None
        return head[1] if head and head[0] < first else None

    def may_record(self, *, trainer_step: int) -> bool:
        """True if the next position exists and is at most one step ahead of the trainer."""
        return self.num_full_steps <= min(trainer_step + 1, self._num_steps - 1)

    def next_to_record(self, *, trainer_step: int) -> int | None:
        """The ready ticket that may be recorded now; None: there is none, or the step has to wait."""
        if not self.may_record(trainer_step=trainer_step):
            return None
        head = self._head()
        if head is None or (self._wait_for_overdue and not self._leaves_room(head[0])):
            return None
        return head[1]

    def assign(self, ticket_id: int) -> StepPosition:
        """Assigns the next position to the ticket that `next_to_record` returned, or to one of parts."""
        self.remove(ticket_id)
        taken = self._first_free
        if taken in self._holes:
            self._holes.remove(taken)
        else:
            self._open(self.step, self.position + 1)
        return taken

    def free(self, position: StepPosition) -> None:
        """Frees a position whose group was removed."""
        self.num_changes += 1
        self._holes.add(position)
        while (last := self._before(self.step, self.position)) in self._holes:
            self._holes.remove(last)
            self.step, self.position = last

    def restore(self, taken: Collection[StepPosition], *, first_step: int) -> None:
        """Sets the recorded positions from `first_step` on; steps before it are full."""
        self.num_changes += 1
        self._holes.clear()
        last = max(taken, default=self._before(first_step, 0))
        self._open(last[0], last[1] + 1)
        first_index = first_step * self._groups_per_step
        open_index = self.step * self._groups_per_step + self.position
        passed = {divmod(index, self._groups_per_step) for index in range(first_index, open_index)}
        self._holes = passed - set(taken)

    @property
    def num_due(self) -> int:
        """Number of running tickets that must be recorded in the open step at the latest."""
        return sum(count for deadline, count in self._num_due.items() if deadline <= self.step)

    def _remove_outdated(self) -> None:
        """Removes the entries of tickets that have ended. They would stay until their deadline has passed,
        which takes the whole run if the staleness bound is large."""
        self._by_latest_deadline = [
            (latest, ticket_id) for ticket_id, (_, latest) in self._tracked.items() if latest is not None
        ]
        heapq.heapify(self._by_latest_deadline)

    def _head(self) -> tuple[int, int] | None:
        while self._heap and self._heap[0][1] not in self._ready:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    @property
    def _first_free(self) -> StepPosition:
        return min(self._holes, default=(self.step, self.position))

    def _leaves_room(self, deadline: int) -> bool:
        """Hall's condition for running tickets due before `deadline`, after one more position is taken."""
        num_free = self._groups_per_step - self.position - 1 + len(self._holes)
        num_running = 0
        for due in sorted(due for due in self._num_due if due < deadline):
            num_running += self._num_due[due]
            if num_running > num_free + max(0, due - self.step) * self._groups_per_step:
                return False
        return True

    def _open(self, step: int, position: int) -> None:
        self.step, self.position = (step + 1, 0) if position == self._groups_per_step else (step, position)

    def _before(self, step: int, position: int) -> StepPosition:
        return (step, position - 1) if position else (step - 1, self._groups_per_step - 1)
