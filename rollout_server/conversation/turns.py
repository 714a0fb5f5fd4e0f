"""Samples the turns of one sample as a tree of token sequences, and converts the tree to a trajectory.

Each path from a root to a leaf is a segment. The tokens of a turn that several segments share count as
sampled in the first of them, and as context in the others. A sample of one prompt and one completion is a
tree with a single turn.

The score of the task, and the rewards of an environment's or agent's turns, become the rewards of that
trajectory. In the arrays of a branched conversation turns may be in another order than they were sampled in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import (
    LARGEST_REWARD,
    NOT_SAMPLED,
    STEP_ENDS,
    STEP_REWARDS,
    TOKEN_REWARDS,
    FinishReason,
    Trajectory,
)
from areal_like.wire.routes import Routes
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.environments.base import Message, Reply
from rollout_server.policy.generation import Generation
from rollout_server.tasks.base import Score

Span = tuple[int, int]
"""(first, end) of the sampled tokens of one turn in the arrays of a trajectory; `end` is exclusive."""


@dataclass(frozen=True, kw_only=True)
class SampleRewards:
    """The rewards of one sample, added up. Turns are numbered in the order in which they were sampled.

    score.value                          -> part of Trajectory.reward, credited to the last sampled token
    score.turns + rewards of the steps   -> Trajectory.turns: (end, reward) of each turn
    score.tokens                         -> Trajectory.arrays[TOKEN_REWARDS]: a reward for each token
    score.steps                          -> Trajectory.arrays[STEP_ENDS, STEP_REWARDS]: of the last turn
    """

    reward: float = 0.0
    """The total: the score's value, and the rewards of all turns, tokens and steps."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """`Score.parts`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the environment and of the score; the score's win if both have the same name."""
    turn_rewards: tuple[float, ...] = ()
    """One reward per turn, in the order of sampling; empty: no turn has one."""
    token_rewards: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """[S] one for each sampled token, in the order of sampling; empty: no token has one."""
    steps: tuple[tuple[int, float], ...] = ()
    """(end, reward) of the steps of the last turn, in order; `end` counts the sampled tokens of the turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One turn of the policy. All arrays cover only its own tokens."""

    parent: Turn | None
    """The turn whose tokens precede `context`; None: this turn starts a segment."""
    context: NDArray[np.int32]
    """[C] tokens between the parent and this turn."""
    sampled: NDArray[np.int32]
    """[S] sampled tokens of the turn."""
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    end: int
    """Number of tokens from the start of the segment through the end of this turn."""
    messages: list[Message] = field(default_factory=list)
    """The whole conversation, ending with this turn's reply; empty for a prompt given as tokens."""
    routes: Routes | None = None
    """Of the tokens from the last one of the parent (without a parent: from the first) to the last but one of
    this turn: those that went through the model for the first time in this turn."""

    @property
    def path(self) -> list[Turn]:
        """The turns of the segment up to and including this one."""
        turns, turn = [self], self.parent
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[end] all tokens of the segment through the end of this turn."""
        return np.concatenate([array for turn in self.path for array in (turn.context, turn.sampled)])


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTurn:
    """One sampled turn: the parsed reply and its tokens."""

    reply: Reply
    prompt_ids: NDArray[np.int32]
    """[P] tokens of the prompt, as sent to the engine."""
    token_ids: NDArray[np.int32]
    """[S] the sampled tokens."""
    logprobs: NDArray[np.float32]
    """[S] log-probs of the sampled tokens."""
    turn: Turn | None
    """None if nothing was sampled."""
    state: bytes = b""
    """Digest by which the conversation through this turn is recognized; empty for a prompt given as
    tokens."""


class Turns:
    """The turns of one sample so far. Belongs to one event loop; several may be sampled concurrently."""

    def __init__(self, policy: PolicyClient) -> None:
        self._policy = policy
        self._turns: list[Turn] = []
        """In the order in which they finished, so a turn comes after its parent."""
        self._running: list[tuple[Turn | None, int]] = []
        """The turns being sampled: parent, and length of the segment if the turn reaches its limit."""
        self._busy_since_s = 0.0
        self.generation_s = 0.0
        """Time with at least one turn at the engine or waiting for it, in seconds."""
        self.finish_reason = FinishReason.STOP
        """Reason why the last turn ended."""

    async def sample(
        self,
        prompt: NDArray[np.int32],
        parent: Turn | None = None,
        *,
        limit: tuple[int, FinishReason] | None = None,
        **options: Any,
    ) -> tuple[Generation, Turn | None]:
        """Samples the policy's next turn after these tokens, which start with those of `parent`.

        `limit`: maximum number of tokens, and the finish reason if it is reached. `options` and errors: see
        PolicyClient.sample. The returned turn is None if nothing was sampled.
        """
        num_tokens, reason = limit or (self._policy.max_new_tokens, FinishReason.LENGTH)
        running = (parent, len(prompt) + num_tokens)
        clock = asyncio.get_running_loop().time
        if not self._running:
            self._busy_since_s = clock()
        self._running.append(running)
        try:
            generation = await self._policy.sample(
                prompt, max_new_tokens=None if limit is None else num_tokens, **options
            )
        finally:
            self._running.remove(running)
            if not self._running:
                self.generation_s += clock() - self._busy_since_s
        self.finish_reason = generation.finish_reason
        if self.finish_reason is FinishReason.LENGTH:
            self.finish_reason = reason
        turn = None
        if len(generation.output_ids):
            turn = Turn(
                parent=parent,
                context=prompt[parent.end :] if parent is not None else prompt,
                sampled=generation.output_ids,
                logprobs=generation.logprobs,
                versions=generation.versions,
                end=len(prompt) + len(generation.output_ids),
                routes=_new_routes(generation, parent),
            )
            self._turns.append(turn)
        return generation, turn

    def restore(self, turn: Turn) -> None:
        """Adds a turn that was sampled for this sample elsewhere. Call it in the order of sampling, and with
        parents that were restored."""
        self._turns.append(turn)

    def forget(self, turn: Turn) -> None:
        """Drops a turn that no client has read, unless another one follows it."""
        followed = {one.parent for one in self._turns} | {parent for parent, _ in self._running}
        if turn in self._turns and turn not in followed:
            self._turns.remove(turn)

    def limit_time(self, seconds: float) -> None:
        """Lowers the time limit of all turns together, if it is longer. Call before the first turn."""
        self._policy.timeout_s = min(self._policy.timeout_s, seconds)

    @property
    def policy(self) -> PolicyClient:
        return self._policy

    @property
    def is_sampling(self) -> bool:
        """True while a turn is being sampled or waits for the engine."""
        return bool(self._running)

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns, in the order in which they finished."""
        return self._turns

    @property
    def turn_lengths(self) -> list[int]:
        """Number of sampled tokens in each turn, in the order in which the turns finished."""
        return [len(turn.sampled) for turn in self._turns]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The sampled tokens of all turns, in the order in which the turns finished."""
        if len(self._turns) == 1:
            return self._turns[0].sampled
        return np.concatenate([turn.sampled for turn in self._turns] or [np.empty(0, np.int32)])

    def to_trajectory(
        self,
        outcome: SampleRewards,
        *,
        finish_reason: FinishReason | None = None,
        reward_s: float = 0.0,
        is_greedy: bool = False,
        label: str = "",
    ) -> Trajectory:
        """Converts the turns to a Trajectory; its segments are in the order of their last turns.

        `outcome`: its turns and tokens are in the order of `turn_lengths` and `token_ids`. `finish_reason`:
        None takes that of the last turn. Raises ValueError if nothing was sampled, if the outcome has another
        number of turns or tokens, and for invalid log-probs or versions.
        """
        if not self._turns:
            raise ValueError("the policy has sampled nothing")
        segments, spans, arrays = _layout(self._turns)
        tokens, logprobs, versions = arrays
        return Trajectory(
            tokens=tokens,
            loss_mask=(versions != NOT_SAMPLED).astype(np.uint8),
            logprobs=logprobs,
            versions=versions,
            reward=outcome.reward,
            reward_components=outcome.reward_components,
            segments=tuple(segments) if len(segments) > 1 else (),
            turns=placed_turns(outcome, spans),
            metrics=outcome.metrics,
            label=label,
            arrays=placed_token_rewards(outcome, spans, num_tokens=len(tokens))
            | placed_steps(outcome, spans),
            routes=_joined_routes(self._turns),
            finish_reason=finish_reason or self.finish_reason,
            is_greedy=is_greedy,
            generation_s=self.generation_s,
            reward_s=reward_s,
        )


def _layout(turns: Sequence[Turn]) -> tuple[list[int], list[Span], Iterator[NDArray[Any]]]:
    """Returns the lengths of the segments, in the order of their last turns; (first, end) of the sampled
    tokens of each turn, in the order of `turns`; and the tokens, log-probs and versions of all segments.

    `turns`: all turns of a conversation, at least one, each after its parent.
    """
    segments: list[int] = []
    spans: dict[Turn, Span] = {}
    pieces: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]] = []
    end = 0
    for leaf in _leaves(turns):
        for turn in leaf.path:
            pieces.append(_as_context(turn.context))
            end += len(turn.context)
            first, end = end, end + len(turn.sampled)
            if turn in spans:
                pieces.append(_as_context(turn.sampled))
            else:
                pieces.append((turn.sampled, turn.logprobs, turn.versions))
                spans[turn] = first, end
        segments.append(leaf.end)
    arrays = map(np.concatenate, zip(*pieces, strict=True))
    return segments, [spans[turn] for turn in turns], arrays


def _leaves(turns: Sequence[Turn]) -> list[Turn]:
    """The turns that end a segment, in the order in which they finished."""
    extended = {turn.parent for turn in turns}
    return [turn for turn in turns if turn not in extended]


def _new_routes(generation: Generation, parent: Turn | None) -> Routes | None:
    """The field `routes` of a turn with this generation."""
    routes = generation.routes
    if routes is None or parent is None:
        return routes
    # Copied: a view would keep the routes of all earlier turns once more.
    return Routes.joined([routes.rows(parent.end - 1, routes.num_tokens)])


def _joined_routes(turns: Sequence[Turn]) -> Routes | None:
    """Returns `Trajectory.routes`; None unless all turns have routes."""
    routes = [turn.routes for leaf in _leaves(turns) for turn in leaf.path]
    known = [each for each in routes if each is not None]
    return Routes.joined(known) if len(known) == len(routes) else None


def _as_context(
    tokens: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    return tokens, np.zeros(len(tokens), np.float32), np.full(len(tokens), NOT_SAMPLED, np.int32)


def both(agent: Score | None, task: Score | None) -> Score | None:
    """Merges the agent's and the task's scores. Raises ValueError if both have rewards of turns or tokens."""
    if agent is None or task is None:
        return agent or task
    if (agent.turns and task.turns) or (agent.tokens and task.tokens):
        raise ValueError("both the agent and the task's reward give rewards of turns or tokens")
    return Score(
        value=agent.value + task.value,
        parts={**task.parts, **agent.parts},
        metrics={**task.metrics, **agent.metrics},
        turns=agent.turns or task.turns,
        tokens=agent.tokens or task.tokens,
        steps=task.steps,
    )


def add_up(
    score: Score | None = None,
    *,
    num_turns: int = 1,
    step_ends: Sequence[int] = (),
    step_rewards: Sequence[float] = (),
    step_metrics: Mapping[str, float] | None = None,
) -> SampleRewards:
    """Adds up the rewards of a sample with `num_turns` turns.

    `score`: None if the task has no reward of its own. `step_ends`: for each of the score's steps, the number
    of sampled tokens of the last turn up to its end. `step_rewards`: rewards of the environment's steps, at
    most one per turn (a turn that a limit ended has none). `step_metrics`: sums over the steps. Raises
    ValueError if a sum is above `LARGEST_REWARD` or a length is wrong.
    """
    score = Score() if score is None else score
    if len(score.turns) not in (0, num_turns) or len(step_rewards) > num_turns:
        raise ValueError(f"{len(score.turns)} and {len(step_rewards)} rewards for {num_turns} turns")
    turn_rewards: tuple[float, ...] = ()
    if score.turns or any(step_rewards):
        turns = score.turns or (0.0,) * num_turns
        steps = (*step_rewards, *(0.0,) * (num_turns - len(step_rewards)))
        turn_rewards = tuple(turn + step for turn, step in zip(turns, steps, strict=True))
    token_rewards = np.asarray(score.tokens, np.float32)
    of_steps = np.array([reward for _, reward in score.steps], np.float32).tolist()
    reward = sum((score.value, *turn_rewards, *token_rewards.tolist(), *of_steps))
    if not max(map(abs, (reward, *turn_rewards))) <= LARGEST_REWARD:  # also if one is NaN
        raise ValueError(f"the rewards of the sample add up to {reward}: want at most {LARGEST_REWARD:g}")
    return SampleRewards(
        reward=reward,
        reward_components=dict(score.parts),
        metrics={**(step_metrics or {}), **score.metrics},
        turn_rewards=turn_rewards,
        token_rewards=token_rewards,
        steps=tuple(zip(step_ends, of_steps, strict=True)),
    )


def placed_turns(outcome: SampleRewards, spans: Sequence[Span]) -> tuple[tuple[int, float], ...]:
    """Returns `Trajectory.turns`, by position. `spans`: one for each turn, in the order of sampling.

    Empty for a single turn without a reward of its own.
    """
    if len(spans) == 1 and not outcome.turn_rewards:
        return ()
    rewards = outcome.turn_rewards or (0.0,) * len(spans)
    return tuple(sorted((end, reward) for (_, end), reward in zip(spans, rewards, strict=True)))


def placed_token_rewards(
    outcome: SampleRewards, spans: Sequence[Span], *, num_tokens: int
) -> dict[str, NDArray[np.generic]]:
    """Returns `Trajectory.arrays`: TOKEN_REWARDS float32[T], 0 for tokens that were not sampled; empty if no
    token has a reward.

    `spans`: one for each turn, in the order of sampling. Raises ValueError unless the score has exactly one
    reward per sampled token.
    """
    if not len(outcome.token_rewards):
        return {}
    num_sampled = sum(end - first for first, end in spans)
    if num_sampled != len(outcome.token_rewards):
        raise ValueError(f"{len(outcome.token_rewards)} token rewards for {num_sampled} sampled tokens")
    rewards_T = np.zeros(num_tokens, np.float32)
    start = 0
    for first, end in spans:
        rewards_T[first:end] = outcome.token_rewards[start : start + end - first]
        start += end - first
    return {TOKEN_REWARDS: rewards_T}


def placed_steps(outcome: SampleRewards, spans: Sequence[Span]) -> dict[str, NDArray[np.generic]]:
    """Returns `Trajectory.arrays`: STEP_ENDS int32[K] and STEP_REWARDS float32[K]; empty if no step has a
    reward. `spans`: one for each turn, in the order of sampling; the steps are those of the last turn."""
    if not outcome.steps:
        return {}
    first, _ = spans[-1]
    ends, rewards = zip(*outcome.steps, strict=True)
    return {
        STEP_ENDS: np.array(ends, np.int32) + np.int32(first),
        STEP_REWARDS: np.array(rewards, np.float32),
    }
