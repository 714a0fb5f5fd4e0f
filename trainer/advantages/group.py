"""Advantages that compare the samples of one prompt with each other: GRPO and its relatives.

A group whose rewards are all equal, up to rounding, gets advantages of exactly zero, without computing them:
dividing a rounding error by a standard deviation of the same size turns it into a signal. Equal rewards may
differ in the last bits from their mean, and from each other if they are sums over turns.

Left out: ProGRPO (arXiv 2602.05281), `A + alpha (c_q - c_o)` in groups with a correct completion, where c_o
is exp of the mean log-prob of the completion's least likely fifth of tokens. It is unclear over which prompt
tokens c_q is taken and what alpha is, and c_q needs the log-probs of prompts, which are not recorded.

With `buffer.overdue=close` (`of_part`) R - mean becomes R - b, and (R - mean) / std becomes (R - b) / s, with
the baseline b of `parts.py` and the running deviation s of rewards.

Notation: R reward of a sample, mean and std over its group, L its number of sampled tokens.
Shape suffix: G samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory, are_equal_rewards
from trainer.advantages.base import ADVANTAGES, Advantage, FloatArray, rewards_of, whitening
from trainer.advantages.parts import PartContext
from trainer.batching.scope import Scope


def centered(rewards_G: FloatArray) -> FloatArray:
    """[G] R - mean; exactly zero if all rewards are equal."""
    if are_equal_rewards(rewards_G.tolist()):
        return np.zeros_like(rewards_G)
    return np.asarray(rewards_G - rewards_G.mean())


@ADVANTAGES.register("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGrpo(Advantage):
    """Dr. GRPO (arXiv 2503.20783): A = R - mean.

    Dividing by std, as GRPO does, would give more weight to hard and easy prompts, whose std is small.
    """

    takes_parts = True

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [float(a) for a in centered(rewards_of(group))]

    def of_part(self, reward: float, context: PartContext) -> float:
        """R - b"""
        return reward - context.baseline()


@ADVANTAGES.register("grpo")
@dataclass(frozen=True, kw_only=True)
class Grpo(Advantage):
    """GRPO (arXiv 2402.03300): A = (R - mean) / std, with the population standard deviation."""

    takes_parts = True

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        rewards_G = rewards_of(group)
        centered_G = centered(rewards_G)
        std = float(rewards_G.std())
        return [float(a) for a in centered_G / std] if std > 0 else [0.0] * len(group)

    def of_part(self, reward: float, context: PartContext) -> float:
        """(R - b) / s"""
        return (reward - context.baseline()) / context.running.deviation


@ADVANTAGES.register("rloo")
@dataclass(frozen=True, kw_only=True)
class Rloo(DrGrpo):
    """RLOO (arXiv 2402.14740): A = R - mean of the other samples = G / (G - 1) (R - mean).

    The baseline is unbiased.
    """

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]; zero for a group of one sample."""
        size = len(group)
        return [float(a) for a in centered(rewards_of(group)) * (size / max(size - 1, 1))]


@ADVANTAGES.register("remax")
@dataclass(frozen=True, kw_only=True)
class Remax(Advantage):
    """ReMax (arXiv 2310.10505): A = R - R of the greedy completion of the prompt; needs no other samples."""

    uses_greedy = True

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G + 1], with the greedy sample last."""
        baseline = group[-1]
        assert baseline.is_greedy and not any(trajectory.is_greedy for trajectory in group[:-1])
        return [trajectory.reward - baseline.reward for trajectory in group]


@ADVANTAGES.register("opo")
@dataclass(frozen=True, kw_only=True)
class Opo(Advantage):
    """OPO (arXiv 2505.23585): A = R - sum(L R) / sum(L).

    This baseline has the least variance if a gradient's squared norm grows with the length of the completion.
    """

    takes_parts = True

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        rewards_G = rewards_of(group)
        if are_equal_rewards(rewards_G.tolist()):
            return [0.0] * len(group)
        lengths_G = np.array([trajectory.num_sampled for trajectory in group], dtype=np.float64)
        return [float(a) for a in rewards_G - lengths_G @ rewards_G / max(lengths_G.sum(), 1.0)]

    def of_part(self, reward: float, context: PartContext) -> float:
        """R - b, with the members weighted by their lengths in b."""
        return reward - context.baseline(context.lengths_E)


@ADVANTAGES.register("gpg")
@dataclass(frozen=True, kw_only=True)
class Gpg(DrGrpo):
    """GPG (arXiv 2504.02546): A = alpha (R - mean), alpha = groups of the step / groups whose rewards differ.

    The factor compensates for groups without a gradient, which would dilute the mean over all groups. For
    parts alpha is 1, because a group of equal rewards has a gradient too.
    """

    scope = Scope.BATCH

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """(0, alpha); alpha is 1 if no group of the step has differing rewards."""
        num_groups, num_spread = len(np.unique(groups_S)), len(np.unique(groups_S[advantages_S != 0]))
        return 0.0, num_groups / num_spread if num_spread else 1.0


@ADVANTAGES.register("reinforce_pp")
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Advantage):
    """REINFORCE++ (arXiv 2501.03262): rewards whitened over all sampled tokens of the step."""

    takes_parts = True

    scope = Scope.BATCH

    baseline: Literal["none", "group"] = "none"
    """`none`, or `group` to subtract the group's mean first (the paper's form for reasoning)."""

    @property
    def compares_samples(self) -> bool:
        """True with `baseline=group`."""
        return self.baseline == "group"

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        rewards_G = rewards_of(group)
        return [float(a) for a in (centered(rewards_G) if self.baseline == "group" else rewards_G)]

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        return whitening(advantages_S)

    def of_part(self, reward: float, context: PartContext) -> float:
        """(R - m) / s, with the running mean m; with `baseline=group` (R - b) / s."""
        baseline = context.baseline() if self.baseline == "group" else context.running.mean
        return (reward - baseline) / context.running.deviation
