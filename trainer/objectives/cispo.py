"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE weighted by a clipped, detached token ratio.

    loss_t = -sg(min(r_t, high)) A_t log pi_t,  r_t = pi_t / mu_t

No token loses its gradient: PPO's clip drops the rare tokens whose probability moves most; CISPO only limits
their weight. It equals token-level truncated importance sampling (`tis.py`) under another name and with
another default. There is no lower bound, as published.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config.common import PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import ratio_S


@OBJECTIVES.register("cispo")
@dataclass(frozen=True, kw_only=True)
class Cispo(Objective):
    """`-sg(min(r, high)) A log pi`"""

    ess_level = "token"

    high: PositiveFloat = 5.0
    """Largest weight of a token."""

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The weighted log-probs; `clipped_fraction` counts ratios above `high`."""
        r_S = ratio_S(batch, batch.log_ratio_S, level="token")
        return TokenLosses(
            loss_S=-r_S.clamp(max=self.high) * batch.advantage_S * batch.logp_S,
            means={"clipped_fraction": r_S > self.high},
        )
