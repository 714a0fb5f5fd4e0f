"""Masks that drop tokens or samples outside a trust region around the behavior policy, by a divergence.

    kpop           a token, where max(KL_bern(pi_t || mu_t), KL_bern(mu_t || pi_t)) > max_kl
    trust_region   a sample, where max_t k2_t > max_kl or mean_t k3_t > mean_kl, over all of its tokens
                   (with `level=token`: a token, where k2_t > max_kl)

    KL_bern(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))
    k2 = (log r)^2 / 2,  k3 = r - 1 - log r,  r = pi_t / mu_t

`kpop` (KPop, Ant Group 2026, after IcePop): a fixed band of ratios drops rare tokens, whose probability has
hardly moved, and keeps likely ones that have moved far. The divergence between "this token" and "any other"
does neither: its band of ratios is wide for rare tokens and narrow for likely ones. A rare token may
therefore keep a large ratio, so the weight needs a separate cap. Checked against the formula in the authors'
report on Ling and Ring 2.6; not compared with their code.

`trust_region` (Trust Region Masking, arXiv 2512.23075): the error of the surrogate over a long sequence is
bounded by the largest divergence of any of its tokens, which no weight or clip of single tokens controls. So
a sample with a token outside the region is dropped whole, and leaves the normalizer. k2 is symmetric in pi
and mu; the mean of k3 over samples of mu is an unbiased estimate of KL(mu || pi).

Rejection and weight are separate: both are masks, and the objective around them has the importance weight.
The defaults are ours (the sources choose thresholds for their own engines).

Shape suffixes: S sampled tokens, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from areal_like.config.common import NonNegativeFloat, PositiveFloat
from areal_like.errors import ConfigError
from trainer.objectives.base import SampledTokens, StepStats
from trainer.objectives.importance import MAX_EXPONENT
from trainer.objectives.masks import MASKS, Denominator, Mask

LEAST_REST = 1e-8
"""Least probability of "any other token": float32 rounds a likelier token's to 1, and the KL would be
infinite."""


def bernoulli_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Element-wise KL(p || q) of two coins, from the logs of their probabilities; any shape."""
    p, rest_p, rest_q = logp.exp(), -torch.expm1(logp), -torch.expm1(logq)
    rest_p, rest_q = rest_p.clamp(min=LEAST_REST), rest_q.clamp(min=LEAST_REST)
    return p * (logp - logq) + rest_p * torch.log(rest_p / rest_q)


@MASKS.register("kpop")
@dataclass(frozen=True, kw_only=True)
class Kpop(Mask):
    """KPop: drops tokens whose probability has moved too far, measured by the KL divergence of two coins."""

    max_kl: PositiveFloat = 0.1
    """Largest KL, in nats, in the direction in which it is larger."""

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        pi_S, mu_S = batch.logp_S.detach(), batch.behavior_logp_S
        return torch.maximum(bernoulli_kl(pi_S, mu_S), bernoulli_kl(mu_S, pi_S)) <= self.max_kl


@MASKS.register("trust_region")
@dataclass(frozen=True, kw_only=True)
class TrustRegion(Mask):
    """Trust Region Masking: drops whole samples by their largest and their mean divergence."""

    denominator: Denominator = "kept"
    level: Literal["sequence", "token"] = "sequence"
    """`sequence` | `token`, which drops only the tokens outside the region."""
    max_kl: NonNegativeFloat = 2.0
    """Largest k2 of any token, in nats; 2 allows ratios from exp(-2) to exp(2). 0: no such limit."""
    mean_kl: NonNegativeFloat = 0.05
    """Largest mean of k3 over a sample's tokens, in nats; unused with `level=token`. 0: no such limit."""

    def check(self) -> None:
        if self.max_kl + self.mean_kl * (self.level == "sequence") == 0:
            raise ConfigError(
                "objective.masks: trust_region needs max_kl or (with level=sequence) mean_kl above 0"
            )

    def kept_S(self, batch: SampledTokens, stats: StepStats) -> Tensor:
        """Tokens inside the region; with `level=sequence`, those of samples that are inside."""
        log_r_S = batch.log_ratio_S
        outside_S = torch.zeros_like(log_r_S, dtype=torch.bool)
        if self.max_kl:
            outside_S = 0.5 * log_r_S.square() > self.max_kl
        if self.level == "token":
            return ~outside_S
        outside_N = batch.sum_N(outside_S.to(log_r_S.dtype)) > 0
        if self.mean_kl:
            k3_S = torch.expm1(log_r_S.clamp(-MAX_EXPONENT, MAX_EXPONENT)) - log_r_S
            outside_N |= batch.mean_N(k3_S) > self.mean_kl
        return ~batch.spread_S(outside_N)
