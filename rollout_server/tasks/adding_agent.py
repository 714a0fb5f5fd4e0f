"""The tool job's sums, solved by an agent of the OpenAI Agents SDK: `task.name=adding_agent`.

The prompts are those of `adding`. With `task.external=true` external agents make the samples, and the
server does not need the package (docs/guides/agents.md, benchmarks/agent_job.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.agents.base import Session
from rollout_server.tasks.adding import sum_example
from rollout_server.tasks.base import Example, Split, Task
from rollout_server.tasks.games import optional_package

_AGENT = "rollout_server.agents.adding"


@dataclass(frozen=True, kw_only=True)
class AddingAgentTask(Task):
    """Prompt `37+85+12`; the reward is 1 if the agent's final output is exactly `134`, else 0."""

    max_prompt_tokens: int = 32
    """Room for eight numbers with their signs, and the tools and roles of the chat format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.external:  # imported here, so that agent processes are forked with it
            optional_package(_AGENT, task="adding_agent", distribution="openai-agents")

    def example(self, split: Split, index: int) -> Example:
        return sum_example(self.seed, split, index)

    async def agent(self, example: Example, session: Session) -> float:
        from rollout_server.agents.adding import add_up

        return float(await add_up(str(example.prompt), session) == example.answer)
