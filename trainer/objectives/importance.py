"""Importance weights between two recorded policies, at the level of a token, a sequence, or a sequence's geometric mean.

All in log space, the exponent clamped to +-20, so that a log-ratio of a thousand is a large weight and not an infinity.

Shape suffixes: S sampled tokens, N sequences, B sequences of the whole step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from trainer.objectives.base import SampledTokens

LEVELS = ("token", "sequence", "geometric")
MAX_EXPONENT = 20.0


def check_level(key: str, level: str) -> None:
    """Raises ConfigError for an unknown level."""
    if level not in LEVELS:
        raise ConfigError(f"{key}={level}: use one of {', '.join(LEVELS)}")


def ratio_S(batch: SampledTokens, log_ratio_S: Tensor, *, level: str) -> Tensor:
    """exp(log-ratio) at each token: its own, its sequence's product, or the geometric mean of its sequence. Detached."""
    log_ratio_S = log_ratio_S.detach()
    if level == "sequence":
        log_ratio_S = batch.spread_S(batch.sum_N(log_ratio_S))
    elif level == "geometric":
        log_ratio_S = batch.spread_S(batch.mean_N(log_ratio_S))
    return torch.exp(log_ratio_S.clamp(-MAX_EXPONENT, MAX_EXPONENT))


def within_S(ratio_S: Tensor, *, low: float, high: float) -> Tensor:
    """bool: the ratio is inside the band, its ends included."""
    return (ratio_S >= low) & (ratio_S <= high)


def live_ratio_S(logp_S: Tensor, old_S: Tensor) -> Tensor:
    """exp(pi - old) of each token, carrying pi's gradient (none beyond the clamp)."""
    return torch.exp((logp_S - old_S).clamp(-MAX_EXPONENT, MAX_EXPONENT))


def ess_ratio(log_w_B: Tensor) -> float:
    """Effective sample size over B, `(sum W)^2 / (B sum W^2)`, in log space so that it cannot overflow; 1 for no sequences."""
    if len(log_w_B) == 0:
        return 1.0
    log_ess = 2 * torch.logsumexp(log_w_B, 0) - torch.logsumexp(2 * log_w_B, 0)
    return math.exp(float(log_ess)) / len(log_w_B)
