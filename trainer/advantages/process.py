"""GRPO with process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3): normalized rewards of steps.

    r~_ij = (r_ij - mean) / std     mean and std over the rewards r_ij of all steps j of all samples i
    A_it  = sum of r~_ij over the steps j of sample i that end at token t or after it

A step is what a reward was given to: a part of a completion (`Score.steps`), a turn if a turn of the group
has a reward, a sampled token if a sample of the group has rewards of tokens. std is the population standard
deviation, as in `grpo`. Steps with equal rewards in the whole group have advantages of exactly zero.

The paper's samples have no other reward. Here the rest of a sample's reward, its outcome O (`Score.value`,
after reward shaping and KL penalty), is compared by itself and added for all tokens:

    A_it += outcome (O_i - mean O) / std O

Separate normalization gives steps and outcome the same weight whatever their size (as in MT-GRPO, arXiv
2505.11821). If all outcomes are equal, for example 0, the second term is zero and the first is the paper's.

With `buffer.overdue=close` only the whole rewards of the other samples of a group are known, so the
statistics of steps are running ones, as of the step at which the group began:

    A_it = sum of (r_ij - m) / s over the same steps + outcome (O_i - (b - m_S)) / s_R

m and s are the running mean and deviation of the rewards of steps, m_S is the running mean of their sum over
a sample, and b and s_R are those of `grpo` (`parts.py`). So b - m_S is the outcome that is expected for this
prompt, and without steps A is that of `grpo`. All of them are independent of the sample's own completion.

Shape suffixes: T tokens of a trajectory, G samples of a group, K steps of a sample, J steps of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.config.common import NonNegativeFloat
from areal_like.trajectory import TOKEN_REWARDS, Trajectory, are_equal_rewards
from trainer.advantages.base import ADVANTAGES, Advantage, FloatArray, rewards_of
from trainer.advantages.parts import PartContext

_ROUNDING = 1e-9
"""An outcome of this size, relative to the rewards that it is the difference of, is rounding."""


@ADVANTAGES.register("grpo_process")
@dataclass(frozen=True, kw_only=True)
class GrpoProcess(Advantage):
    """GRPO with process supervision: each token has the normalized rewards of the steps that end at or after
    it."""

    credits_turns = False
    credits_steps = True
    takes_parts = True

    std: bool = True
    """Divide by the standard deviations; False: subtract the means only, as `dr_grpo` does."""
    outcome: NonNegativeFloat = 1.0
    """Weight of the outcome's advantage, relative to that of the steps."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float | FloatArray]:
        """[G] arrays [num_tokens]; numbers if the group has no steps."""
        steps = [steps_of(trajectory, **_kinds(group)) for trajectory in group]
        rewards = [rewards_K for _, rewards_K in steps]
        normalized = np.split(self._normalized(np.concatenate(rewards)), np.cumsum([*map(len, rewards)])[:-1])
        of_outcome_G = self.outcome * self._normalized(_outcomes(group, rewards))
        if not any(map(len, rewards)):
            return [float(of_outcome) for of_outcome in of_outcome_G]
        return [
            _to_go(trajectory, ends_K, normalized_K) + of_outcome
            for trajectory, (ends_K, _), normalized_K, of_outcome in zip(
                group, steps, normalized, of_outcome_G, strict=True
            )
        ]

    def of_partial(self, trajectory: Trajectory, context: PartContext) -> FloatArray:
        """[num_tokens] the formula for parts in the module's docstring."""
        ends_K, rewards_K = steps_of(trajectory, **_kinds([trajectory]))
        outcome = _outcomes([trajectory], [rewards_K])[0]
        rewards_K = rewards_K - context.steps.mean
        relative = outcome - (context.baseline() - context.step_sums.mean)
        if self.std:
            rewards_K, relative = rewards_K / context.steps.deviation, relative / context.running.deviation
        return np.asarray(_to_go(trajectory, ends_K, rewards_K) + self.outcome * relative)

    def _normalized(self, rewards_J: FloatArray) -> FloatArray:
        """[J] (r - mean) / std; exactly zero if all rewards are equal."""
        if not len(rewards_J) or are_equal_rewards(rewards_J.tolist()):
            return np.zeros_like(rewards_J)
        return np.asarray((rewards_J - rewards_J.mean()) / (rewards_J.std() if self.std else 1.0))


def rewards_of_steps(trajectory: Trajectory) -> FloatArray:
    """[K] rewards of the sample's steps, by itself."""
    return steps_of(trajectory, **_kinds([trajectory]))[1]


def _kinds(group: Sequence[Trajectory]) -> dict[str, bool]:
    """What is a step in these samples, for `steps_of`."""
    return {
        "has_turns": any(reward for trajectory in group for _, reward in trajectory.turns),
        "has_tokens": any(TOKEN_REWARDS in trajectory.arrays for trajectory in group),
    }


def _outcomes(group: Sequence[Trajectory], rewards: Sequence[FloatArray]) -> FloatArray:
    """[G] the rest of each sample's reward without those of its steps."""
    rewards_G = rewards_of(group)
    outcomes_G = rewards_G - np.array([rewards_K.sum() for rewards_K in rewards])
    scale_G = np.abs(rewards_G) + np.array([np.abs(rewards_K).sum() for rewards_K in rewards])
    return np.where(np.abs(outcomes_G) <= _ROUNDING * np.maximum(1.0, scale_G), 0.0, outcomes_G)


def _to_go(trajectory: Trajectory, ends_K: NDArray[np.int64], rewards_K: FloatArray) -> FloatArray:
    """[T] the sum of these rewards over the steps that end at each token or after it."""
    at_T = np.zeros(trajectory.num_tokens)
    np.add.at(at_T, ends_K - 1, rewards_K)
    return at_T[::-1].cumsum()[::-1]


def steps_of(
    trajectory: Trajectory, *, has_turns: bool, has_tokens: bool
) -> tuple[NDArray[np.int64], FloatArray]:
    """(ends [K], rewards [K]) of the sample's steps; the last token of a step is at its end - 1.

    `has_turns`, `has_tokens`: each turn, each sampled token is a step. A sample without rewards of tokens has
    zeros for them.
    """
    steps = [*trajectory.steps, *(trajectory.turns if has_turns else ())]
    ends_K = np.array([end for end, _ in steps], dtype=np.int64)
    rewards_K = np.array([reward for _, reward in steps], dtype=np.float64)
    if has_tokens:
        sampled_T = trajectory.loss_mask.astype(bool)
        rewards_T = trajectory.arrays.get(TOKEN_REWARDS, np.zeros(trajectory.num_tokens)).astype(np.float64)
        ends_K = np.concatenate([ends_K, np.flatnonzero(sampled_T) + 1])
        rewards_K = np.concatenate([rewards_K, rewards_T[sampled_T]])
    return ends_K, rewards_K
