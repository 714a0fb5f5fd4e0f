r"""smolagents' CodeAgent as a task's agent: its own prompt of two thousand tokens, for a small real model.

    areal-like run model=smollm2 task._target_=benchmarks.code_agent.CodeAgentTask rollout.max_context=4096 \
        episode.max_tokens=12288 episode.max_turns=4 sampling.max_new_tokens=48 sampling.group_size=2 \
        trainer.groups_per_step=2 trainer.num_steps=2 trainer.entropy_coef=1e-6 eval.num_prompts=1 \
        rollout.max_running=4 rollout.queue_samples=0 buffer.retain_trajectories=true

The policy's code is run by the framework's
own interpreter, which has no file and no network functions, in the agent's process.
"""

from __future__ import annotations

from dataclasses import dataclass

from smolagents import CodeAgent, OpenAIModel

from rollout_server.agents.base import Session
from rollout_server.tasks.base import Example, Score, Split, Task


@dataclass(frozen=True, kw_only=True)
class CodeAgentTask(Task):
    """A product of two numbers; the reward is 1 if the agent's final answer is correct."""

    max_steps: int = 2
    """Maximum steps of the agent, which is then asked once more for its answer."""
    max_prompt_tokens: int = 64

    def example(self, split: Split, index: int) -> Example:
        """Odd numbers are held out."""
        rng = self.rng(split, index)
        a, b = 2 * rng.randrange(50) + (split == "eval"), rng.randrange(100)
        return Example(prompt=f"How much is {a} * {b}?", answer=str(a * b))

    async def agent(self, example: Example, session: Session) -> Score:
        """Runs smolagents."""
        model = OpenAIModel("policy", api_base=session.base_url, api_key=session.api_key)
        agent = CodeAgent(tools=[], model=model, max_steps=self.max_steps, verbosity_level=0)
        answer = agent.run(str(example.prompt))
        steps = len(agent.memory.steps)
        return Score(value=float(str(answer).strip() == example.answer), metrics={"agent_steps": steps})
