"""VESPO (arXiv 2602.10693): REINFORCE weighted by a soft, asymmetric kernel of the importance weight W.

    loss_t = -sg(phi(W)) A log pi_t
    phi(W) = W^k exp(lambda (1 - W)),  W = prod_t pi_t / mu_t
    (k, lambda) = (2, 3) for A >= 0,  (3, 2) for A < 0

phi(1) = 1; phi peaks at W = k / lambda and falls off on both sides, so neither a sample that has become
unlikely nor one that has become much likelier dominates. W is the product over the sample: its
length-normalized form, or one (k, lambda) for both signs, breaks the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_like.config.common import PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT

MIN_LOG_W = math.log(1e-8)
"""Floor of log W in `k log W`; smaller weights give the same factor."""


@OBJECTIVES.register("vespo")
@dataclass(frozen=True, kw_only=True)
class Vespo(Objective):
    """`-sg(phi(W)) A log pi`, phi(W) = W^k exp(lambda (1 - W))"""

    k_positive: PositiveFloat = 2.0
    """k for A >= 0."""
    lambda_positive: PositiveFloat = 3.0
    """lambda for A >= 0."""
    k_negative: PositiveFloat = 3.0
    """k for A < 0."""
    lambda_negative: PositiveFloat = 2.0
    """lambda for A < 0."""

    @property
    def weighs_products(self) -> bool:
        return True

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The weighted log-probs; the metric `phi` is the mean weight of a sample."""
        log_w_N = batch.sum_N(batch.log_ratio_S.clamp(-MAX_EXPONENT, MAX_EXPONENT))
        # A sample has one sign, even if the advantage varies over its tokens.
        phi_N = self.phi_N(log_w_N, positive_N=batch.sum_N(batch.advantage_S) >= 0)
        return TokenLosses(
            loss_S=-batch.spread_S(phi_N) * batch.advantage_S * batch.logp_S, means={"phi": phi_N}
        )

    def phi_N(self, log_w_N: Tensor, *, positive_N: Tensor) -> Tensor:
        """[N] phi(W) of each sample, from log W [N] and the sign of its advantage [N] (bool: A >= 0)."""
        log_w_N = log_w_N.clamp(-MAX_EXPONENT, MAX_EXPONENT)
        k_N = torch.where(positive_N, self.k_positive, self.k_negative).to(log_w_N)
        lambda_N = torch.where(positive_N, self.lambda_positive, self.lambda_negative).to(log_w_N)
        log_phi_N = k_N * log_w_N.clamp(min=MIN_LOG_W) + lambda_N * (1 - torch.exp(log_w_N))
        return torch.exp(log_phi_N).nan_to_num(nan=0.0)
