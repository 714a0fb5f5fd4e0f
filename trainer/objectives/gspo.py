"""GSPO (arXiv 2507.18071): PPO's clip on the sequence's geometric ratio, so that a sequence is learned from as a whole or not at all.

`s = exp(mean(pi - mu))`; each token carries `s exp(pi - sg pi)`, whose value is s and whose gradient reaches its own log-prob alone: with
`trainer.normalizer=seq_mean_token_mean`, the paper's, the sum is the sequence's clipped s. Its bounds are tiny because s is a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from areal_like.errors import ConfigError
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import ratio_S
from trainer.objectives.ppo import clipped_surrogate


@OBJECTIVES.register("gspo")
@dataclass(frozen=True, kw_only=True)
class Gspo(Objective):
    """`max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))`"""

    clip_low: float = 3e-4
    """A sequence's ratio below 1 - this is not lowered further. Under real staleness 3e-4 clips nearly all: try .05 and more."""
    clip_high: float = 4e-4
    """A sequence's ratio above 1 + this is not raised further."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or not self.clip_high > 0:
            raise ConfigError("objective: want clip_low between 0 and 1 and clip_high above 0")

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The clipped sequence ratio at each of its tokens."""
        s_S = ratio_S(batch, batch.log_ratio_S, level="geometric") * torch.exp(
            batch.logp_S - batch.logp_S.detach()
        )
        loss_S, clipped_S = clipped_surrogate(
            s_S, s_S.clamp(1 - self.clip_low, 1 + self.clip_high), batch.advantage_S
        )
        return TokenLosses(loss_S=loss_S, means={"clipped_fraction": clipped_S})
