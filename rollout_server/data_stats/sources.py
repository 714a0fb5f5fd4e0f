"""The rows to count: of files, or of a task's splits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_server.data_stats.split import Row
from rollout_server.tasks.base import Split, Task


class Source(Protocol):
    """Rows of one split by number."""

    @property
    def name(self) -> str:
        """What the split is called."""

    def __len__(self) -> int:
        """Number of rows."""

    def rows(self, count: int) -> Iterator[Row | str]:
        """The first `count` rows; a text instead of a row that cannot be used: the reason."""

    def place(self, index: int) -> str:
        """Where a row stands, for a reader."""


@dataclass(frozen=True)
class TaskSplit:
    """One split of a task. Its row numbers are the indices of its examples."""

    task: Task
    split: Split

    @property
    def name(self) -> str:
        """`train` or `eval`."""
        return self.split

    def __len__(self) -> int:
        return self.task.num_train if self.split == "train" else self.task.num_eval

    def rows(self, count: int) -> Iterator[Row | str]:
        """See `Source`."""
        for index in range(count):
            try:
                example = self.task.example(self.split, index)
            except Exception as error:  # a task's code may raise anything; the other rows are still counted
                yield f"example() raised {type(error).__name__}"
                continue
            yield Row(
                prompt=example.prompt, answer=_text(example.answer), label=getattr(example, "label", "")
            )

    def place(self, index: int) -> str:
        """See `Source`."""
        return f"{self.split}[{index}]"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr)
