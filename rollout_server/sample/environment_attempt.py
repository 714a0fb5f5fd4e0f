"""The conversation of one sample with its environment, until the environment or a budget ends it.

    reset -> [say -> step]* -> done
                 |       |---> episode.max_turns: TURNS;  rollout.sample_timeout_s: TIMEOUT
                 `-----------> no room for the turn: TOKENS, CONTEXT;  turn cut: LENGTH, TIMEOUT

A budget that runs out makes a truncated sample with the rewards so far, which is trained on like any other.
An environment that raises, hangs or crashes is a failed sample. A turn that was cut is not passed to the
environment: what it would answer to half a turn is nothing to learn from.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from areal_like.errors import RAISED_BY_TASKS, EngineError, EpisodeBudgetError, EpisodeError, RewardError
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD, FinishReason, Trajectory
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.scoring import Outcome, add_up
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.leases.held_leases import Place
from rollout_server.sample.attempt import Attempt, SampleRequest
from rollout_server.tasks.base import Completion
from rollout_server.workers.environment_pool import EnvironmentPool, EnvironmentSession
from rollout_server.workers.reward_pool import Reward, RewardPool

_MAX_METRICS = 64
"""Names of metrics in one episode."""


class EnvironmentAttempt(Attempt):
    """One sample of a task with an environment."""

    def __init__(
        self,
        request: SampleRequest,
        *,
        environments: EnvironmentPool,
        conversation: Conversation,
        rewards: RewardPool | None,
        max_turns: int,
    ) -> None:
        """`rewards`: None if the task has no reward besides those of its environment's steps."""
        self._request = request
        self._environments = environments
        self._conversation = conversation
        self._rewards = rewards
        self._max_turns = max_turns
        self._label = ""
        self._messages: list[Message] = []
        self._last: Reply | None = None
        self._step_rewards: list[float] = []
        self._num_tool_calls = 0
        self._metrics: dict[str, float] = {}
        """Sums of the environment's metrics."""
        self._generation_s = 0.0

    async def make(self) -> Trajectory:
        """As Attempt.make."""
        finish_reason = await self._run()
        conversation, request = self._conversation, self._request
        scored = await self._score(finish_reason) if self._rewards is not None else None
        num_turns = len(conversation.turn_lengths)
        try:
            outcome = add_up(
                scored.score if scored is not None else None,
                num_turns=num_turns,
                step_rewards=self._step_rewards,
                step_metrics={"tool_calls": float(self._num_tool_calls), **self._metrics},
            )
        except ValueError as error:
            raise RewardError(str(error)) from None
        try:
            return conversation.to_trajectory(
                outcome,
                finish_reason=finish_reason,
                generation_s=self._generation_s,
                reward_s=scored.seconds if scored is not None else 0.0,
                is_greedy=request.is_greedy,
                label=self._label,
            )
        except ValueError as error:
            raise EngineError(f"the engine's answer cannot be used: {error}") from None

    @property
    def num_sampled(self) -> int:
        """As Attempt.num_sampled."""
        return self._conversation.num_sampled

    def without_reward(self) -> Trajectory:
        """As Attempt.without_reward."""
        return self._conversation.to_trajectory(
            Outcome(), is_greedy=self._request.is_greedy, label=self._label
        )

    async def _score(self, finish_reason: FinishReason) -> Reward:
        assert self._rewards is not None and self._last is not None
        self._request.on_move(Place.REWARD)
        conversation = self._conversation
        completion = Completion(
            self._last.text,
            raw_text=self._last.raw_text,
            messages=self._messages,
            token_ids=conversation.token_ids,  # type: ignore[arg-type]  # an array is as good as a sequence
            turn_lengths=conversation.turn_lengths,
            finish_reason=finish_reason,
        )
        return await self._rewards.score(
            split=self._request.split, index=self._request.index, completion=completion
        )

    async def _run(self) -> FinishReason:
        """Raises EngineError, or EpisodeError for any other exception."""
        request = self._request
        request.on_move(Place.TOOL)
        try:
            environment = await self._environments.open(
                split=request.split, index=request.index, seed=request.seed
            )
            try:
                return await self._converse(environment)
            finally:
                environment.close()
        except (EngineError, EpisodeError):
            raise
        except RAISED_BY_TASKS as error:  # only its own sample fails
            raise EpisodeError(f"the episode raised {type(error).__name__}: {error}") from error

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
