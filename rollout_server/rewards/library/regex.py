"""The reward for a regular expression: 1 if it matches, or if the captured text equals the answer.

A pattern can take exponential time on some texts. The reward's time limit then applies, as for any reward
that hangs (`rollout.reward_timeout_s`, `buffer.on_failure.reward_timeout`).
"""

from __future__ import annotations

import functools
import re
from collections import deque
from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.rewards.library.matching import Matcher
from rollout_server.tasks.base import Completion, Example, Score


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

    @property
    def own_name(self) -> str:
        """`regex`."""
        return "regex"

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
