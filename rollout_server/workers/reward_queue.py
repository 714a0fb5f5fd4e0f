"""The completions of one task that wait for a reward worker, and the order in which workers get them. Pure.

    queued -> taken by a worker -> scored
       ^------ put back, ahead of all others: the worker was lost, or is held by another reward

A reward that takes far longer than the others *holds* its worker. Rewards that hang mostly come from one task
of a mixture, so the label of such a reward is *suspect* until `_PROBATION` of its rewards have ended in time.
Completions with a suspect label are sent after all others, and leave some workers to other labels. While all
completions have the same label there is nothing to protect, and this has no effect. A failed reward is not
computed again here: the buffer decides about its sample (`buffer.on_failure`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from areal_like.errors import RewardError
from rollout_server.tasks.base import Score

_MAX_BATCH_BYTES = 1 << 20
_PROBATION = 10
_MAX_SUSPECTS = 1000
"""Maximum number of suspect labels; the oldest is cleared, because a data set may have a label per row."""


@dataclass(eq=False, kw_only=True)
class Item:
    """One completion to score."""

    number: int
    place: str
    """The example: `train 17`."""
    label: str
    """The example's label: the task of a mixture."""
    frame: bytes
    """The frame that is sent to a worker."""
    done: asyncio.Future[tuple[Score, float]]
    """The score, and the seconds in the task's code; or a RewardError."""
    is_alone: bool = False
    """True after a worker was lost while it was scoring this item together with others."""
    sent_s: float = 0.0
    """When it was sent to a worker."""

    def __str__(self) -> str:
        return f"{self.label}, {self.place}" if self.label else self.place

    def fail(self, reason: RewardError) -> None:
        """Ends the item, unless it is scored or its caller was cancelled."""
        if not self.done.done():
            self.done.set_exception(type(reason)(str(reason)))


class RewardQueue:
    """The items that no worker has, oldest first, and the suspect labels."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._delayed: deque[Item] = deque()
        """Items with suspect labels."""
        self._suspects: dict[str, int] = {}
        """Suspect labels -> how many of their rewards have to end in time."""
        self._first_label: str | None = None
        self._has_labels = False
        """True once items with different labels were submitted."""

    def __len__(self) -> int:
        return len(self._items) + len(self._delayed)

    def add(self, item: Item) -> None:
        """Appends a submitted item."""
        if self._first_label is None:
            self._first_label = item.label
        elif item.label != self._first_label and not self._has_labels:
            self._has_labels = True
            self._sort()
        (self._delayed if self.is_suspect(item) else self._items).append(item)

    def put_back(self, items: Iterable[Item]) -> None:
        """Requeues items that a worker will not score soon, ahead of younger ones."""
        self._sort(items)

    def suspect(self, label: str) -> None:
        """Notes that a reward with this label holds its worker, or exceeded the time limit."""
        is_new = label not in self._suspects
        self._suspects[label] = _PROBATION
        if len(self._suspects) > _MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]
        if is_new:
            self._sort()

    def trust(self, label: str) -> None:
        """Notes that a reward with this label ended in time, and none holds a worker."""
        if label in self._suspects:
            self._suspects[label] -= 1
            if not self._suspects[label]:
                del self._suspects[label]
                self._sort()

    def is_suspect(self, item: Item) -> bool:
        """True if the item has to wait for those of other labels."""
        return self._has_labels and item.label in self._suspects

    def take(self, most: int, *, is_idle: bool, is_async: bool, room_for_suspects: int) -> list[Item]:
        """Removes and returns the next items for one worker.

        `is_idle`: the worker has no items. `is_async`: it computes several rewards at the same time; any
        other worker gets an item with a suspect label alone. `room_for_suspects`: how many of those may be
        taken.
        """
        taken: list[Item] = []
        self._take(self._items, taken, most, is_idle=is_idle)
        if not taken or (is_async and not taken[-1].is_alone):
            room = room_for_suspects if is_async else min(room_for_suspects, 1)
            self._take(self._delayed, taken, min(most, len(taken) + room), is_idle=is_idle)
        return taken

    def take_all(self) -> list[Item]:
        """Removes and returns all items."""
        items = [*self._items, *self._delayed]
        self._items, self._delayed = deque(), deque()
        return items

    @staticmethod
    def _take(queue: deque[Item], taken: list[Item], most: int, *, is_idle: bool) -> None:
        """Moves items from `queue` to `taken`, which then has at most `most`."""
        num_bytes = sum(len(item.frame) for item in taken)
        while queue and len(taken) < most:
            item = queue[0]
            if not item.done.done():  # it is not scored yet, and still needed
                num_bytes += len(item.frame)
                if (item.is_alone and not is_idle) or (
                    taken and (item.is_alone or taken[-1].is_alone or num_bytes > _MAX_BATCH_BYTES)
                ):
                    return
                taken.append(item)
            queue.popleft()

    def _sort(self, returned: Iterable[Item] = ()) -> None:
        """Divides the items, and those that a worker has returned, according to the suspects of now."""
        self._items, items = deque(), sorted([*returned, *self.take_all()], key=lambda item: item.number)
        for item in items:
            (self._delayed if self.is_suspect(item) else self._items).append(item)
