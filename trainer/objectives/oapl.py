"""OAPL (arXiv 2602.19362): regresses the sample's log-ratio on its advantage, without importance weights.

    loss = mean over samples of [ beta2 sum_t log(pi_t / mu_t) - (R - V*) ]^2
    V*   = beta1 log mean_j exp(R_j / beta1)   over the group

The optimum of reward with a KL penalty towards the behavior policy satisfies `beta2 log(pi / mu) = R - V*`.
No factor 1/2, no division by length, no clip. A group with equal rewards still pulls pi back to mu.

`R - V*` is implemented as an advantage estimator, which gets whole groups; a group may be cut over
micro-batches afterwards. The value of a token's loss is an equal share of its sample's squared residual;
the gradient of a token's loss reaches only its own log-prob, so masks compose.

A sample of several turns or segments is regressed as a whole, on its whole reward. A sample of several
versions is never trained on: `buffer.group_filter=single_version`, which the objective requires, drops its
group.

Addition: a default for beta2. It is the weight of the sample's log-ratio, which grows with length, so beta2
must shrink with length: 1e-3 for thousands of tokens, .25 at 64, .3 at about ten. The default is a power law
through the first two, capped at the third, and never below 1e-3, which the authors use at 32,000 tokens.

Shape suffixes: S sampled tokens, N samples, G samples of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from areal_like.config.common import NonNegativeFloat, PositiveFloat, PositiveInt
from areal_like.trajectory import Trajectory
from trainer.advantages.base import Advantage, FloatArray, rewards_of
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses


def default_beta2(max_tokens: int) -> float:
    """`.25 (64 / max_tokens)^(4/3)` within [1e-3, .3]: .3 up to 55 tokens, .25 at 64, 1e-3 from 4096 on."""
    return max(1e-3, min(0.3, 0.25 * math.pow(64 / max_tokens, 4 / 3)))


def regression(batch: SampledTokens, beta: float) -> TokenLosses:
    """`[beta sum_t log(pi / mu) - A]^2` of each sample, an equal share of it at each of its tokens."""
    residual_N = beta * batch.log_w_N - batch.mean_N(batch.advantage_S)
    share_S = batch.spread_S(residual_N.square() / batch.length_N.clamp(min=1))
    slope_S = batch.spread_S(2 * beta * residual_N)
    return TokenLosses(
        loss_S=share_S + slope_S * (batch.logp_S - batch.logp_S.detach()),
        means={"residual_abs": torch.abs(residual_N)},
    )


@dataclass(frozen=True, kw_only=True)
class SoftAdvantage(Advantage):
    """R - V*, V* = beta1 log mean exp(R / beta1) over the group."""

    credits_turns = False

    beta1: float = 1.0
    """Temperature of V*."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [float(a) for a in self.of_rewards(rewards_of(group))]

    def of_rewards(self, rewards_G: FloatArray) -> FloatArray:
        """[G] from rewards [G]; exactly zero if all are equal."""
        top = rewards_G.max()
        return np.asarray(
            rewards_G - top - self.beta1 * np.log(np.exp((rewards_G - top) / self.beta1).mean())
        )


@OBJECTIVES.register("oapl")
@dataclass(frozen=True, kw_only=True)
class Oapl(Objective):
    """`[beta2 sum_t log(pi / mu) - (R - V*)]^2`, mean over samples"""

    normalizer = "seq_mean_token_sum"
    skips_zero_advantage = False
    single_version = True
    takes_token_advantages = False

    beta1: PositiveFloat = 1.0
    """Temperature of V*: V* tends to the group's best reward as it falls, to the mean as it rises."""
    beta2: NonNegativeFloat = 0.0
    """Weight of the log-ratio; 0: `default_beta2(max_tokens)`."""
    max_tokens: PositiveInt = 64
    """Length for `default_beta2`; the trainer fills in `sampling.max_new_tokens`."""

    @property
    def advantage(self) -> Advantage:  # type: ignore[override]
        return SoftAdvantage(beta1=self.beta1)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The squared residual, spread over the sample's tokens; `residual_abs` is the mean |residual|."""
        return regression(batch, self.beta2 or default_beta2(self.max_tokens))
