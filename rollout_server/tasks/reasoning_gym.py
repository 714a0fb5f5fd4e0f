"""The task for any data set of the package `reasoning_gym`, with that package's generator and scorer.

reasoning_gym seeds example i with `seed + i`, so the two splits use two seeds that are far apart. A data set
with only a few distinct questions can still have the same question in both splits. The package is an optional
extra, imported when the task is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from areal_like.errors import ConfigError
from rollout_server.tasks.base import Example, Split, Task
from rollout_server.tasks.games import optional_package

_EVAL_SEED_OFFSET = 1_000_000_000
"""Larger than any realistic num_train; seed + offset + index still fits numpy's 32-bit seeds."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGymTask(Task):
    """`task: {name: reasoning_gym, dataset: chain_sum, params: {max_terms: 3}}`."""

    dataset: str = ""
    """Name of a data set in reasoning_gym."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that data set."""
    system_prompt: str = "simple"
    """Key of reasoning_gym's SYSTEM_PROMPTS, or the text of a prompt; empty for no system prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < _EVAL_SEED_OFFSET or self.num_train > _EVAL_SEED_OFFSET:
            raise ConfigError(
                "task reasoning_gym: seed must be in 0 .. 999999999 and num_train at most 1000000000"
            )
        gym = optional_package("reasoning_gym", task="reasoning_gym", distribution="'areal-like[tasks]'")
        names = importlib.import_module("reasoning_gym.factory").DATASETS
        if self.dataset not in names:
            raise ConfigError(f"task.dataset={self.dataset!r}: reasoning_gym has {', '.join(sorted(names))}")
        try:
            gym.create_dataset(self.dataset, seed=self.seed, size=1, **self.params)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"task.params for reasoning_gym's {self.dataset}: {error}") from error

    @cached_property
    def _splits(self) -> dict[Split, Any]:
        gym = importlib.import_module("reasoning_gym")
        return {
            "train": gym.create_dataset(self.dataset, seed=self.seed, size=self.num_train, **self.params),
            "eval": gym.create_dataset(
                self.dataset, seed=self.seed + _EVAL_SEED_OFFSET, size=self.num_eval, **self.params
            ),
        }

    @cached_property
    def _system(self) -> str:
        prompts = importlib.import_module("reasoning_gym.utils").SYSTEM_PROMPTS
        return str(prompts.get(self.system_prompt, self.system_prompt))

    def example(self, split: Split, index: int) -> Example:
        """Returns the question as chat messages; `metadata["entry"]` is the record for the scorer."""
        entry = self._splits[split][index]
        messages = [{"role": "user", "content": entry["question"]}]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return Example(prompt=messages, answer=entry["answer"], metadata={"entry": entry})

    def reward(self, example: Example, completion: str) -> float:
        """Returns reasoning_gym's score in 0 .. 1 for the last `<answer>`, or for the whole completion."""
        answer = importlib.import_module("reasoning_gym.utils").extract_answer(completion)
        scored = completion.strip() if answer is None else answer
        return float(self._splits["train"].score_answer(answer=scored, entry=example.metadata["entry"]))
