"""Rewards that compare a completion with the answer or a pattern: 1 if they match, else 0.

`exact` compares the completion, or a part of it, with the answer; by default only white space at the ends is
ignored. `regex` matches a pattern, or compares the text that it captures. A pattern can take exponential time
on some texts. The reward's time limit then applies, as for any reward that hangs (`rollout.reward_timeout_s`,
`buffer.on_failure.reward_timeout`).
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.rewards.library.answers import after_marker, last_line, number_in
from rollout_server.rewards.library.base import RewardFunction, place_of
from rollout_server.tasks.base import Completion, Example, Score


@dataclass(frozen=True, kw_only=True)
class Matcher(RewardFunction):
    """Compares a text with the answer, or with each answer of a list."""

    ignore_case: bool = False
    """True: upper and lower case are equal."""
    strip: bool = True
    """True: white space at both ends is ignored."""
    collapse_spaces: bool = False
    """True: any run of white space counts as one space."""
    numbers: bool = False
    """True: numbers are compared by value: `1,234.0` equals `1234`, `$3` equals `3`, `1/2` equals `0.5`."""

    def equals_answer(self, text: str, example: Example) -> bool:
        """True if the text equals one of the answers. Raises ValueError for a row without an answer."""
        is_list = isinstance(example.answer, Sequence) and not isinstance(example.answer, str)
        answers = list(example.answer) if is_list else [example.answer]
        if not answers or any(answer is None for answer in answers):
            # Otherwise the task could not be solved, and that would go unnoticed.
            raise ValueError(f"{place_of(example)} has no reference answer to compare with")
        return any(self._are_equal(text, self.final_part(str(answer))) for answer in answers)

    def final_part(self, answer: str) -> str:
        """Returns the part of a row's answer that is compared."""
        return answer

    def _are_equal(self, text: str, answer: str) -> bool:
        if self.numbers:
            left, right = number_in(text), number_in(answer)
            if left is not None and right is not None:
                return left == right
        return self._normal(text) == self._normal(answer)

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()) if self.collapse_spaces else text
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True, kw_only=True)
class Exact(Matcher):
    """`{name: exact, after: "####", numbers: true}`."""

    after: str = ""
    """Only the text after the last of these markers counts: `####` (the rest of the line), `<answer>` (up to
    `</answer>`), `\\\\boxed{` (up to its closing brace). Without the marker the reward is 0. If a row's
    answer has the marker (as in GSM8K), only the text after it counts there, too."""
    last_line: bool = False
    """Only the last non-empty line counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after and not self.after.strip():
            raise ConfigError("task.reward.after: white space alone is not a marker")

    def score(self, example: Example, completion: Completion) -> Score:
        """Returns 1.0 or 0.0; with `after`, the metric `found` is 1 if the completion has the marker."""
        text: str | None = str(completion)
        metrics = {}
        if self.after:
            text = after_marker(str(completion), self.after)
            metrics["found"] = float(text is not None)
        if text is not None and self.last_line:
            text = last_line(text)
        is_equal = self.equals_answer(text or "", example) and text is not None
        return Score(value=float(is_equal), metrics=metrics)

    def final_part(self, answer: str) -> str:
        """Returns the text after the marker, or the whole answer."""
        found = after_marker(answer, self.after) if self.after else None
        return answer if found is None else found


@dataclass(frozen=True, kw_only=True)
class Regex(Matcher):
    """`{name: regex, pattern: "Answer: (.+)", group: 1}`."""

    pattern: str
    """The pattern, in Python's syntax; `.` matches line breaks only with `(?s)`."""
    group: int | str = ""
    """Number or name of the group that must equal the answer; empty: the pattern only has to match (a format
    reward)."""
    whole: bool = False
    """True: the pattern must match the whole completion, ignoring white space at its ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            compiled = self._compiled
        except re.error as error:
            raise ConfigError(f"task.reward.pattern={self.pattern}: {error}") from None
        known = [*range(compiled.groups + 1), *compiled.groupindex]
        if self.group != "" and self.group not in known:
            raise ConfigError(f"task.reward.group={self.group}: the pattern has {', '.join(map(str, known))}")

    def score(self, example: Example, completion: Completion) -> Score:
        """Returns 1.0 or 0.0 for the last match; with `group`, the metric `found` is 1 if there is a
        match."""
        if self.whole:
            match = self._compiled.fullmatch(completion.strip())
        else:
            last = deque(self._compiled.finditer(completion), maxlen=1)
            match = last[0] if last else None
        if self.group == "":
            return Score(value=float(match is not None))
        text = None if match is None else match[self.group]
        is_equal = self.equals_answer(text or "", example) and text is not None
        return Score(value=float(is_equal), metrics={"found": float(match is not None)})

    @functools.cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
