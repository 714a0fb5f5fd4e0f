"""Runs the conversation of a sample with its environment, until the environment or a budget ends it.

    reset -> [say -> step]* -> done
                 |       |---> episode.max_turns: TURNS;  rollout.sample_timeout_s: TIMEOUT
                 `-----------> no room for the turn: TOKENS, CONTEXT;  turn cut: LENGTH, TIMEOUT

If a budget runs out, the sample is truncated: it keeps the rewards so far and is trained on like any other.
If the environment raises, hangs or crashes, the sample fails. A turn that was cut off is not passed to the
environment, because its response to half a turn would be meaningless.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from areal_like.errors import EpisodeBudgetError, EpisodeError
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD, FinishReason
from rollout_server.conversation.conversation import Conversation
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.leases.held_leases import Place
from rollout_server.sample.attempt import Attempt, Played, SampleRequest
from rollout_server.workers.environment_pool import EnvironmentPool, EnvironmentSession

_MAX_METRICS = 64
"""Maximum number of metric names in one episode."""


class EnvironmentAttempt(Attempt):
    """A sample of a task with an environment."""

    def __init__(
        self,
        request: SampleRequest,
        *,
        conversation: Conversation,
        environments: EnvironmentPool,
        max_turns: int,
    ) -> None:
        super().__init__(request, conversation)
        self._conversation = conversation
        self._environments = environments
        self._max_turns = max_turns
        self._messages: list[Message] = []
        self._last: Reply | None = None
        self._step_rewards: list[float] = []
        self._num_tool_calls = 0
        self._metrics: dict[str, float] = {}
        """Sums of the environment's metrics over the steps."""
        self._generation_s = 0.0

    async def play(self) -> Played:
        """Runs the conversation with the environment."""
        request = self._request
        request.on_move(Place.TOOL)
        environment = await self._environments.open(
            split=request.split, index=request.index, seed=request.seed
        )
        try:
            finish_reason = await self._converse(environment)
        finally:
            environment.close()
        return Played(
            finish_reason=finish_reason,
            generation_s=self._generation_s,
            text=self._last.text if self._last is not None else "",
            raw_text=self._last.raw_text if self._last is not None else "",
            messages=self._messages,
            step_rewards=self._step_rewards,
            metrics={"tool_calls": float(self._num_tool_calls), **self._metrics},
        )

    async def _converse(self, environment: EnvironmentSession) -> FinishReason:
        """Returns why the conversation ended."""
        messages, tools = await environment.reset()
        self._label = environment.label
        self._messages += messages
        for _ in range(self._max_turns):
            self._request.on_move(Place.ENGINE)
            try:
                reply = await self._say(tools)
            except EpisodeBudgetError as error:
                return error.reason
            if reply.finish_reason is not FinishReason.STOP:
                return reply.finish_reason
            self._request.on_move(Place.TOOL)
            try:
                async with asyncio.timeout_at(self._request.policy.deadline_s):
                    step = await environment.step(reply)
            except TimeoutError:
                return FinishReason.TIMEOUT
            self._add(step)
            if step.done:
                return FinishReason.STOP
        return FinishReason.TURNS

    async def _say(self, tools: Sequence[dict[str, Any]]) -> Reply:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        reply = await self._conversation.say(self._messages, tools=tools)
        self._generation_s += loop.time() - started_s
        self._last = reply
        self._num_tool_calls += len(reply.tool_calls)
        self._messages.append(reply.message)
        return reply

    def _add(self, step: Step) -> None:
        self._messages += step.messages
        self._step_rewards.append(step.reward)
        for name, value in step.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        if len(self._metrics) > _MAX_METRICS:
            raise EpisodeError(f"the environment has more than {_MAX_METRICS} metrics in one episode")
        if abs(math.fsum(self._step_rewards)) > LARGEST_REWARD:
            raise EpisodeError(f"the rewards of the environment add up to more than {LARGEST_REWARD:g}")
        if max(map(abs, self._metrics.values()), default=0.0) > LARGEST_METRIC:
            raise EpisodeError(f"a metric of the environment adds up to more than {LARGEST_METRIC:.4g}")
