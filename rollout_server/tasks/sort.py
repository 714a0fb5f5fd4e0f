"""The default job's task: sort a string of 4 to 8 digits; the reward is 1 or 0.

The generator is in `areal_like.sorting`, because the trainer's warm start draws from the same distribution
and may not import this package. Each multiset of digits belongs to one split, so no held-out answer occurs in
training.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like import sorting
from rollout_server.tasks.base import Example, Split, Task

_SPLITS = {"train": sorting.Split.TRAIN, "eval": sorting.Split.HELD_OUT}


@dataclass(frozen=True, kw_only=True)
class SortTask(Task):
    """Prompt `5203=`, answer `0235`."""

    max_prompt_tokens: int = sorting.MAX_DIGITS + 2
    """Room for eight digits, the equals sign, and a BOS token if the tokenizer adds one."""

    def example(self, split: Split, index: int) -> Example:
        example = sorting.sort_example(seed=self.seed, split=_SPLITS[split], index=index)
        return Example(prompt=example.prompt, answer=example.answer)

    def reward(self, example: Example, completion: str) -> float:
        return float(completion == example.answer)
