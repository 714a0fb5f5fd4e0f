"""TOPR (arXiv 2503.14286), tapered off-policy REINFORCE: good samples count fully, however old; bad ones taper off as they become unlikely.

`-w A pi`, w = 1 for A >= 0, else the sequence's pi/mu clamped to [0, 1]. Pushing down what is already unlikely is what makes off-policy
REINFORCE diverge; pulling up good samples is supervised learning and cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import check_level, ratio_S


@OBJECTIVES.register("topr")
@dataclass(frozen=True, kw_only=True)
class Topr(Objective):
    """`-A pi` for A >= 0, `-min(ratio, 1) A pi` for A < 0."""

    level: str = "sequence"
    """Of the ratio: `token` | `sequence` (the paper's) | `geometric`."""

    def __post_init__(self) -> None:
        check_level("objective.level", self.level)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The tapered loss; `clipped_fraction` counts ratios above 1 among A < 0."""
        r_S = ratio_S(batch, batch.log_ratio_S, level=self.level)
        bad_S = batch.advantage_S < 0
        weight_S = torch.where(bad_S, r_S.clamp(max=1.0), 1.0)
        return TokenLosses(
            loss_S=-weight_S * batch.advantage_S * batch.logp_S, means={"clipped_fraction": bad_S & (r_S > 1)}
        )
