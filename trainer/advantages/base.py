"""How good each sample of a group was, compared with the others. The same kind of registry as objectives, a choice of its own.

A group without spread has advantage exactly zero: the mean of equal floats need not be that float again, and dividing its rounding
error by a standard deviation of the same size would turn noise into a signal.

What needs a critic instead of a group is in `gae.py`.
Left out: `progrpo` (arXiv 2602.05281), `A + alpha (c_q - c_o)` in groups with a right answer. Its c_o is exp of the mean log-prob of the
least likely fifth of the answer's tokens; over which tokens of the prompt c_q is taken, and what alpha is, we could not establish. It also
wants a forward over prompts, whose log-probs are on no record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError
from areal_like.registry import Registry
from areal_like.trajectory import Trajectory
from trainer.batching.scope import Scope

FloatArray = NDArray[np.float64]


class Estimator:
    """Base of all, whatever they compare a sample with; one of scope BATCH writes `rescale`."""

    scope: Scope = Scope.GROUP
    """BATCH: `rescale` is called, and no gradient is computed before the step's last group has come."""
    uses_greedy: bool = False
    """True: every group must have a greedy sample (`sampling.greedy_baseline`)."""

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """(shift, factor) by which every advantage `a` of the step becomes `(a + shift) * factor`; the same on every rank.

        Arguments: all sampled tokens of the step over all ranks, each with its advantage and its group's position.
        """
        return 0.0, 1.0


def whitening(advantages_S: FloatArray) -> tuple[float, float]:
    """(-mean, 1 / population standard deviation); a step without any spread becomes zero."""
    if len(advantages_S) == 0 or advantages_S.max() == advantages_S.min():
        return 0.0, 0.0
    return -float(advantages_S.mean()), 1 / float(advantages_S.std())


class Advantage(Estimator, ABC):
    """Compares with the other samples of the group. A subclass writes `of_group`.

    Yours: a dataclass in a module of your own, named by `advantage._target_=my_module.MyAdvantage`.
    """

    @abstractmethod
    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float | FloatArray]:
        """Advantage of each sample: one number for all its tokens, or an array [num_tokens].

        With `uses_greedy` the last one of the group is the greedy sample; what is said of it is not used.
        """


ADVANTAGES = Registry[Estimator]("advantage", Estimator)


def rewards_of(group: Sequence[Trajectory]) -> FloatArray:
    """Rewards [G]."""
    return np.array([trajectory.reward for trajectory in group], dtype=np.float64)


def centred(rewards_G: FloatArray) -> FloatArray:
    """R - mean [G]; exactly zero without spread."""
    if rewards_G.max() == rewards_G.min():
        return np.zeros_like(rewards_G)
    return np.asarray(rewards_G - rewards_G.mean())


@ADVANTAGES.register("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGrpo(Advantage):
    """R - mean: no division, so that hard and easy prompts are not weighted up (Dr. GRPO, arXiv 2503.20783)."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]"""
        return [float(a) for a in centred(rewards_of(group))]


@ADVANTAGES.register("grpo")
@dataclass(frozen=True, kw_only=True)
class Grpo(Advantage):
    """(R - mean) / population standard deviation (GRPO, arXiv 2402.03300)."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]"""
        rewards_G = rewards_of(group)
        centred_G = centred(rewards_G)
        std = float(rewards_G.std())
        return [float(a) for a in centred_G / std] if std > 0 else [0.0] * len(group)


@ADVANTAGES.register("rloo")
@dataclass(frozen=True, kw_only=True)
class Rloo(Advantage):
    """R - mean of the others = G / (G - 1) (R - mean): an unbiased baseline (RLOO, arXiv 2402.14740)."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]; zero for a group of one, which has no others."""
        size = len(group)
        return [float(a) for a in centred(rewards_of(group)) * (size / max(size - 1, 1))]


@ADVANTAGES.register("remax")
@dataclass(frozen=True, kw_only=True)
class Remax(Advantage):
    """R - R of the greedy answer to the same prompt: a baseline that needs no other sample (ReMax, arXiv 2310.10505)."""

    uses_greedy = True

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G + 1], the greedy sample last."""
        baseline = group[-1]
        assert baseline.is_greedy and not any(trajectory.is_greedy for trajectory in group[:-1])
        return [trajectory.reward - baseline.reward for trajectory in group]


@ADVANTAGES.register("opo")
@dataclass(frozen=True, kw_only=True)
class Opo(Advantage):
    """R - sum(L R) / sum(L): the baseline of least variance if a gradient's square grows with length (OPO, arXiv 2505.23585)."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]"""
        rewards_G = rewards_of(group)
        if rewards_G.max() == rewards_G.min():
            return [0.0] * len(group)
        lengths_G = np.array([trajectory.num_sampled for trajectory in group], dtype=np.float64)
        return [float(a) for a in rewards_G - lengths_G @ rewards_G / max(lengths_G.sum(), 1.0)]


@ADVANTAGES.register("gpg")
@dataclass(frozen=True, kw_only=True)
class Gpg(Advantage):
    """alpha (R - mean), alpha = groups of the step / groups with spread (GPG, arXiv 2504.02546).

    Groups that teach nothing then do not dilute those that do.
    """

    scope = Scope.BATCH

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G], before alpha."""
        return [float(a) for a in centred(rewards_of(group))]

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """(0, alpha); alpha is 1 in a step without any spread."""
        num_groups, num_spread = len(np.unique(groups_S)), len(np.unique(groups_S[advantages_S != 0]))
        return 0.0, num_groups / num_spread if num_spread else 1.0


@ADVANTAGES.register("reinforce_pp")
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Advantage):
    """Rewards whitened over all sampled tokens of the step (REINFORCE++, arXiv 2501.03262)."""

    scope = Scope.BATCH

    baseline: str = "none"
    """`none` | `group`: the group's mean is subtracted first (the paper's form for reasoning)."""

    def __post_init__(self) -> None:
        if self.baseline not in ("none", "group"):
            raise ConfigError(f"advantage.baseline={self.baseline}: use none or group")

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G], before whitening."""
        rewards_G = rewards_of(group)
        return [float(a) for a in (centred(rewards_G) if self.baseline == "group" else rewards_G)]

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """(-mean, 1 / population standard deviation); a step without any spread becomes zero."""
        return whitening(advantages_S)
