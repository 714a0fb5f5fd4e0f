"""The tool task of the real model's study: expressions and a calculator, by SmolLM2's chat template.

The template renders roles and texts, and no schemas of tools. So the system prompt describes the calculator.
A call is text of a reply, from which the rollout server parses it as from any model's, and its result is a
message of the role `tool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_server.environments.base import Environment, Message, Reply, messages_of
from rollout_server.tasks.base import Example
from rollout_server.tasks.data.task import DataTask
from rollout_server.tools.calculator import calculator
from rollout_server.tools.environment import ToolEnvironment


@dataclass(frozen=True, kw_only=True)
class CalculatorTask(DataTask):
    """Rows of files, whose prompts the policy may answer with the help of the calculator.

    The reward of the settings (`exact`) compares the last reply.
    """

    def environment(self, example: Example) -> Environment:
        """Returns a conversation that ends with a reply without a call."""
        return Calculations(messages_of(example.prompt))


class Calculations(ToolEnvironment):
    """Runs the calls of a reply, and has no reward of its own."""

    def __init__(self, prompt: Sequence[Message]) -> None:
        super().__init__(prompt, [calculator])
        self.tools = []  # the chat template renders no schemas, and tools with schemas would be refused

    async def final(self, reply: Reply) -> float:
        return 0.0
