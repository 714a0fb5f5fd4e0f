"""The tool job's task: sums of many numbers, with a calculator that adds two numbers; the reward is 1 or 0.

The generator is in `areal_like.adding`, because the trainer's warm start draws from the same distribution and
may not import this package. Each multiset of terms belongs to one split, so no held-out sum of these numbers
occurs in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like import adding
from areal_like.sorting import Split as Stream
from rollout_server.environments.base import Environment, Reply
from rollout_server.tasks.base import Example, Split, Task
from rollout_server.tools.environment import ToolEnvironment

_STREAMS = {"train": Stream.TRAIN, "eval": Stream.HELD_OUT}


@dataclass(frozen=True, kw_only=True)
class AddingTask(Task):
    """Prompt `37+85+12`, answer `134`, in as many turns as there are terms."""

    max_prompt_tokens: int = 32
    """Room for eight numbers with their signs, and the tools and roles of the chat format."""
    use_tool: bool = True
    """False: the same prompts without the calculator; the first reply is the final one."""

    def example(self, split: Split, index: int) -> Example:
        return sum_example(self.seed, split, index)

    def environment(self, example: Example) -> Environment:
        """Returns a conversation with the calculator, which ends with a reply that does not call it."""
        return Addition(example, use_tool=self.use_tool)


class Addition(ToolEnvironment):
    """Reward 1 if the last reply is exactly the sum."""

    def __init__(self, example: Example, *, use_tool: bool) -> None:
        super().__init__(example.prompt, [add] if use_tool else [])
        self._total = example.answer

    async def final(self, reply: Reply) -> float:
        return float(reply.text == self._total)


def sum_example(seed: int, split: Split, index: int) -> Example:
    example = adding.add_example(seed=seed, split=_STREAMS[split], index=index)
    return Example(prompt=example.prompt, answer=example.answer)


async def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b
