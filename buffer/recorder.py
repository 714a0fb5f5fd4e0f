"""Which finished group enters the open step, and which step must wait for whom.

Every group has a *deadline*: the last step in which its oldest token is within the bound (`bounds.py`). Groups are
recorded earliest deadline first, ties in order of completion; unit jobs under that rule all meet their deadlines if any order does.
With `overdue: wait` a group is recorded only if afterwards all that are still running can meet theirs too: for every
deadline d before its own, running tickets due by d <= places left in the steps up to d (Hall's condition). A short answer therefore never
takes the place that a long one will need, not only in the open step but in those after it. Admission counts the same
way, so a healthy run has no stale drops at all. With `overdue: drop` nothing is reserved.

A running ticket's deadline is a lower bound (leases count as if sampled entirely with the weights at lease time), which can make a
step wait a little longer than needed, never record what it should not: the gate uses the samples' own versions.
"""

from __future__ import annotations

import heapq
from collections import Counter


class Recorder:
    """Places (step, position), handed out in order. Pure bookkeeping over ticket ids."""

    def __init__(self, *, groups_per_step: int, num_steps: int, wait_for_overdue: bool) -> None:
        self._groups_per_step = groups_per_step
        self._num_steps = num_steps
        self._wait_for_overdue = wait_for_overdue
        self.step = 0
        """The open step: the one being recorded."""
        self.position = 0
        """Next free place in it."""
        self._order = 0
        self._heap: list[tuple[int, int, int]] = []
        self._ready: set[int] = set()
        self._tracked: dict[int, tuple[int | None, int | None]] = {}
        self._num_due: Counter[int] = Counter()
        self.num_without_deadline = 0
        """Running tickets of which nothing was sampled and nothing is being sampled."""
        self._proven: dict[int, set[int]] = {}

    @property
    def num_recorded(self) -> int:
        """Places handed out since step 0 of the run, earlier lives included."""
        return self.step * self._groups_per_step + self.position

    def track(self, ticket_id: int, *, due: int | None, proven: int | None) -> None:
        """A running ticket's deadline is `due` or later, and certainly not later than `proven`. None: not known."""
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
        self._order += 1
        heapq.heappush(self._heap, (deadline, self._order, ticket_id))

    def stale(self) -> int | None:
        """A running or ready ticket whose deadline has certainly passed, if there is one."""
        late = [deadline for deadline in self._proven if deadline < self.step]  # at most max_staleness + 1 keys
        if late:
            return next(iter(self._proven[late[0]]))
        head = self._head()
        return head[1] if head and head[0] < self.step else None

    def next_to_record(self, *, trainer_step: int) -> int | None:
        """The ready ticket that may take the next place now. Recording runs at most one step ahead of the trainer."""
        if self.step > trainer_step + 1 or self.step >= self._num_steps:
            return None
        head = self._head()
        if head is None or (self._wait_for_overdue and not self._leaves_room(head[0])):
            return None
        return head[1]

    def place(self, ticket_id: int) -> tuple[int, int]:
        """Takes the next (step, position) for a ticket that `next_to_record` named."""
        self.forget(ticket_id)
        place = (self.step, self.position)
        self.position += 1
        if self.position == self._groups_per_step:
            self.step, self.position = self.step + 1, 0
        return place

    def reopen(self, step: int) -> None:
        """Takes back the places of `step` and later ones: nobody has trained on them, and whoever held them is dropped."""
        self.step, self.position = step, 0

    @property
    def num_due(self) -> int:
        """Running tickets that cannot be recorded later than in the open step."""
        return sum(count for deadline, count in self._num_due.items() if deadline <= self.step)

    def _head(self) -> tuple[int, int] | None:
        while self._heap and self._heap[0][2] not in self._ready:
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def _leaves_room(self, deadline: int) -> bool:
        places_left = self._groups_per_step - self.position - 1
        num_running = 0
        for due in sorted(due for due in self._num_due if due < deadline):
            num_running += self._num_due[due]
            if num_running > places_left + max(0, due - self.step) * self._groups_per_step:
                return False
        return True
