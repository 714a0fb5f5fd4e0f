"""Environments, which a policy interacts with over several turns. Read this file before writing one.

    reset() -> messages -> [reply of the policy -> step(reply) -> messages]* -> done -> close()

An environment belongs to one sample and runs in a process of its own, so if it blocks, crashes or exceeds its
memory limit, only its sample fails. The rollout server renders the messages to tokens, samples the reply, and
adds up the rewards. A task returns the environment for an example:

    class Guess(Environment):
        def __init__(self, number: int) -> None:
            self.number = number

        async def reset(self) -> list[Message]:
            return [{"role": "user", "content": "Guess a number from 0 to 99."}]

        async def step(self, reply: Reply) -> Step:
            if reply.text.strip() == str(self.number):
                return Step(reward=1.0, done=True)
            return Step(messages=[{"role": "user", "content": "Wrong, guess again."}])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.trajectory import FinishReason

Message = dict[str, Any]
"""A chat message in OpenAI's format: `role`, `content`, and `tool_calls` or `tool_call_id` where needed."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool, as the policy wrote it."""

    id: str
    name: str
    arguments: str
    """JSON object as text. The policy sampled it, so it may be malformed."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One turn of the policy."""

    text: str
    """Text without special tokens, reasoning and tool calls."""
    raw_text: str
    """All sampled tokens as text, special tokens included."""
    reasoning: str = ""
    """Text inside the model's thinking markers."""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason
    """STOP, or the limit that ended the turn; the episode ends after a turn that hit a limit."""
    num_tokens: int
    """Number of sampled tokens."""

    @property
    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, kw_only=True)
class Step:
    """The environment's response to one turn."""

    messages: Sequence[Message] = ()
    """Messages that the policy reads before its next turn; at least one unless `done`."""
    reward: float = 0.0
    """Reward of the turn. The rewards of all turns add up to the sample's."""
    done: bool = False
    """True if the episode has ended."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Named numbers that are not part of the reward; they are summed over all turns."""


class Environment(ABC):
    """Base of all environments. One object serves one sample, in a process of its own."""

    tools: Sequence[dict[str, Any]] = ()
    """Tools that the policy may call, as OpenAI function schemas. Read after `reset`."""
    seed: int = 0
    """Differs between the samples of a group; set before `reset`. Python's and numpy's global random
    generators are also seeded with it."""

    @abstractmethod
    async def reset(self) -> list[Message]:
        """Returns the messages before the policy's first turn."""

    @abstractmethod
    async def step(self, reply: Reply) -> Step:
        """Responds to one turn of the policy."""

    def check(self) -> None:  # noqa: B027, most environments need nothing
        """Raises ConfigError if the environment needs something this machine does not have (a sandbox, a
        package).

        Called once when a rollout server starts, before `reset`, in the environment's process.
        """

    async def close(self) -> None:  # noqa: B027, most environments have nothing to free
        """Frees the episode's resources. Called at its end, even after an error."""


def messages_of(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
