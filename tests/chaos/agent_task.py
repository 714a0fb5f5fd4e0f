"""A task with a slow agent, in a module that its processes import quickly."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from rollout_server.agents.base import Session
from rollout_server.tasks.base import Example, Split, Task
from tests.support.agent_tasks import chat, said

_PAUSE_S = 0.3
_MAX_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class SlowAgentTask(Task):
    """The reward is the number of turns."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{split} {index}", answer=None)

    async def agent(self, example: Example, session: Session) -> float:
        num_turns = random.randint(1, _MAX_TURNS)
        messages = [said(str(example.prompt))]
        for turn in range(num_turns):
            chat(messages)
            messages.append(said(f"tool {turn}"))
            await asyncio.sleep(_PAUSE_S * random.uniform(0.5, 1.5))
        return float(num_turns)
