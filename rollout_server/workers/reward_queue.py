"""The completions of one task that wait for a reward worker, and the order in which workers get them. Pure.

    waiting -> taken by a worker -> scored
       ^------ added again: the worker was lost, or is held by another reward

Workers get the oldest first. A reward that takes far longer than the others of its part of a mixture *holds*
its worker. Rewards that hang mostly come from one part, so a part whose reward held a worker is *suspect* for
some time: it leaves as many workers to the other parts as it holds, and all suspects together leave one to
the parts that do not hang. While no other part is in use, this has no effect. A failed reward is not computed
again here: the buffer decides about its sample (`buffer.on_failure`).
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from areal_like.errors import RewardError
from rollout_server.tasks.base import Score

_BATCH_S = 0.02
"""Target time for all items that are sent together."""
_MAX_BATCH_BYTES = 1 << 20
_HELD_S = 0.25
_HELD_MEANS = 10.0
"""A reward holds its worker after the longer of `_HELD_S` and this many times its part's mean, but at the
latest after half of the time limit."""
_SMOOTHING = 0.1
"""Weight of the newest reward in the moving average of a part's reward times."""
_REMEMBERED_S = 60.0


@dataclass(eq=False, kw_only=True)
class Item:
    """One completion to score."""

    number: int
    place: str
    """The example: `train 17`."""
    part: str
    """The part of a mixture that the example belongs to."""
    frame: bytes
    """The frame that is sent to a worker."""
    done: asyncio.Future[tuple[Score, float]]
    """The score, and the seconds in the task's code; or a RewardError."""
    is_alone: bool = False
    """True after a worker was lost while it was scoring this item together with others."""
    sent_s: float = 0.0
    """When it was sent to a worker."""

    def __str__(self) -> str:
        return f"{self.part}, {self.place}" if self.part else self.place

    def __lt__(self, younger: Item) -> bool:
        return self.number < younger.number

    def fail(self, reason: RewardError) -> None:
        """Ends the item, unless it is scored or its caller was cancelled."""
        if not self.done.done():
            self.done.set_exception(type(reason)(str(reason)))


@dataclass(kw_only=True)
class _Part:
    """One part of a mixture, or the whole task."""

    waiting: list[Item] = field(default_factory=list)
    """A heap: the oldest item comes first."""
    added_s: float = -math.inf
    """When the newest item was added."""
    suspect_until_s: float = -math.inf
    mean_s: float = 0.0
    """Moving average of its reward times; 0: unknown."""


class RewardQueue:
    """The items that no worker has, and what is known about the rewards of each part."""

    def __init__(self, *, timeout_s: float) -> None:
        """`timeout_s`: time limit of one reward."""
        self.latest_held_s = timeout_s / 2
        """A reward holds its worker at the latest after this time."""
        self.remembered_s = self.latest_held_s + _REMEMBERED_S
        """A part is suspect, and counts as used, for this long: rewards that hang come again."""
        self._parts: defaultdict[str, _Part] = defaultdict(_Part)
        self._held: Counter[str] = Counter()
        """Number of items that hold a worker, by part."""

    def __len__(self) -> int:
        return sum(len(part.waiting) for part in self._parts.values())

    def add(self, item: Item, *, now_s: float) -> None:
        """Adds an item that was submitted, or that its worker will not score soon."""
        part = self._parts[item.part]
        part.added_s = now_s
        heapq.heappush(part.waiting, item)

    def ended(self, item: Item, seconds: float) -> None:
        """Notes the time of a reward that ended within its limit."""
        part = self._parts[item.part]
        # One that was slow must not hide the next one that hangs.
        seconds = min(seconds, self.held_after_s(item))
        part.mean_s += _SMOOTHING * (seconds - part.mean_s) if part.mean_s else seconds

    def held_after_s(self, item: Item) -> float:
        """Returns after which time an item holds its worker."""
        mean_s = self._parts[item.part].mean_s
        return min(max(_HELD_S, _HELD_MEANS * mean_s), self.latest_held_s) if mean_s else self.latest_held_s

    def suspect(self, held: Sequence[Item], *, now_s: float) -> None:
        """Notes which items hold a worker now."""
        self._held = Counter(item.part for item in held)
        for part in self._held:
            self._parts[part].suspect_until_s = now_s + self.remembered_s

    def take(
        self, most: int, *, is_idle: bool, is_async: bool, num_slots: int, used: Counter[str], now_s: float
    ) -> list[Item]:
        """Removes and returns the next items for one worker.

        `is_idle`: the worker has no items. `is_async`: it computes several rewards at the same time; any
        other worker gets as many as take `_BATCH_S`, or one of a suspect part. `num_slots`: number of rewards
        that all workers compute at the same time. `used`: how many of these slots each part uses; updated.
        """
        in_use = {
            name
            for name, part in self._parts.items()
            if part.waiting or part.added_s + self.remembered_s > now_s
        }
        suspects = {name for name in in_use if self._parts[name].suspect_until_s > now_s}
        if len(in_use) == 1:
            suspects = set()
        num_left = min(1, len(in_use - suspects))
        taken: list[Item] = []
        num_bytes, seconds = 0, 0.0
        while len(taken) < most:
            has_room = sum(used[name] for name in suspects) < max(1, num_slots - num_left)
            queues = [
                part.waiting
                for name, part in self._parts.items()
                if part.waiting
                and (name not in suspects or (has_room and used[name] < max(1, num_slots - self._held[name])))
            ]
            if not queues:
                break
            queue = min(queues)
            item = queue[0]
            if not item.done.done():  # it is not scored yet, and still needed
                num_bytes += len(item.frame)
                seconds += self._parts[item.part].mean_s or _BATCH_S
                is_single = item.is_alone or (not is_async and item.part in suspects)
                is_full = num_bytes > _MAX_BATCH_BYTES or (not is_async and seconds > _BATCH_S)
                if (item.is_alone and not is_idle) or (taken and (is_single or is_full)):
                    break
                taken.append(item)
                used[item.part] += 1
                if is_single:
                    most = 1
            heapq.heappop(queue)
        return taken

    def take_all(self) -> list[Item]:
        """Removes and returns all items."""
        items = [item for part in self._parts.values() for item in part.waiting]
        for part in self._parts.values():
            part.waiting.clear()
        return items
