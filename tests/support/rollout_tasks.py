"""Tasks that misbehave, in a module that reward workers import quickly."""

import time
from dataclasses import dataclass

from rollout_server.tasks.base import Example, Split, Task


@dataclass(frozen=True, kw_only=True)
class Moody(Task):
    """Prompt 0 is rewarded, 1 raises, 2 hangs, 7 has no example, 9 hangs before it has one."""

    def example(self, split: Split, index: int) -> Example:
        if index == 7:
            raise LookupError("no such example")
        if index == 9:
            time.sleep(3600)
        return Example(prompt=f"{index}=", answer=index)

    def reward(self, example: Example, completion: str) -> float:
        if example.answer == 1:
            raise RuntimeError("cannot judge this")
        if example.answer == 2:
            time.sleep(3600)
        return 0.5


@dataclass(frozen=True, kw_only=True)
class Checksum(Task):
    """Sorting prompts whose reward an untrained model varies: groups with spread, and so gradients, from the first step on."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="".join(self.rng(split, index).choices("0123456789", k=4)) + "=", answer=None)

    def reward(self, example: Example, completion: str) -> float:
        return sum(map(ord, completion)) % 7 / 6


@dataclass(frozen=True, kw_only=True)
class Unhurried(Checksum):
    """Rewards that take time and no processor: while a job waits for them, others can start."""

    def reward(self, example: Example, completion: str) -> float:
        time.sleep(0.03)
        return super().reward(example, completion)
