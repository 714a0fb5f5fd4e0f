"""Comparison with a reference answer: settings that the rewards `exact` and `regex` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.rewards.library.answers import number_in
from rollout_server.rewards.library.base import RewardFunction, place_of
from rollout_server.tasks.base import Example


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
