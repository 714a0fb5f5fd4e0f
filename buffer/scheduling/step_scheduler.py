"""Which finished group enters the open step, and which step must wait for whom.

Every group has a *deadline*: the last step in which its oldest token is within the bound (`bounds.py`). Groups are
recorded earliest deadline first, among equals the oldest ticket; unit jobs under that rule all meet their deadlines if any order does.
With `overdue: wait` a group is recorded only if afterwards all that are still running can meet theirs too: for every
deadline d before its own, running tickets due by d <= places left in the steps up to d (Hall's condition). A short answer therefore never
takes the place that a long one will need, not only in the open step but in those after it. Admission counts the same
way, so a healthy run has no stale drops at all. With `overdue: drop` nothing is reserved.

A running ticket's deadline is a lower bound (leases count as if sampled entirely with the weights at lease time), which can make a
step wait a little longer than needed, never record what it should not: the gate uses the samples' own versions.

Places are handed out in order. One that an operator emptied (a *hole*) is the next to be filled, within the bound: so a step keeps its
other places, and a group stays with the rank that trains on it. A hole's step is the trainer's or a later one, and the trainer does not get
past it, so no weights are younger than it and no lag is negative. What is recorded is enough to know all of this again: the open place is
behind the last taken one, and every free place before it is a hole.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection

Place = tuple[int, int]
"""(step, position)"""


class StepScheduler:
    """Places (step, position), handed out in order. Pure bookkeeping over ticket ids."""

    def __init__(self, *, groups_per_step: int, num_steps: int, wait_for_overdue: bool) -> None:
        self._groups_per_step = groups_per_step
        self._num_steps = num_steps
        self._wait_for_overdue = wait_for_overdue
        self.step = 0
        """The open step: the one being recorded."""
        self.position = 0
        """Next free place in it that is not a hole."""
        self._holes: set[Place] = set()
        self._heap: list[tuple[int, int]] = []
        self._ready: set[int] = set()
        self._tracked: dict[int, tuple[int | None, int | None]] = {}
        self._num_due: Counter[int] = Counter()
        self.num_without_deadline = 0
        """Running tickets of which nothing was sampled and nothing is being sampled."""
        self._proven: dict[int, set[int]] = {}

    def num_free_before(self, step: int) -> int:
        """Free places of the steps before this one, holes included."""
        num_after_last = (step - self.step) * self._groups_per_step - self.position
        return max(0, num_after_last) + sum(hole < step for hole, _ in self._holes)

    @property
    def num_full_steps(self) -> int:
        """Steps, from step 0 on, that have no free place."""
        return self._first_free[0]

    def track(self, ticket_id: int, *, due: int | None, proven: int | None) -> None:
        """A running ticket's deadline is `due` or later, and certainly not later than `proven`. None: not known."""
        if self._tracked.get(ticket_id) == (due, proven):
            return
        self.forget(ticket_id)
        self._tracked[ticket_id] = (due, proven)
        if due is None:
            self.num_without_deadline += 1
        else:
            self._num_due[due] += 1
        if proven is not None:
            self._proven.setdefault(proven, set()).add(ticket_id)

    def forget(self, ticket_id: int) -> None:
        """The ticket is neither running nor ready any more."""
        self._ready.discard(ticket_id)
        if ticket_id not in self._tracked:
            return
        due, proven = self._tracked.pop(ticket_id)
        if due is None:
            self.num_without_deadline -= 1
        else:
            self._num_due[due] -= 1
            if not self._num_due[due]:
                del self._num_due[due]
        if proven is not None:
            self._proven[proven].remove(ticket_id)
            if not self._proven[proven]:
                del self._proven[proven]

    def add_ready(self, ticket_id: int, *, deadline: int) -> None:
        """The group is complete, and its deadline known."""
        self.forget(ticket_id)
        self._ready.add(ticket_id)
        heapq.heappush(self._heap, (deadline, ticket_id))

    def stale(self) -> int | None:
        """A running or ready ticket whose deadline has certainly passed, if there is one."""
        first = self.num_full_steps
        late = [deadline for deadline in self._proven if deadline < first]  # at most max_staleness + 1 keys
        if late:
            return min(self._proven[min(late)])
        head = self._head()
        return head[1] if head and head[0] < first else None

    def next_to_record(self, *, trainer_step: int) -> int | None:
        """The ready ticket that may take the next place now. Recording runs at most one step ahead of the trainer."""
        step = self.num_full_steps
        if step > trainer_step + 1 or step >= self._num_steps:
            return None
        head = self._head()
        if head is None or (self._wait_for_overdue and not self._leaves_room(head[0])):
            return None
        return head[1]

    def place(self, ticket_id: int) -> Place:
        """Takes the next (step, position) for a ticket that `next_to_record` named."""
        self.forget(ticket_id)
        place = self._first_free
        if place in self._holes:
            self._holes.remove(place)
        else:
            self._go_to(self.step, self.position + 1)
        return place

    def vacate(self, place: Place) -> None:
        """The group that was recorded there is gone."""
        self._holes.add(place)
        while (last := self._before(self.step, self.position)) in self._holes:
            self._holes.remove(last)
            self.step, self.position = last

    def restore(self, taken: Collection[Place], *, first_step: int) -> None:
        """What is recorded from `first_step` on; steps before it are full."""
        self._holes.clear()
        last = max(taken, default=self._before(first_step, 0))
        self._go_to(last[0], last[1] + 1)
        everywhere = range(
            first_step * self._groups_per_step, self.step * self._groups_per_step + self.position
        )
        self._holes = {divmod(index, self._groups_per_step) for index in everywhere} - set(taken)

    @property
    def num_due(self) -> int:
        """Running tickets that cannot be recorded later than in the open step."""
        return sum(count for deadline, count in self._num_due.items() if deadline <= self.step)

    def _head(self) -> tuple[int, int] | None:
        while self._heap and self._heap[0][1] not in self._ready:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    @property
    def _first_free(self) -> Place:
        return min(self._holes, default=(self.step, self.position))

    def _leaves_room(self, deadline: int) -> bool:
        places_left = self._groups_per_step - self.position - 1 + len(self._holes)
        num_running = 0
        for due in sorted(due for due in self._num_due if due < deadline):
            num_running += self._num_due[due]
            if num_running > places_left + max(0, due - self.step) * self._groups_per_step:
                return False
        return True

    def _go_to(self, step: int, position: int) -> None:
        self.step, self.position = (step + 1, 0) if position == self._groups_per_step else (step, position)

    def _before(self, step: int, position: int) -> Place:
        return (step, position - 1) if position else (step - 1, self._groups_per_step - 1)
