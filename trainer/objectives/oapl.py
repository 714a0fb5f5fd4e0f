"""OAPL (arXiv 2602.19362): regress the sequence's log-ratio on its advantage; no importance weights, so nothing can explode.

The optimum of reward with a KL penalty towards the behaviour policy satisfies `beta2 log(pi/mu) = r - V*`, and V* of a prompt can be
estimated from its group: `V* = beta1 log mean_j exp(r_j / beta1)`. The loss is the squared residual of a sequence,
`[beta2 sum_t (pi - mu) - (r - V*)]^2`, averaged over sequences: no 1/2, no length, no clip. Equal rewards still pull pi back to mu.

V* is the method's own advantage, so a group is seen whole where advantages are made and may be cut over micro-batches afterwards. Each
token carries an equal share of its sequence's residual in value and exactly its own derivative in gradient, so that masks compose.

beta2 is the price of a nat per sequence, and log-ratios grow with length, so it must shrink with it: 1e-3 for thousands of tokens, .25 at
64, .3 for about ten. The default rule is a power law through the first two, levelled off at the third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import Advantage, FloatArray, rewards_of
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses


def default_beta2(max_tokens: int) -> float:
    """`min(.3, .25 (64 / max_tokens)^(4/3))`: .3 up to 55 tokens, .25 at 64, 1e-3 at 4096."""
    return min(0.3, 0.25 * math.pow(64 / max_tokens, 4 / 3))


@dataclass(frozen=True, kw_only=True)
class SoftAdvantage(Advantage):
    """r - V*, V* = beta1 log mean exp(r / beta1)."""

    beta1: float = 1.0

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G]"""
        return [float(a) for a in self.of_rewards(rewards_of(group))]

    def of_rewards(self, rewards_G: FloatArray) -> FloatArray:
        """[G]; exactly zero without spread."""
        top = rewards_G.max()
        return np.asarray(
            rewards_G - top - self.beta1 * np.log(np.exp((rewards_G - top) / self.beta1).mean())
        )


@OBJECTIVES.register("oapl")
@dataclass(frozen=True, kw_only=True)
class Oapl(Objective):
    """`[beta2 sum_t (pi - mu) - (r - V*)]^2`, mean over sequences."""

    normalizer = "seq_mean_token_sum"
    skips_zero_advantage = False
    single_version = True

    beta1: float = 1.0
    """Temperature of V*: small takes the best of the group, large its mean."""
    beta2: float = 0.0
    """Weight of the log-ratio; 0: `default_beta2(max_tokens)`."""
    max_tokens: int = 64
    """Length that the rule for beta2 is asked for; the trainer fills in `sampling.max_new_tokens`."""

    def __post_init__(self) -> None:
        if not self.beta1 > 0 or self.beta2 < 0 or self.max_tokens < 1:
            raise ConfigError("objective: want beta1 above 0, beta2 at least 0 and max_tokens at least 1")

    @property
    def advantage(self) -> Advantage:  # type: ignore[override]
        """The method's own."""
        return SoftAdvantage(beta1=self.beta1)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The squared residual, spread over the sequence's tokens."""
        beta2 = self.beta2 or default_beta2(self.max_tokens)
        residual_N = beta2 * batch.log_w_N - batch.mean_N(batch.advantage_S)
        share_S = batch.spread_S(residual_N.square() / batch.length_N.clamp(min=1))
        slope_S = batch.spread_S(2 * beta2 * residual_N)
        return TokenLosses(
            loss_S=share_S + slope_S * (batch.logp_S - batch.logp_S.detach()),
            means={"residual_abs": torch.abs(residual_N)},
        )
