"""Masks, which drop tokens from any objective's loss and compose with one another.

    objective: {name: vespo, masks: [{name: stapo}, {name: opsm, delta: 0.05}]}

A mask gets the same input as an objective and may depend on the whole step through the same methods
(`observe`, `summarize`, then `kept_S`). A token that any mask drops has no loss and no gradient; with
`denominator=kept` it also leaves the normalizer. Quantities of whole samples (W, V*) still include dropped
tokens: a sample's importance weight does not change because one of its tokens is not trained on. A mask that
drops sequences drops whole samples, with all of their segments.

Shape suffixes: S sampled tokens, N samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from areal_like.config.common import Section
from areal_like.errors import ConfigError
from areal_like.registry import Registry
from trainer.batching.scope import Scope
from trainer.objectives.base import SampledTokens, StepStats
from trainer.objectives.importance import Level, ratio_S, within_S

Denominator = Literal["original", "kept"]


@dataclass(frozen=True, kw_only=True)
class Mask(Section, ABC, key="objective.masks"):
    """Base of all masks.

    A custom mask is a dataclass in the user's module: `{_target_: my_module.MyMask}`.
    """

    scope = Scope.GROUP
    """BATCH: `kept_S` depends on the whole step."""

    denominator: Denominator = "original"
    """The normalizer: `original` (dropped tokens count) | `kept` (they do not)."""

    @abstractmethod
    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        """[S] bool: tokens that may be learned from."""

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """Vectors that `summarize` needs of this micro-batch; called only under scope BATCH."""
        return {}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """Statistics of the whole step, from each vector's concatenation; called only under scope BATCH."""
        return {}


MASKS = Registry[Mask]("objective.masks", Mask)  # type: ignore[type-abstract]


@MASKS.register("band")
@dataclass(frozen=True, kw_only=True)
class Band(Mask):
    """Rejection sampling: drops tokens, or whole samples, whose ratio pi / mu is outside [low, high]."""

    level: Level = "geometric"
    """Level of the ratio: `token`, or `sequence` | `geometric`, which drop whole samples."""
    low: float = 0.5
    """Lower end, inclusive."""
    high: float = 2.0
    """Upper end, inclusive."""

    def check(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError("objective.masks: band needs 0 <= low < high")

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        return within_S(ratio_S(batch, batch.log_ratio_S, level=self.level), low=self.low, high=self.high)


@MASKS.register("opsm")
@dataclass(frozen=True, kw_only=True)
class Opsm(Mask):
    """Off-policy sequence masking (DeepSeek-V3.2): drops samples with A < 0 that have become unlikely."""

    delta: float = 0.05
    """Largest mean of log(mu / pi), in nats per token, of a sample with A < 0.

    Keep it above the engine's mismatch.
    """

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        dropped_N = (batch.sum_N(batch.advantage_S) < 0) & (batch.mean_N(-batch.log_ratio_S) > self.delta)
        return ~batch.spread_S(dropped_N)


@MASKS.register("truncated")
@dataclass(frozen=True, kw_only=True)
class Truncated(Mask):
    """Overlong filtering (DAPO): drops samples that ended at the length limit.

    Their rewards stay in their group's baseline.
    """

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        return ~batch.spread_S(batch.truncated_N)


@MASKS.register("stapo")
@dataclass(frozen=True, kw_only=True)
class Stapo(Mask):
    """STAPO (arXiv 2602.15620): drops spurious tokens: unlikely ones, of A > 0, where the entropy is low.

    Such tokens have too large gradients.
    """

    scope = Scope.BATCH

    denominator: Denominator = "kept"
    max_prob: float = 0.002
    """A dropped token has a probability below this under pi."""
    quantile: float = 0.8
    """A dropped token has an entropy below this quantile of the step's entropies."""

    def check(self) -> None:
        if not 0 < self.max_prob < 1 or not 0 < self.quantile < 1:
            raise ConfigError("objective.masks: stapo needs max_prob and quantile between 0 and 1")

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        """All but tokens with A > 0, pi < max_prob and an entropy below the step's quantile."""
        unlikely_S = batch.logp_S.detach() < math.log(self.max_prob)
        low_entropy_S = batch.entropy_S.detach().double() < stats["entropy_quantile"].to(batch.logp_S.device)
        return ~((batch.advantage_S > 0) & unlikely_S & low_entropy_S)

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        return {"entropy": batch.entropy_S}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """The quantile of the entropies, linearly interpolated; minus infinity for no tokens."""
        ascending_S = observed["entropy"].sort().values
        if len(ascending_S) == 0:
            return {"entropy_quantile": ascending_S.new_tensor(-torch.inf)}
        position = self.quantile * (len(ascending_S) - 1)
        low, high = math.floor(position), math.ceil(position)
        return {"entropy_quantile": torch.lerp(ascending_S[low], ascending_S[high], position - low)}
