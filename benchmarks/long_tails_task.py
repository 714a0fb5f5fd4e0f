"""The adding task with a calculator whose latency has a long tail: the task of benchmarks/long_tails.py."""

from __future__ import annotations

import asyncio
import math
import os
import random
from dataclasses import dataclass

from areal_like.adding import TOOL
from rollout_server.environments.base import Environment
from rollout_server.tasks.adding import AddingTask, Addition
from rollout_server.tasks.base import Example
from rollout_server.tools.tool import Tool


@dataclass(frozen=True, kw_only=True)
class SlowAddingTask(AddingTask):
    """The calls of a sample take `call_s` times a factor of mean 1, log-normal and cut off."""

    call_s: float = 0.3
    """Mean time of a call."""
    spread: float = 1.0
    """Standard deviation of the log of a sample's factor; 0: all calls take `call_s`."""
    longest: float = 8.0
    """Largest factor."""

    def environment(self, example: Example) -> Environment:
        """Returns a conversation whose calls all take the same, randomly drawn time."""
        return SlowAddition(example, call_s=self.call_s * self._factor(random.Random(os.urandom(8))))

    def _factor(self, random_: random.Random) -> float:
        return min(self.longest, math.exp(random_.gauss(-(self.spread**2) / 2, self.spread)))


class SlowAddition(Addition):
    """An addition with a slow calculator."""

    def __init__(self, example: Example, *, call_s: float) -> None:
        async def add(a: int, b: int) -> int:
            """Adds two whole numbers."""
            await asyncio.sleep(call_s)
            return a + b

        super().__init__(example, use_tool=False)
        tool = Tool.of(add)
        assert tool.name == TOOL
        self._tools, self.tools = {tool.name: tool}, [tool.schema]
