"""Statistics of one split, collected row by row in a few dozen bytes per row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout_server.data_stats.duplicates import PromptHashes
from rollout_server.environments.base import Message

PERCENTILES = (50, 90, 99)
MAX_LABELS = 50
"""Maximum number of labels in the output; the others are added up."""
MAX_PROBLEMS = 20
"""Maximum number of distinct problems; rows with further ones are counted together."""
_OTHERS = "(others)"
_NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedRow:
    """The parts of one row that are counted."""

    prompt: str | list[Message]
    answer: str = ""
    label: str = ""
    response: str | None = None
    """The text to learn, in data for supervised training."""


class SplitStats:
    """Add every row, in order, then read `summary`."""

    def __init__(
        self, *, max_prompt_tokens: int | None, count_tokens: Callable[[str | list[Message]], int] | None
    ) -> None:
        """`count_tokens` returns the number of tokens of a prompt and may raise ValueError; None: there is no
        tokenizer."""
        self._max_prompt_tokens, self._count_tokens = max_prompt_tokens, count_tokens
        self.hashes = PromptHashes()
        self._prompt_chars, self._prompt_tokens = array("I"), array("I")
        self._response_chars = array("I")
        self._labels: Counter[str] = Counter()
        self._problems: Counter[str] = Counter()
        self._problem_rows: dict[str, list[int]] = {}
        self._num_rows = self._num_without_answer = 0

    def add(self, row: CountedRow) -> None:
        text = text_of(row.prompt)
        self.hashes.add(text, answer=row.answer)
        self._prompt_chars.append(len(text))
        if row.response is not None:
            self._response_chars.append(len(row.response))
        if row.label:
            self._labels[row.label] += 1
        self._num_without_answer += not row.answer
        if not text.strip():
            self._note("the prompt is empty")
        elif self._count_tokens is not None:
            try:
                self._prompt_tokens.append(self._count_tokens(row.prompt))
            except ValueError:
                self._note("the chat template, or the model's vocabulary, cannot render the prompt")
        self._num_rows += 1

    def add_broken(self, problem: str) -> None:
        """Counts a row that cannot be used; it has no prompt to compare with others."""
        self.hashes.skip()
        self._note(problem)
        self._num_rows += 1

    def summary(self) -> dict[str, Any]:
        """Returns the numbers as JSON values. Lists of examples hold row numbers, starting at 0."""
        most_common = self._labels.most_common(MAX_LABELS)
        num_others = self._labels.total() - sum(count for _, count in most_common)
        return {
            "rows": self._num_rows,
            "prompt_chars": length_summary(self._prompt_chars),
            "prompt_tokens": length_summary(self._prompt_tokens, limit=self._max_prompt_tokens),
            "response_chars": length_summary(self._response_chars),
            "duplicates": self.hashes.duplicates(),
            "without_answer": self._num_without_answer,
            "labels": dict(most_common) | ({_OTHERS: num_others} if num_others else {}),
            "problems": {
                problem: {"rows": count, "examples": self._problem_rows[problem]}
                for problem, count in self._problems.most_common()
            },
        }

    def _note(self, problem: str) -> None:
        if problem not in self._problems and len(self._problems) >= MAX_PROBLEMS:
            problem = _OTHERS
        self._problems[problem] += 1
        examples = self._problem_rows.setdefault(problem, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(self._num_rows)


def text_of(prompt: str | list[Message]) -> str:
    """Returns the prompt's own text: for a list of messages, all but the system message, which is the same in
    all rows."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_content(message) for message in prompt if message.get("role") != "system")


def _content(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def length_summary(values: array[int], *, limit: int | None = None) -> dict[str, Any] | None:
    """Summarizes lengths: num, min, mean, p50, p90, p99 and max; None if there are no values.

    A percentile is the smallest length that at least this share of the rows does not exceed. `limit`: the
    largest length that can be used; `over` then counts the values above it.
    """
    if not values:
        return None
    lengths = np.frombuffer(values, dtype=np.uint32)
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    found: dict[str, Any] = {
        "num": len(lengths),
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 2),
        **{f"p{share}": int(value) for share, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(lengths.max()),
    }
    if limit is not None:
        found |= {"limit": limit, "over": int((lengths > limit).sum())}
    return found
