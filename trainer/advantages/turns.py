"""Credit of turns: rewards within a trajectory, for GAE and for estimators that compare a group.

A trajectory of K turns has rewards r_1 .. r_K: the rewards of its turns, and of the tokens and steps in them.
The rest of its reward (the outcome, after shaping and KL penalty) belongs to the last turn. Its return from
turn k on is

    G_k = r_k + d r_{k+1} + d^2 r_{k+2} + ...        d: `advantage.turn_discount`

A group estimator (GRPO, RLOO, ...) is applied to the returns G_k of all samples of the group, once for each
k, and gives the advantage of the tokens of turn k. A sample with fewer turns is represented by the return of
its last turn. With d = 1 and only the outcome as reward, all G_k are R, so every turn gets the estimator's
advantage of R, to the last bit.

Normalized discounted returns of turns are GTPO's advantages (arXiv 2511.14846); comparing the same turn of
the samples of a group is MT-GRPO's idea (arXiv 2505.11821). MT-GRPO normalizes rewards of turns and outcome
separately and adds them, which gives both the same weight whatever their size. GiGPO (arXiv 2505.10978)
compares steps that start from the same state of the environment, which the trainer does not see. Both are
left out.

GAE gets rewards at tokens: the reward of a token at the token, the reward of a step or a turn at its last
token, the rest at the last token of the trajectory. Its discount from one turn to the next is gamma d.
RAGEN's bi-level GAE (arXiv 2504.20073) has a discount of turns too, but makes two passes.

Shape suffixes: T tokens of a trajectory, S its tokens that are trained on, K its turns, G samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import STEP_ENDS, TOKEN_REWARDS, Trajectory
from trainer.advantages.base import Advantage, FloatArray
from trainer.batching.packing import is_target


def rewards_of_tokens(trajectory: Trajectory, *, penalty_S: FloatArray) -> FloatArray:
    """[S] reward of each token, whose sum is the trajectory's reward.

    `penalty_S`: each token's part of the KL penalty, which the trajectory's reward contains already.
    """
    rewards_S = -penalty_S
    rest = trajectory.reward + penalty_S.sum()
    if _has_inner_rewards(trajectory):
        inner_S = _inner_rewards(trajectory)
        rewards_S += inner_S
        rest -= inner_S.sum()
    rewards_S[-1:] += rest
    return rewards_S


def discounts_of_tokens(trajectory: Trajectory, *, turn_discount: float) -> FloatArray:
    """[S] discount from each token to the next one: `turn_discount` where a turn ends, else 1."""
    turn_S = _turn_of_targets(trajectory)
    discounts_S = np.ones(len(turn_S))
    discounts_S[:-1][turn_S[1:] != turn_S[:-1]] = turn_discount
    return discounts_S


def turn_returns(trajectory: Trajectory, *, turn_discount: float) -> FloatArray:
    """[K] return-to-go G of each turn."""
    returns_K = np.zeros(trajectory.num_turns)
    if _has_inner_rewards(trajectory):
        np.add.at(returns_K, _turn_of_targets(trajectory), _inner_rewards(trajectory))
    returns_K[-1] = trajectory.reward - returns_K[:-1].sum()
    for k in reversed(range(len(returns_K) - 1)):
        returns_K[k] += turn_discount * returns_K[k + 1]
    return returns_K


def group_advantages(
    estimator: Advantage, group: Sequence[Trajectory], *, turn_discount: float
) -> Sequence[float | FloatArray]:
    """[G] advantages, for each sample a number or an array [num_tokens], by the rule in the module's
    docstring."""
    is_plain = all(t.num_turns == 1 or (turn_discount == 1 and not _has_inner_rewards(t)) for t in group)
    if is_plain or not estimator.credits_turns:
        return estimator.of_group(group)
    returns = [turn_returns(t, turn_discount=turn_discount) for t in group]
    by_turn = [
        estimator.of_group(
            [
                replace(t, reward=float(returns_K[min(k, len(returns_K) - 1)]))
                for t, returns_K in zip(group, returns, strict=True)
            ]
        )
        for k in range(max(map(len, returns)))
    ]
    return [_spread(t, [advantages[g] for advantages in by_turn]) for g, t in enumerate(group)]


def _spread(trajectory: Trajectory, advantages: Sequence[float | FloatArray]) -> float | FloatArray:
    """Assigns the advantage of each turn of a sample to its tokens."""
    if trajectory.num_turns == 1:
        return advantages[0]
    advantages_T, start = np.zeros(trajectory.num_tokens), 0
    for (end, _), advantage in zip(trajectory.turns, advantages, strict=False):
        advantages_T[start:end] = np.broadcast_to(advantage, advantages_T.shape)[start:end]
        start = end
    return advantages_T


def _has_inner_rewards(trajectory: Trajectory) -> bool:
    arrays = trajectory.arrays
    return TOKEN_REWARDS in arrays or STEP_ENDS in arrays or any(reward for _, reward in trajectory.turns)


def _inner_rewards(trajectory: Trajectory) -> FloatArray:
    """[S] rewards of tokens and, at the last token of each step and turn, of steps and turns."""
    target_T = is_target(trajectory)
    inner_T = np.zeros(trajectory.num_tokens)
    if TOKEN_REWARDS in trajectory.arrays:
        inner_T += trajectory.arrays[TOKEN_REWARDS].astype(np.float64)
    for end, reward in (*trajectory.steps, *trajectory.turns):
        inner_T[end - 1] += reward
    return inner_T[target_T]


def _turn_of_targets(trajectory: Trajectory) -> NDArray[np.int64]:
    """[S] number of the turn of each token, from 0."""
    ends = [end for end, _ in trajectory.turns[:-1]]
    return np.searchsorted(ends, np.flatnonzero(is_target(trajectory)), side="right")
