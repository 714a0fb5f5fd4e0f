"""Sources of the rows to count: files, or the splits of a task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from areal_like.data import RowFormat, Rows
from areal_like.data.row_format import COMPLETION_KEYS, MESSAGES_KEYS, value_at
from areal_like.errors import RAISED_BY_TASKS, ConfigError
from rollout_server.data_stats.split import CountedRow
from rollout_server.tasks.base import Split, Task


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """The rows of a data set, read by a format."""

    name: str
    data: Rows
    format: RowFormat

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, count: int) -> Iterator[CountedRow | str]:
        """Yields the first `count` rows; for a row that cannot be used, the reason as text."""
        for index in range(count):
            row = self.data[index]
            try:
                yield CountedRow(
                    prompt=self.format.prompt_of(row),
                    answer=_text(self.format.answer_of(row)),
                    label=self.format.label_of(row),
                    response=self._response_of(row),
                )
            except ConfigError as error:
                yield _kind_of(error)

    def place(self, index: int) -> str:
        return self.data.place(index)

    def _response_of(self, row: dict[str, Any]) -> str | None:
        """Returns the text that supervised training would learn; None if the row has only a prompt."""
        keys = (self.format.completion_key, self.format.messages_key, *COMPLETION_KEYS, *MESSAGES_KEYS)
        if all(value_at(row, key) is None for key in keys if key):
            return None
        conversation = self.format.conversation_of(row)
        learned = zip(conversation.messages, conversation.is_learned, strict=True)
        return "\n".join(str(message["content"]) for message, is_learned in learned if is_learned)


@dataclass(frozen=True, kw_only=True)
class TaskSplit:
    """One split of a task. Its row numbers are the indices of its examples."""

    task: Task
    split: Split
    name: str
    most: int = sys.maxsize
    """Number of examples to use, from the first one."""

    def __len__(self) -> int:
        return min(self.most, self.task.num_train if self.split == "train" else self.task.num_eval)

    def rows(self, count: int) -> Iterator[CountedRow | str]:
        for index in range(count):
            try:
                example = self.task.example(self.split, index)
            except ConfigError as error:
                yield _kind_of(error)
            except RAISED_BY_TASKS as error:  # the other rows are still counted
                yield f"example() raised {type(error).__name__}"
            else:
                yield CountedRow(prompt=example.prompt, answer=_text(example.answer), label=example.label)

    def place(self, index: int) -> str:
        return f"{self.name}[{index}]"


RowSource = FileRows | TaskSplit
"""The rows of one split, by number."""


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr)


def _kind_of(error: ConfigError) -> str:
    """Returns the message without the parts that differ from row to row."""
    return str(error).partition("; the row has")[0].partition(", got ")[0]
