"""Runs an environment with replies written by a test, without a model or a job.

    episode = play(Guess(number=7), [say("5"), say("7")])
    assert episode.reward == 1.0 and episode.is_done

    episode = play(Product(6, 7), [call("calculator", expression="6 * 7"), say("42")])

Messages, tools, rewards and metrics have to pass the same checks as in a job. The environment runs in the
test's own process, so the limits of a job (`episode.step_timeout_s`, `episode.memory_mb`) do not apply.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Environment, Message, Reply, ToolCall
from rollout_server.environments.exchange import awaitable, checked_start, checked_step, step_fields


@dataclass
class Episode:
    """The record of one episode."""

    messages: list[Message]
    """The whole conversation, including the replies."""
    tools: list[dict[str, Any]]
    """The tools that the policy could call."""
    turn_rewards: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums over the turns."""
    is_done: bool = False
    """False if the replies ran out before the episode ended."""

    @property
    def reward(self) -> float:
        return sum(self.turn_rewards)


def say(text: str = "", *, calls: Iterable[tuple[str, dict[str, Any] | str]] = ()) -> Reply:
    """Makes a reply of the policy. `calls`: (tool, arguments), with arguments as a mapping or as text."""
    written = [(name, given if isinstance(given, str) else json.dumps(given)) for name, given in calls]
    made = [
        ToolCall(id=f"call_{number}", name=name, arguments=arguments)
        for number, (name, arguments) in enumerate(written)
    ]
    return Reply(
        text=text, raw_text=text, tool_calls=tuple(made), finish_reason=FinishReason.STOP, num_tokens=1
    )


def call(tool: str, **arguments: Any) -> Reply:
    return say(calls=[(tool, arguments)])


def play(environment: Environment, replies: Iterable[Reply], *, seed: int = 0) -> Episode:
    """Runs an episode until it is done or no replies are left.

    Raises EpisodeError where a job would fail the sample because of what the environment returned; exceptions
    of the environment itself are not caught.
    """
    return asyncio.run(_play(environment, replies, seed=seed))


async def _play(environment: Environment, replies: Iterable[Reply], *, seed: int) -> Episode:
    environment.seed = seed
    environment.check()
    try:
        messages = list(await awaitable(environment.reset(), call="reset"))
        episode = Episode(*checked_start([messages, list(environment.tools)]))
        for reply in replies:
            assert not episode.is_done, "the episode is done, but a reply is left"
            step = checked_step(step_fields(await awaitable(environment.step(reply), call="step")))
            episode.messages += [reply.message, *step.messages]
            episode.turn_rewards.append(step.reward)
            for name, value in step.metrics.items():
                episode.metrics[name] = episode.metrics.get(name, 0.0) + value
            episode.is_done = step.done
        return episode
    finally:
        await environment.close()
