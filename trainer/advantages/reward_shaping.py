"""Reward shaping: changes rewards by the samples' lengths before advantages are computed.

    advantage: {name: grpo, shaping: [{name: overlong}, {name: laconic, budget_tokens: 200}]}

Shapings apply in the order of the list. Metrics show the task's reward and the shaped reward. A shaping that
ranks the groups of a step (scope BATCH) waits for all of them. A shaping that learns a dual variable (a
Lagrange multiplier) updates it by a pure function: the step holds the number and the checkpoint stores it.

Notation: R reward of a sample, L its number of sampled tokens.
Shape suffix: G samples of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from areal_like.config.common import Fraction, NonNegativeFloat, Section
from areal_like.errors import ConfigError
from areal_like.registry import Registry
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray, rewards_of
from trainer.batching.scope import Scope


@dataclass(frozen=True, kw_only=True)
class ShapingContext:
    """Inputs of a shaping other than the group itself."""

    dual: float = 0.0
    """The shaping's dual variable after the previous step."""
    ahead: float = 0.0
    """For scope BATCH: share of the step's groups that rank before this one by `score`, in [0, 1)."""


class Shaping(Section, ABC, key="advantage.shaping"):
    """Base of all shapings.

    A custom shaping is a dataclass in the user's module: `{_target_: my_module.MyShaping}`.
    """

    scope: Scope = Scope.GROUP
    """BATCH: `rewards` reads `context.ahead`."""
    takes_parts: bool = False
    """True: a sample's shaped reward depends on its own reward, length and truncation only, not on its group
    or its content, so the shaping can be used with `buffer.overdue=close`."""

    @abstractmethod
    def rewards(self, group: Sequence[Trajectory], context: ShapingContext) -> FloatArray:
        """[G] shaped reward of each sample."""

    def score(self, group: Sequence[Trajectory]) -> float:
        """The number by which the groups of a step are ranked, largest first; ties rank in recorded order."""
        return 0.0

    def next_dual(self, dual: float, *, mean_tokens: float) -> float:
        """The dual variable (initially 0) after a step with `mean_tokens` sampled tokens per sample."""
        return dual


SHAPINGS = Registry[Shaping]("advantage.shaping", Shaping)  # type: ignore[type-abstract]


def lengths_of(group: Sequence[Trajectory]) -> FloatArray:
    """[G] number of sampled tokens of each sample."""
    return np.array([trajectory.num_sampled for trajectory in group], dtype=np.float64)


@SHAPINGS.register("overlong")
@dataclass(frozen=True, kw_only=True)
class Overlong(Shaping):
    """Soft overlong punishment (DAPO, arXiv 2503.14476): a penalty growing linearly near the length limit."""

    takes_parts = True

    max_tokens: int = 0
    """Length at which the penalty is full; `sampling.max_new_tokens` by default."""
    soft_fraction: float = 0.2
    """Last share of that length, over which the penalty grows (the paper: 4096 of 20480)."""
    weight: NonNegativeFloat = 1.0
    """Full penalty."""

    def check(self) -> None:
        if self.max_tokens < 1 or not 0 < self.soft_fraction <= 1:
            raise ConfigError("advantage.shaping: overlong needs max_tokens >= 1 and 0 < soft_fraction <= 1")

    def rewards(self, group: Sequence[Trajectory], context: ShapingContext) -> FloatArray:
        """R - weight * clip((L - (1 - soft_fraction) max_tokens) / (soft_fraction max_tokens), 0, 1)"""
        over_G = (lengths_of(group) - (1 - self.soft_fraction) * self.max_tokens) / (
            self.soft_fraction * self.max_tokens
        )
        return np.asarray(rewards_of(group) - self.weight * np.clip(over_G, 0, 1))


@SHAPINGS.register("grpo_lambda")
@dataclass(frozen=True, kw_only=True)
class GrpoLambda(Shaping):
    """GRPO-lambda (arXiv 2505.18086): penalizes long correct completions in the groups of highest accuracy.

    A length penalty on all groups makes accuracy collapse, so only the best `top` of the step's groups get
    it.
    """

    scope = Scope.BATCH

    top: Fraction = 0.2
    """Share of the step's groups, by accuracy, that get the length penalty."""
    weight: NonNegativeFloat = 0.6
    """Largest penalty of a correct completion."""
    correct: float = 1.0
    """Smallest reward of a completion that counts as correct."""

    def score(self, group: Sequence[Trajectory]) -> float:
        return float((rewards_of(group) >= self.correct).mean())

    def rewards(self, group: Sequence[Trajectory], context: ShapingContext) -> FloatArray:
        """R - weight * sigmoid((L - mean) / std) for correct completions of a top group.

        mean and std are of L over the group's correct completions.
        """
        rewards_G, lengths_G = rewards_of(group), lengths_of(group)
        right_G = rewards_G >= self.correct
        if context.ahead >= self.top or not right_G.any():
            return rewards_G
        mean, std = lengths_G[right_G].mean(), lengths_G[right_G].std()
        z_G = (lengths_G - mean) / std if std > 0 else np.zeros_like(lengths_G)
        return np.where(right_G, rewards_G - self.weight / (1 + np.exp(-z_G)), rewards_G)


@SHAPINGS.register("laconic")
@dataclass(frozen=True, kw_only=True)
class Laconic(Shaping):
    """LACONIC (arXiv 2602.14468): penalizes tokens beyond a budget, with a coefficient found by dual ascent.

        reward <- R - dual * max(0, L / budget - 1)
        dual   <- clip(dual + rate * (mean L / budget - 1), 0, max_dual)    after each step

    The coefficient rises while completions are longer than the budget on average.
    """

    takes_parts = True

    budget_tokens: int = 0
    """Budget: sampled tokens that a completion may have on average."""
    rate: float = 0.01
    """Step size of the dual ascent."""
    max_dual: float = 1.0
    """Largest coefficient."""

    def check(self) -> None:
        if self.budget_tokens < 1 or not self.rate > 0 or not self.max_dual > 0:
            raise ConfigError(
                "advantage.shaping: laconic needs budget_tokens of at least 1, and rate and max_dual above 0"
            )

    def rewards(self, group: Sequence[Trajectory], context: ShapingContext) -> FloatArray:
        """R - dual * max(0, L / budget - 1)"""
        return np.asarray(
            rewards_of(group) - context.dual * np.maximum(0, lengths_of(group) / self.budget_tokens - 1)
        )

    def next_dual(self, dual: float, *, mean_tokens: float) -> float:
        return min(self.max_dual, max(0.0, dual + self.rate * (mean_tokens / self.budget_tokens - 1)))
