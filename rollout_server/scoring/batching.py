"""Chooses the texts of one forward pass. Pure: no threads, no clock, no model.

    waiting, oldest first -> the first _WINDOW -> sorted by length -> the oldest and its neighbours

The oldest text is in every batch, so none is passed over for ever. Its neighbours in length are added as long
as the padded batch has at most `max_tokens` tokens, those first that add the least padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_WINDOW = 512
"""Number of oldest texts from which a batch is chosen."""


@dataclass(eq=False)
class Waiting:
    """One text that waits for its score."""

    tokens: list[int]
    """Token ids, at least one."""
    deadline_s: float
    """When nobody waits for its score any more."""
    done: Any = field(default=None, repr=False)
    """What is told about the result."""


class BatchQueue:
    """The texts that wait, oldest first."""

    def __init__(self, *, max_waiting: int, max_tokens: int) -> None:
        """`max_tokens`: of one batch, padding included."""
        self._max_waiting, self._max_tokens = max_waiting, max_tokens
        self._waiting: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, text: Waiting) -> bool:
        """Appends a text; returns False if the queue is full."""
        if len(self._waiting) >= self._max_waiting:
            return False
        self._waiting.append(text)
        return True

    def take_late(self, *, now_s: float) -> list[Waiting]:
        """Removes and returns the texts whose deadline is over."""
        late = [text for text in self._waiting if text.deadline_s <= now_s]
        self._remove(late)
        return late

    def take_all(self) -> list[Waiting]:
        """Removes and returns all texts."""
        texts = list(self._waiting)
        self._waiting.clear()
        return texts

    def take_batch(self) -> list[Waiting]:
        """Removes and returns the texts of the next forward pass, shortest first; empty if none waits."""
        if not self._waiting:
            return []
        oldest = self._waiting[0]
        window = [self._waiting[at] for at in range(min(_WINDOW, len(self._waiting)))]
        ordered = sorted(window, key=lambda text: len(text.tokens))
        first = last = ordered.index(oldest)
        while True:
            longest, num = len(ordered[last].tokens), last - first + 1
            shorter = len(ordered[first - 1].tokens) if first else None
            longer = len(ordered[last + 1].tokens) if last + 1 < len(ordered) else None
            choices = []
            if shorter is not None and longest * (num + 1) <= self._max_tokens:
                choices.append((longest - shorter, -1))
            if longer is not None and longer * (num + 1) <= self._max_tokens:
                choices.append(((longer - longest) * num, 1))
            if not choices:
                break
            if min(choices)[1] < 0:
                first -= 1
            else:
                last += 1
        batch = ordered[first : last + 1]
        self._remove(batch)
        return batch

    def _remove(self, texts: Iterable[Waiting]) -> None:
        gone = {id(text) for text in texts}
        if gone:
            self._waiting = deque(text for text in self._waiting if id(text) not in gone)
