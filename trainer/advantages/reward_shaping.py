"""Reward shaping: what a sample's length adds to or takes from its reward, before advantages are made of it.

    advantage: {name: grpo, shaping: [{name: overlong}, {name: laconic, budget_tokens: 200}]}

Shapings apply in order. Metrics go on showing the task's own reward. One that ranks the groups of a step (scope BATCH) waits for all of
them. One that learns a dual variable does it as a pure function: the state is a number that the step keeps and the checkpoint holds.

Shape suffix: G samples of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from areal_like.errors import ConfigError
from areal_like.registry import Registry
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray, rewards_of
from trainer.batching.scope import Scope


@dataclass(frozen=True, kw_only=True)
class ShapingContext:
    """What a shaping may know beside the group itself."""

    dual: float = 0.0
    """Its dual variable, from the steps before."""
    ahead: float = 0.0
    """Scope BATCH: share of the step's groups that rank before this one, in [0, 1)."""


class Shaping(ABC):
    """Base of all. Yours: a dataclass in a module of your own, `{_target_: my_module.MyShaping}`."""

    scope: Scope = Scope.GROUP
    """BATCH: `standing.ahead` is wanted."""

    @abstractmethod
    def rewards(self, group: Sequence[Trajectory], standing: ShapingContext) -> FloatArray:
        """[G] the shaped reward of each sample."""

    def score(self, group: Sequence[Trajectory]) -> float:
        """What the groups of a step are ranked by, the largest first; ties by recorded order."""
        return 0.0

    def next_dual(self, dual: float, *, mean_tokens: float) -> float:
        """The dual variable (0 at first) after a step whose samples had so many sampled tokens on average."""
        return dual


SHAPINGS = Registry[Shaping]("advantage.shaping", Shaping)  # type: ignore[type-abstract]


def lengths_of(group: Sequence[Trajectory]) -> FloatArray:
    """Sampled tokens [G]."""
    return np.array([trajectory.num_sampled for trajectory in group], dtype=np.float64)


@SHAPINGS.register("overlong")
@dataclass(frozen=True, kw_only=True)
class Overlong(Shaping):
    """DAPO's soft penalty (arXiv 2503.14476): falls linearly from 0 to -weight over the last part of the allowed length."""

    max_tokens: int = 0
    """Length of the full penalty; `sampling.max_new_tokens` where it is not given."""
    soft_fraction: float = 0.2
    """Share of that length over which the penalty sets in (the paper: 4096 of 20480)."""
    weight: float = 1.0
    """Largest penalty."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 < self.soft_fraction <= 1 or self.weight < 0:
            raise ConfigError(
                "advantage.shaping: overlong wants max_tokens of at least 1, 0 < soft_fraction <= 1 and weight >= 0"
            )

    def rewards(self, group: Sequence[Trajectory], standing: ShapingContext) -> FloatArray:
        """R - weight * clip((L - (1 - soft_fraction) max_tokens) / (soft_fraction max_tokens), 0, 1)"""
        over_G = (lengths_of(group) - (1 - self.soft_fraction) * self.max_tokens) / (
            self.soft_fraction * self.max_tokens
        )
        return np.asarray(rewards_of(group) - self.weight * np.clip(over_G, 0, 1))


@SHAPINGS.register("grpo_lambda")
@dataclass(frozen=True, kw_only=True)
class GrpoLambda(Shaping):
    """GRPO-lambda (arXiv 2505.18086): the shorter of the right answers is better, but only where the policy is already right most often.

    A length penalty everywhere makes accuracy collapse; here the step's best `top` of the groups get it, the others none.
    """

    scope = Scope.BATCH

    top: float = 0.2
    """Share of the step's groups, by their rate of right answers, that are rewarded for brevity."""
    weight: float = 0.6
    """Largest penalty of a right answer."""
    correct: float = 1.0
    """Reward from which an answer counts as right."""

    def __post_init__(self) -> None:
        if not 0 <= self.top <= 1 or self.weight < 0:
            raise ConfigError(
                "advantage.shaping: grpo_lambda wants top between 0 and 1 and weight of at least 0"
            )

    def score(self, group: Sequence[Trajectory]) -> float:
        """Rate of right answers."""
        return float((rewards_of(group) >= self.correct).mean())

    def rewards(self, group: Sequence[Trajectory], standing: ShapingContext) -> FloatArray:
        """R - weight * sigmoid((L - mean) / std) for right answers of a chosen group, mean and std over its right answers."""
        rewards_G, lengths_G = rewards_of(group), lengths_of(group)
        right_G = rewards_G >= self.correct
        if standing.ahead >= self.top or not right_G.any():
            return rewards_G
        mean, std = lengths_G[right_G].mean(), lengths_G[right_G].std()
        z_G = (lengths_G - mean) / std if std > 0 else np.zeros_like(lengths_G)
        return np.where(right_G, rewards_G - self.weight / (1 + np.exp(-z_G)), rewards_G)


@SHAPINGS.register("laconic")
@dataclass(frozen=True, kw_only=True)
class Laconic(Shaping):
    """LACONIC (arXiv 2602.14468): a price on tokens beyond a budget, found by dual ascent: it rises while answers are too long on average.

    Reward R - dual * max(0, L / budget - 1); after each step dual <- clip(dual + rate (mean L / budget - 1), 0, max_dual).
    """

    budget_tokens: int = 0
    """Sampled tokens that an answer may have on average."""
    rate: float = 0.01
    """Step size of the ascent."""
    max_dual: float = 1.0
    """Largest price."""

    def __post_init__(self) -> None:
        if self.budget_tokens < 1 or not self.rate > 0 or not self.max_dual > 0:
            raise ConfigError(
                "advantage.shaping: laconic wants budget_tokens of at least 1, and rate and max_dual above 0"
            )

    def rewards(self, group: Sequence[Trajectory], standing: ShapingContext) -> FloatArray:
        """R - dual * max(0, L / budget - 1)"""
        return np.asarray(
            rewards_of(group) - standing.dual * np.maximum(0, lengths_of(group) / self.budget_tokens - 1)
        )

    def next_dual(self, dual: float, *, mean_tokens: float) -> float:
        """Projected ascent on the constraint mean L <= budget."""
        return min(self.max_dual, max(0.0, dual + self.rate * (mean_tokens / self.budget_tokens - 1)))
