"""Combines a task's score and an environment's rewards into the reward fields of a trajectory. Pure.

    score.value                          -> part of Trajectory.reward, credited to the last sampled token
    score.turns + rewards of the steps   -> Trajectory.turns: (end, reward) of each turn
    score.tokens                         -> Trajectory.arrays[TOKEN_REWARDS]: a reward for each token

Trajectory.reward is the sum of all of them. Turns are numbered in the order in which they were sampled. In
the arrays of a branched conversation they may be in another order, so the caller passes the position of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import LARGEST_REWARD, TOKEN_REWARDS
from rollout_server.tasks.base import Score

Span = tuple[int, int]
"""(first, end) of the sampled tokens of one turn in the arrays of a trajectory; `end` is exclusive."""


@dataclass(frozen=True, kw_only=True)
class SampleRewards:
    """The rewards of one sample, added up."""

    reward: float = 0.0
    """The total: the score's value, the rewards of all turns, and those of all tokens."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """`Score.parts`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the environment and of the score; the score's win if both have the same name."""
    turn_rewards: tuple[float, ...] = ()
    """One reward per turn, in the order of sampling; empty: no turn has one."""
    token_rewards: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """[S] one for each sampled token, in the order of sampling; empty: no token has one."""


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
    )


def add_up(
    score: Score | None = None,
    *,
    num_turns: int = 1,
    step_rewards: Sequence[float] = (),
    step_metrics: Mapping[str, float] | None = None,
) -> SampleRewards:
    """Adds up the rewards of a sample with `num_turns` turns.

    `score`: None if the task has no reward of its own. `step_rewards`: rewards of the environment's steps, at
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
    reward = sum((score.value, *turn_rewards, *token_rewards.tolist()))
    if not max(map(abs, (reward, *turn_rewards))) <= LARGEST_REWARD:  # also if one is NaN
        raise ValueError(f"the rewards of the sample add up to {reward}: want at most {LARGEST_REWARD:g}")
    return SampleRewards(
        reward=reward,
        reward_components=dict(score.parts),
        metrics={**(step_metrics or {}), **score.metrics},
        turn_rewards=turn_rewards,
        token_rewards=token_rewards,
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
