"""DCPO (arXiv 2509.02333): PPO's clip with wider bounds for tokens that the behavior policy found unlikely.

    loss_t = max(-A r, -A clip(r, low(q), high(q))),  r = pi_t / mu_t,  q = mu_t
    low(q)  = 1/2 + 1/2 sqrt(max(1 - 4 clip_low / q, 0))
    high(q) = min(1/2 + 1/2 sqrt(1 + 4 clip_high / q), max_ratio)

PPO bounds the ratio, so a rare token can hardly gain probability at all. DCPO bounds |(r - 1) pi_t|, the
change of the token's probability times the ratio. With pi_t = r q, solving `|r - 1| r q <= clip` for r gives
the bounds above. They equal those of the authors' code (lime-RL/DCPO), which caps the upper bound at no
less than 10 and also has PPO's dual clip. Left out: DCPO's smoothing of advantages over a prompt's history,
because prompts seldom recur here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from areal_like.config.common import Bounds, PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import live_ratio_S
from trainer.objectives.ppo import clipped_surrogate


@OBJECTIVES.register("dcpo")
@dataclass(frozen=True, kw_only=True)
class Dcpo(Objective):
    """`max(-A r, -A clip(r, low(q), high(q)))`, q = mu of the token"""

    ess_level = "token"

    clip_low: PositiveFloat = 0.16
    """Bound on |(r - 1) pi| of a token that loses probability."""
    clip_high: PositiveFloat = 0.2
    """Bound on |(r - 1) pi| of a token that gains probability."""
    max_ratio: Annotated[float, Bounds(1, excludes_low=True)] = 5.0
    """Ceiling of the upper bound, which grows without limit as q goes to 0."""

    def bounds_S(self, behavior_logp_S: Tensor) -> tuple[Tensor, Tensor]:
        """([S], [S]) lower and upper bound of each token's ratio, from its behavior log-prob [S]."""
        # Beyond this log-prob both bounds have saturated; the clamp keeps 1/q finite.
        floor = math.log(4 * self.clip_high) - 2 * math.log(2 * self.max_ratio)
        inverse_S = torch.exp(-behavior_logp_S.clamp(min=min(floor, math.log(4 * self.clip_low))))
        low_S = 0.5 + 0.5 * torch.sqrt((1 - 4 * self.clip_low * inverse_S).clamp(min=0))
        high_S = 0.5 + 0.5 * torch.sqrt(1 + 4 * self.clip_high * inverse_S)
        return low_S, high_S.clamp(max=self.max_ratio)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The clipped surrogate; `clipped_fraction` counts tokens that a bound has cut off."""
        r_S = live_ratio_S(batch.logp_S, batch.behavior_logp_S)
        low_S, high_S = self.bounds_S(batch.behavior_logp_S)
        loss_S, clipped_S = clipped_surrogate(
            r_S, torch.minimum(torch.maximum(r_S, low_S), high_S), batch.advantage_S
        )
        return TokenLosses(loss_S=loss_S, means={"clipped_fraction": clipped_S})
