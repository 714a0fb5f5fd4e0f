"""GSPO (arXiv 2507.18071): PPO's clip on the geometric mean ratio of the whole sample.

    loss = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)),  s = exp(mean_t log(pi_t / mu_t))

Each token has the ratio `sg(s) pi_t / sg(pi_t)`, whose value is s and whose gradient reaches only its own
log-prob (GSPO-token); with the normalizer of the paper, `seq_mean_token_mean`, the sum over tokens is the
sample's clipped s. The bounds are tiny because s is a mean. A mean log-ratio above 10 counts as 10 and has
no gradient, as in verl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from areal_like.config.common import PositiveFloat
from areal_like.config.trainer import NormalizerName
from areal_like.errors import ConfigError
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.ppo import clipped_surrogate

_MAX_LOG_RATIO = 10.0


@OBJECTIVES.register("gspo")
@dataclass(frozen=True, kw_only=True)
class Gspo(Objective):
    """`max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))`"""

    ess_level = "geometric"

    clip_low: float = 3e-4
    """A ratio s below 1 - clip_low is not lowered further.

    On stale data 3e-4 clips nearly everything: try .05 and more.
    """
    clip_high: PositiveFloat = 4e-4
    """A ratio s above 1 + clip_high is not raised further."""
    normalizer: NormalizerName | None = None
    """Normalizer of the loss, which replaces `trainer.normalizer`; null: that one."""

    def check(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ConfigError("objective: use clip_low between 0 and 1")

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        mean_S = batch.spread_S(batch.mean_N(batch.log_ratio_S))
        s_S = torch.exp((mean_S + (batch.logp_S - batch.logp_S.detach())).clamp(max=_MAX_LOG_RATIO))
        loss_S, clipped_S = clipped_surrogate(
            s_S, s_S.clamp(1 - self.clip_low, 1 + self.clip_high), batch.advantage_S
        )
        return TokenLosses(loss_S=loss_S, means={"clipped_fraction": clipped_S})
