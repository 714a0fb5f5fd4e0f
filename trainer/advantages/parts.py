"""Baselines with `buffer.overdue=close`: of whole groups, and of parts of groups that were closed.

    b = mean reward of the other early members, filled up to two members with m       A = R - b

m is the running mean reward as of the step at which the group began. It is the baseline of a late sample
without early members, and half of it with one. With two or more it does not count: prompts differ in
difficulty, and a pull towards the mean of all prompts gives every sample of a hard prompt a negative
advantage, also if all of them have the same reward.

    m = sum_s decay^(n-s) m_s / sum_s decay^(n-s)      m_s: mean reward of step s, n steps so far

It is not the newest running mean: whether a sample was completed early or late must not decide what it is
compared with, or the baseline would depend on its own completion. The reward shapings' dual variables are
kept with it for the same reason. This history is a few numbers for each step, the same on every rank, and
part of each checkpoint, so a resumed, repeated or replayed step has the same baselines, to the last bit.

The gradient is exactly unbiased if a sample's baseline is independent of its own completion. So it never
contains the sample's own reward, and it is the same function whether the sample was early or late, and in a
closed or a whole group (which is whole because of its last sample's completion). These are biased: the mean
of the early members with the sample itself, a comparison of late samples with other late ones, and division
by the deviation of the early members. A deviation is therefore the running one.

Turns: the reward of a group's early member is known only as a whole, so all turns of a sample have the
advantage of its whole reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory, are_equal_rewards
from areal_like.wire.messages.consumer import EarlyMember

FloatArray = NDArray[np.float64]

_NUM_KEPT = 256
"""Steps of which the statistics are kept. A late sample's group may have begun any number of steps earlier:
if that is before the oldest entry, the oldest one is used."""
_NUM_STATISTICS = 4
"""Numbers of a row before its dual variables."""
_LEAST_VARIANCE = 1e-12
"""Relative to the mean square: a smaller variance is rounding."""


@dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """Running statistics of rewards (after shaping) before a step."""

    mean: float = 0.0
    deviation: float = 1.0
    """Standard deviation; 1 if unknown, or if all rewards were equal."""
    is_known: bool = False
    """False before the first step."""
    duals: tuple[float, ...] = ()
    """Dual variables of the shapings."""


class RewardHistory:
    """`begin` before each step, `append` after it."""

    def __init__(self, *, decay: float) -> None:
        """`decay`: weight of a step's rewards relative to those of the next step."""
        self._decay = decay
        self._rows: list[list[float]] = []
        """[step, weight, weighted sum of means, weighted sum of mean squares, *duals], by step."""

    def begin(self, step: int, *, duals: Sequence[float]) -> None:
        """Starts the history at `step` if it is empty."""
        if not self._rows:
            self._rows.append([step, 0.0, 0.0, 0.0, *duals])

    def as_of(self, begin_step: int, *, step: int) -> RewardStatistics:
        """The statistics before step `begin_step`, or before the oldest step that is kept.

        `step`: the present one.
        """
        wanted = min(begin_step, step)
        row = next((row for row in reversed(self._rows) if row[0] <= wanted), self._rows[0])
        _, weight, total, squares, *duals = row
        if not weight:
            return RewardStatistics(duals=tuple(duals))
        mean, square = total / weight, squares / weight
        variance = square - mean * mean
        return RewardStatistics(
            mean=mean,
            deviation=math.sqrt(variance) if variance > _LEAST_VARIANCE * max(1.0, square) else 1.0,
            is_known=True,
            duals=tuple(duals),
        )

    def append(self, step: int, *, mean: float, square: float, duals: Sequence[float]) -> None:
        """Adds a completed step: its samples' mean reward and mean square, the dual variables after it."""
        _, weight, total, squares, *_ = self._rows[-1]
        row = [step + 1, weight * self._decay + 1, total * self._decay + mean, squares * self._decay + square]
        self._rows = [*self._rows, [*row, *duals]][-_NUM_KEPT:]

    def dump(self) -> list[list[float]]:
        """The state, for `restore`; JSON."""
        return [list(row) for row in self._rows]

    def restore(self, rows: Sequence[Sequence[float]], *, num_duals: int) -> None:
        """Sets the state; empty: the history starts again at the next step.

        If the rows do not have `num_duals` dual variables, because the shapings differ, all of them are 0.
        """
        self._rows = [
            list(row)
            if len(row) == _NUM_STATISTICS + num_duals
            else [*row[:_NUM_STATISTICS], *[0.0] * num_duals]
            for row in rows
        ]


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
    steps: RewardStatistics = RewardStatistics()
    """Likewise, of the rewards of steps, for an estimator that compares those."""
    step_sums: RewardStatistics = RewardStatistics()
    """Likewise, of the sum of a sample's rewards of steps."""

    def baseline(self, weights_E: FloatArray | None = None) -> float:
        """b by the formula in the module's docstring; 0 if there is neither a member nor a running mean.

        `weights_E`: of the members; the running mean counts with their mean weight. None: all 1.
        """
        num = len(self.rewards_E)
        prior = max(0, _FEWEST_MEMBERS - num) if self.running.is_known else 0
        if not num:
            return self.running.mean if prior else 0.0
        if are_equal_rewards(self.rewards_E.tolist()):
            mean = float(self.rewards_E[0])  # so that equal rewards have an advantage of exactly zero
        elif weights_E is not None and (weight := float(weights_E.sum())) > 0:
            mean = float(weights_E @ self.rewards_E) / weight
        else:
            mean = float(self.rewards_E.mean())
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
