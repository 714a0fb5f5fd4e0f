"""Baselines with `buffer.overdue=close`: of whole groups, and of parts of groups that were closed.

    b = mean reward of the other early members, filled up to two members with m       A = R - b

m is the running mean reward as of the step at which the group began (`reward_history.py`). It is the
baseline of a late sample without early members, and half of it with one. With two or more it does not count:
prompts differ in difficulty, and a pull towards the mean of all prompts gives every sample of a hard prompt
a negative advantage, also if all of them have the same reward.

The gradient is exactly unbiased if a sample's baseline is independent of its own completion. So it never
contains the sample's own reward, and it is the same function whether the sample was early or late, and in a
closed or a whole group (which is whole because of its last sample's completion). These are biased: the mean
of the early members with the sample itself, a comparison of late samples with other late ones, and division
by the deviation of the early members. A deviation is therefore the running one.

Turns: the reward of a group's early member is known only as a whole, so all turns of a sample have the
advantage of its whole reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory, are_equal_rewards
from areal_like.wire.messages.consumer import EarlyMember
from trainer.advantages.reward_history import RewardStatistics

FloatArray = NDArray[np.float64]

_FEWEST_MEMBERS = 2
"""With fewer members, the running mean counts as those that are missing."""


@dataclass(frozen=True, kw_only=True)
class PartContext:
    """What a sample's reward is compared with. Shape suffix: E other early members of its group."""

    rewards_E: FloatArray
    """After shaping."""
    lengths_E: FloatArray
    """Number of sampled tokens."""
    running: RewardStatistics
    """As of the step at which the group began."""

    def baseline(self, weights_E: FloatArray | None = None) -> float:
        """b by the formula in the module's docstring; 0 if there is neither a member nor a running mean.

        `weights_E`: of the members; the running mean counts with their mean weight. None: all 1.
        """
        num = len(self.rewards_E)
        prior = max(0, _FEWEST_MEMBERS - num) if self.running.is_known else 0
        if not num:
            return self.running.mean if prior else 0.0
        mean = float(self.rewards_E.mean())
        if are_equal_rewards(self.rewards_E.tolist()):
            mean = float(self.rewards_E[0])  # so that equal rewards have an advantage of exactly zero
        elif weights_E is not None and (weight := float(weights_E.sum())) > 0:
            mean = float(weights_E @ self.rewards_E) / weight
        return (num * mean + prior * self.running.mean) / (num + prior) if prior else mean


def stand_in(member: EarlyMember) -> Trajectory:
    """A trajectory with a member's reward and length and no content, for a shaping that reads only those."""
    length, is_sampled = max(member.num_sampled, 1), member.num_sampled > 0
    return Trajectory(
        tokens=np.zeros(length, dtype=np.int32),
        loss_mask=np.full(length, is_sampled, dtype=np.uint8),
        logprobs=np.zeros(length, dtype=np.float32),
        versions=np.full(length, 0 if is_sampled else NOT_SAMPLED, dtype=np.int32),
        reward=member.reward,
        finish_reason=FinishReason.LENGTH if member.is_truncated else FinishReason.STOP,
    )


def context_of(early: Sequence[EarlyMember], *, without: int, running: RewardStatistics) -> PartContext:
    """The context of the sample with index `without`."""
    others = [member for member in early if member.sample_index != without]
    return PartContext(
        rewards_E=np.array([member.reward for member in others], dtype=np.float64),
        lengths_E=np.array([member.num_sampled for member in others], dtype=np.float64),
        running=running,
    )
