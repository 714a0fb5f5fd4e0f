"""DPPO with total variation (arXiv 2602.04879): PPO with a trust region on probabilities instead of ratios.

    loss_t = -A r [inside the region] + pull (log r)^2,  r = pi_t / mu_t
    inside:  pi_t - mu_t <= high  if A > 0,  mu_t - pi_t <= low  if A < 0

A ratio of 2 is a large change for a token of probability .4 and a negligible one for a token of probability
1e-5. The policy term of a token is dropped once its probability has moved beyond the threshold in the
direction of its advantage. Addition: the small quadratic term, which pulls every token, inside or outside the
region, back towards the behavior policy. It is not the paper's but prime-rl's, which names Kimi K2.5 (arXiv
2602.02276) as its source; `pull=0` leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from areal_like.config.common import NonNegativeFloat, PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import live_ratio_S


@OBJECTIVES.register("dppo_tv")
@dataclass(frozen=True, kw_only=True)
class DppoTv(Objective):
    """`-A r [inside the region] + pull (log r)^2`"""

    ess_level = "token"

    low: PositiveFloat = 0.2
    """Probability that a token with A < 0 may lose."""
    high: PositiveFloat = 0.2
    """Probability that a token with A > 0 may gain."""
    pull: NonNegativeFloat = 1e-3
    """Weight of the squared log-ratio."""

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """False with a pull, which also acts on tokens without an advantage."""
        return self.pull == 0

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The masked surrogate and the pull; `kept_fraction` counts tokens inside the region."""
        moved_S = torch.exp(batch.logp_S.detach()) - torch.exp(batch.behavior_logp_S)
        beyond_S = ((batch.advantage_S > 0) & (moved_S > self.high)) | (
            (batch.advantage_S < 0) & (moved_S < -self.low)
        )
        policy_S = -batch.advantage_S * live_ratio_S(batch.logp_S, batch.behavior_logp_S) * ~beyond_S
        return TokenLosses(
            loss_S=policy_S + self.pull * (batch.logp_S - batch.behavior_logp_S).square(),
            means={"kept_fraction": ~beyond_S},
        )
