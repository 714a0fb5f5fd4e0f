"""The reward that compares a completion with the answer: 1 if they are equal, else 0.

By default only white space at the ends is ignored. Settings define which part of the completion is the
answer, and how the two are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.rewards.library.answers import after_marker, last_line
from rollout_server.rewards.library.matching import Matcher
from rollout_server.tasks.base import Completion, Example, Score


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

    @property
    def own_name(self) -> str:
        """`exact`."""
        return "exact"

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
