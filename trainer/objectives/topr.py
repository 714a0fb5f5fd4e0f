"""TOPR (arXiv 2503.14286): off-policy REINFORCE in which bad samples lose weight as they become unlikely.

    loss_t = -w A log pi_t,  w = 1 for A >= 0,  w = sg(clip(W, 0, 1)) for A < 0,  W = prod_t pi_t / mu_t

Off-policy REINFORCE diverges because it keeps lowering the probability of samples that are already unlikely.
Raising good samples is supervised learning and cannot diverge. Addition: W at the levels `token` and
`geometric`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import Level, ratio_S


@OBJECTIVES.register("topr")
@dataclass(frozen=True, kw_only=True)
class Topr(Objective):
    """`-A log pi` for A >= 0, `-sg(min(W, 1)) A log pi` for A < 0"""

    level: Level = "sequence"
    """Level of the ratio W: `token` | `sequence` (the paper's) | `geometric`."""

    @property
    def ess_level(self) -> str:  # type: ignore[override]
        return self.level

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The tapered loss; `clipped_fraction` counts tokens with A < 0 and a ratio above 1."""
        r_S = ratio_S(batch, batch.log_ratio_S, level=self.level)
        bad_S = batch.advantage_S < 0
        weight_S = torch.where(bad_S, r_S.clamp(max=1.0), 1.0)
        return TokenLosses(
            loss_S=-weight_S * batch.advantage_S * batch.logp_S, means={"clipped_fraction": bad_S & (r_S > 1)}
        )
