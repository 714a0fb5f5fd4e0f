"""The interface of the library's rewards: `task.reward` names one, or a list of them with weights.

A reward is a frozen dataclass; its fields are its settings, so a misspelled one is refused by name. It does
not depend on a task: it gets the example and the completion. `sum.py` creates and adds up several.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.tasks.base import Completion, Example, Rewarded


@dataclass(frozen=True, kw_only=True)
class RewardFunction(ABC):
    """One entry of `task.reward`."""

    weight: float = 1.0
    """Factor of this reward in the sum. 0: the reward is only a metric, and its failure does not fail the
    sample."""
    part: str = ""
    """Name of this part in metrics; empty: the reward's own name."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"task.reward.weight={self.weight}: must be a finite number")

    @property
    def own_name(self) -> str:
        """Default name of the part, used if `part` is empty."""
        return type(self).__name__.lower()

    @property
    def is_async(self) -> bool:
        """True if `score` returns an awaitable."""
        return inspect.iscoroutinefunction(self.score)

    def check(self) -> None:  # noqa: B027, most rewards need nothing
        """Raises ConfigError if this machine lacks what the reward needs. Called when a server starts."""

    @abstractmethod
    def score(self, example: Example, completion: Completion) -> Rewarded | Awaitable[Rewarded]:
        """Returns the reward of a completion, in one of the forms that `Task.reward` may return."""


def place_of(example: Example) -> str:
    """Identifies an example in errors: the place of its row (`train.jsonl:17`), or its answer."""
    place = example.metadata.get("place")
    return str(place) if place else f"the example with the answer {str(example.answer)[:80]!r}"
