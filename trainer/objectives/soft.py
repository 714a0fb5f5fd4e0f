"""SAPO and MASPO: soft gates instead of PPO's hard clip, so that a token's gradient fades with its ratio.

    sapo   (arXiv 2511.20347)  loss_t = -A (4 / tau) sigmoid(tau (r - 1)),  r = pi_t / mu_t
    maspo  (arXiv 2602.17550)  loss_t = -sg(F) r A,
                               F = exp(-(r - 1)^2 / (2 sigma_t^2)) where A (r - 1) > 0, else 1,
                               sigma_t = sigma mu_t^-alpha (1 + beta A)    for A > 0,
                               sigma_t = sigma mu_t^-alpha / (1 - beta A)  for A < 0

At r = 1, SAPO's loss has the slope of the unclipped surrogate -A r; further away on either side the slope
decreases. tau is larger for A < 0, because lowering a token's probability raises the logits of the whole
vocabulary. MASPO gates only the side that PPO would clip; its gate is wider for tokens that the behavior
policy found unlikely and for large positive advantages. Addition: sigma_t is capped at `max_sigma`. MASPO's
formulas are those that others quote from the paper; not compared with the authors' code or paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_like.config.common import NonNegativeFloat, PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import live_ratio_S


@OBJECTIVES.register("sapo")
@dataclass(frozen=True, kw_only=True)
class Sapo(Objective):
    """`-A (4 / tau) sigmoid(tau (r - 1))`"""

    ess_level = "token"

    tau_positive: PositiveFloat = 1.0
    """Temperature for A >= 0."""
    tau_negative: PositiveFloat = 1.05
    """Temperature for A < 0; larger falls off faster."""

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        r_S = live_ratio_S(batch.logp_S, batch.behavior_logp_S)
        tau_S = torch.where(batch.advantage_S >= 0, self.tau_positive, self.tau_negative).to(r_S)
        return TokenLosses(loss_S=-batch.advantage_S * (4 / tau_S) * torch.sigmoid(tau_S * (r_S - 1)))


@OBJECTIVES.register("maspo")
@dataclass(frozen=True, kw_only=True)
class Maspo(Objective):
    """`-sg(F) r A`, F = exp(-(r - 1)^2 / (2 sigma^2)) where A (r - 1) > 0, else 1"""

    ess_level = "token"

    sigma: PositiveFloat = 1.0
    """Width of the gate at probability 1 and advantage 0."""
    alpha: NonNegativeFloat = 0.3
    """Power by which the gate widens for unlikely tokens."""
    beta: NonNegativeFloat = 0.03
    """Factor by which the advantage widens (A > 0) or narrows (A < 0) the gate."""
    max_sigma: PositiveFloat = 10.0
    """Largest width of the gate."""

    def sigma_S(self, behavior_logp_S: Tensor, advantage_S: Tensor) -> Tensor:
        """[S] width of each token's gate, from behavior log-probs [S] and advantages [S]."""
        confidence_S = torch.log1p(self.beta * advantage_S.abs()) * torch.sign(advantage_S)
        log_sigma_S = math.log(self.sigma) - self.alpha * behavior_logp_S + confidence_S
        return torch.exp(log_sigma_S.clamp(max=math.log(self.max_sigma)))

    def gate_S(self, ratio_S: Tensor, behavior_logp_S: Tensor, advantage_S: Tensor) -> Tensor:
        """[S] F of each token, from detached ratios [S], behavior log-probs [S] and advantages [S]."""
        deviation_S = (ratio_S - 1) / self.sigma_S(behavior_logp_S, advantage_S)
        return torch.where(advantage_S * (ratio_S - 1) > 0, torch.exp(-0.5 * deviation_S.square()), 1.0)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The gated surrogate; `gate` is the mean of F."""
        r_S = live_ratio_S(batch.logp_S, batch.behavior_logp_S)
        gate_S = self.gate_S(r_S.detach(), batch.behavior_logp_S, batch.advantage_S)
        return TokenLosses(loss_S=-gate_S * r_S * batch.advantage_S, means={"gate": gate_S})
