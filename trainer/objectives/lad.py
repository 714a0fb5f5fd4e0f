"""LAD (arXiv 2602.20132): minimizes a divergence between the policy's change and that implied by advantages.

    loss = E_mu [ e^u f(W / e^u) ],  u = A / eta,  W = prod_t pi_t / mu_t
    implemented as  sg(W f'(W / e^u)) log pi,  which has the same gradient

The best policy within a trust region changes each completion's probability by a factor proportional to
exp(A / eta); the f-divergence compares the actual change with this target. The gradient is zero at W = e^u:
a sample that has been reinforced enough is left alone, whatever its advantage. Under `js`, f' is at most
log(2) / 2 and behaves like log W - u for small W. On-policy that is REINFORCE with the advantage
(softplus(u) - log 2) / 2, whose slope at A = 0 is 1 / (4 eta).

No clip and no cap, as published. Addition: the levels `geometric` and `token`, for long completions; the
paper's W is the `sequence` product. The loss is the paper's practical objective (lemma 3.2) as others quote
it; not compared with the authors' code or paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from areal_like.config.common import PositiveFloat
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT, Level, ratio_S


@OBJECTIVES.register("lad")
@dataclass(frozen=True, kw_only=True)
class Lad(Objective):
    """`sg(W f'(W / e^u)) log pi`, u = A / eta"""

    eta: PositiveFloat = 0.25
    """Advantage at which the target W = e^u is e. With `js`, 1/4 has the slope of REINFORCE on-policy."""
    divergence: Literal["js", "hellinger", "tv"] = "js"
    """f(x): `js` x/2 log x - (x+1)/2 log((x+1)/2) | `hellinger` (sqrt(x) - 1)^2 / 2 | `tv` |x - 1| / 2."""
    level: Level = "sequence"
    """Level of W: `sequence` (the product) | `geometric` | `token`."""

    skips_zero_advantage = False
    """Without an advantage, W is still pulled to 1."""

    @property
    def takes_token_advantages(self) -> bool:  # type: ignore[override]
        return self.level == "token"

    @property
    def ess_level(self) -> str:  # type: ignore[override]
        return self.level

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """A loss with the divergence's gradient; `divergence` is the divergence itself."""
        advantage_S = (
            batch.advantage_S if self.level == "token" else batch.spread_S(batch.mean_N(batch.advantage_S))
        )
        u_S = (advantage_S / self.eta).clamp(-MAX_EXPONENT, MAX_EXPONENT)
        w_S = ratio_S(batch, batch.log_ratio_S, level=self.level)
        log_x_S = w_S.log() - u_S
        return TokenLosses(
            loss_S=w_S * self._slope(log_x_S) * batch.logp_S,
            means={"divergence": self._value(w_S, u_S.exp(), log_x_S)},
        )

    def _slope(self, log_x_S: Tensor) -> Tensor:
        """[S] f'(x)"""
        if self.divergence == "js":
            return 0.5 * (math.log(2) - softplus(-log_x_S))
        if self.divergence == "hellinger":
            return 0.5 * (1 - torch.exp(-0.5 * log_x_S))
        return 0.5 * log_x_S.sign()

    def _value(self, w_S: Tensor, target_S: Tensor, log_x_S: Tensor) -> Tensor:
        """[S] e^u f(W / e^u), with `target_S` = e^u."""
        if self.divergence == "js":
            return 0.5 * (w_S * log_x_S - (w_S + target_S) * (softplus(log_x_S) - math.log(2)))
        if self.divergence == "hellinger":
            return 0.5 * (w_S.sqrt() - target_S.sqrt()).square()
        return 0.5 * (w_S - target_S).abs()
