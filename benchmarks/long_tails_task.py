"""The adding task with a calculator whose latency has a long tail: the task of benchmarks/long_tails.py."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass

from areal_like import adding
from rollout_server.environments.base import Environment
from rollout_server.tasks.adding import AddingTask, Addition
from rollout_server.tasks.base import Example
from rollout_server.tools.tool import Tool

MEAN_CALLS = 2.3
"""Mean number of calls of a policy that adds all terms."""


@dataclass(frozen=True, kw_only=True)
class SlowAddingTask(AddingTask):
    """The calls of a training sample take `call_s` times a factor of mean 1, log-normal and cut off."""

    call_s: float = 1.0
    """Mean time of a call, in seconds. Calls for held-out prompts take no time, so that an evaluation does
    not fill slots."""
    spread: float = 1.0
    """Standard deviation of the log of a sample's factor."""
    longest: float = 4.0
    """Largest factor."""
    is_even: bool = False
    """True: no tail; the calls of a sample take the same time together, however many terms it has."""

    def environment(self, example: Example) -> Environment:
        """Returns a conversation with the slow calculator."""
        return SlowAddition(example, task=self)

    def call_time_s(self, terms: tuple[int, ...], *, seed: int) -> float:
        """Time of each call of the sample whose environment has this seed."""
        if adding.is_held_out(terms):
            return 0.0
        if self.is_even:
            return self.call_s * MEAN_CALLS / (len(terms) - 1)
        drawn = random.Random(seed).gauss(-(self.spread**2) / 2, self.spread)
        return self.call_s * min(self.longest, math.exp(drawn))


class SlowAddition(Addition):
    """An addition with a slow calculator. A sample with more terms makes more calls, so it takes longer."""

    def __init__(self, example: Example, *, task: SlowAddingTask) -> None:
        super().__init__(example, use_tool=False)
        self._task = task
        self._terms = tuple(map(int, str(example.prompt).split("+")))
        tool = Tool.of(self.add)
        self._tools, self.tools = {tool.name: tool}, [tool.schema]

    async def add(self, a: int, b: int) -> int:
        """Adds two whole numbers."""
        await asyncio.sleep(self._task.call_time_s(self._terms, seed=self.seed))
        return a + b
