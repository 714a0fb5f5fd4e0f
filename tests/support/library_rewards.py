"""Reward functions as users write them, for tests of `task.reward`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout_server.rewards.library import Rewards, make_rewards, score_steps
from rollout_server.rewards.time_limit import reward_time_left_s
from rollout_server.tasks.base import Completion, Example, Score, Split, Task


def score(completion: str, answer: str, **row: Any) -> float:
    """The five lines of the guide."""
    return float(completion.strip() == answer)


async def awaited(completion: str, level: int) -> dict[str, float]:
    """Named parts after a wait; needs the column `level`."""
    await asyncio.sleep(0.01)
    return {"length": len(completion) / 10, "level": float(level)}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """With the arguments of verl's reward functions."""
    return float(solution_str == ground_truth) + len(data_source) + extra_info["bonus"]


def scaled(completion: str, *, factor: float = 1.0) -> Score:
    """With a setting; a reward for each turn."""
    return Score(value=factor, metrics={"chars": len(completion)}, turns=(1.0, 2.0))


def misbehaves(completion: str) -> Any:
    """In the way that the completion names."""
    match str(completion):
        case "nan":
            return float("nan")
        case "inf":
            return {"a": float("inf")}
        case "raise":
            raise LookupError("no such move")
        case "rubbish":
            return "good"
        case "hang":
            time.sleep(3600)
    return 0.5


async def misbehaves_later(completion: str) -> Any:
    """As `misbehaves`, in a coroutine."""
    if completion == "hang":
        await asyncio.sleep(3600)
    return misbehaves(completion)


def seconds_left(completion: str) -> float:
    return reward_time_left_s()


async def seconds_left_later(completion: str) -> float:
    return reward_time_left_s()


def positional(text: str, gold: str) -> float:
    """Its arguments have no known name."""
    return 0.0


not_a_function = 3


def of_words(completion: Completion, reward: float = 1.0) -> Score:
    """A reward for each word of the completion."""
    return Score(steps=[(word, reward) for word in completion.split()])


def by_step_model(completion: Completion, prompt: str) -> Score:
    """The values of a process reward model for the paragraphs."""
    steps = [paragraph for paragraph in completion.split("\n\n") if paragraph.strip()]
    values = score_steps(prompt, steps, model=os.environ["PRM"])
    return Score(steps=list(zip(steps, values, strict=True)))


def last_character(completion: Completion) -> Score:
    """A reward for the whole completion, as its only step."""
    return Score(steps=[(len(completion), 1.0)])


@dataclass(frozen=True, kw_only=True)
class Rewarded(Task):
    """A task whose reward is a setting, as that of `task.name=data`."""

    reward_spec: Any = "exact"
    row: Mapping[str, Any] = field(default_factory=dict)
    answer: Any = "4"

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="2+2=", answer=self.answer, metadata=self.row)

    @property
    def _rewards(self) -> Rewards:
        if "made" not in self.__dict__:
            self.__dict__["made"] = make_rewards(self.reward_spec, sandbox=self.sandbox)
        made: Rewards = self.__dict__["made"]
        return made

    @property
    def has_async_reward(self) -> bool:
        return self._rewards.is_async

    def reward(self, example: Example, completion: Completion) -> Any:
        return self._rewards.score(example, completion)
