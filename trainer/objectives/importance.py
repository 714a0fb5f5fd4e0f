"""Importance ratios of two policies: per token, per sample (product), or as the geometric mean.

All are computed in log space with the exponent clamped to +-20, so a log-ratio of a thousand gives a large
weight and not infinity.

Shape suffixes: S sampled tokens, N samples, B samples of the whole step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trainer.objectives.base import SampledTokens

Level = Literal["token", "sequence", "geometric"]
"""Level of a ratio or weight. A sequence is a whole sample: product and mean are over all of its segments."""
MAX_EXPONENT = 20.0
"""Bound of exponents; exp(20) is 4.9e8."""


def ratio_S(batch: SampledTokens, log_ratio_S: Tensor, *, level: Level) -> Tensor:
    """[S] detached exp of log-ratios [S]: of each token, of its sample's sum, or of its sample's mean."""
    log_ratio_S = log_ratio_S.detach()
    if level == "sequence":
        log_ratio_S = batch.spread_S(batch.sum_N(log_ratio_S))
    elif level == "geometric":
        log_ratio_S = batch.spread_S(batch.mean_N(log_ratio_S))
    return torch.exp(log_ratio_S.clamp(-MAX_EXPONENT, MAX_EXPONENT))


def within_S(ratio_S: Tensor, *, low: float, high: float) -> Tensor:
    return (ratio_S >= low) & (ratio_S <= high)


def live_ratio_S(logp_S: Tensor, old_S: Tensor) -> Tensor:
    """[S] exp(logp - old) of each token, with the gradient of logp (none beyond the clamp)."""
    return torch.exp((logp_S - old_S).clamp(-MAX_EXPONENT, MAX_EXPONENT))


def ess_ratio(log_w_B: Tensor) -> float:
    """Effective sample size over B, `(sum W)^2 / (B sum W^2)`, from log W [B]; 1 for no weights.

    Computed in log space so that it cannot overflow.
    """
    if len(log_w_B) == 0:
        return 1.0
    log_ess = 2 * torch.logsumexp(log_w_B, 0) - torch.logsumexp(2 * log_w_B, 0)
    return math.exp(float(log_ess)) / len(log_w_B)
