"""LAD (arXiv 2602.20132): the policy's change is matched to what the advantages ask for, instead of being pushed along them for ever.

The best policy within a trust region changes each answer's probability by a factor that goes with exp(A / eta). So an f-divergence between
what has changed and what should is minimised over the samples of the behaviour policy:

    E_mu [ e^u f(W / e^u) ],  u = A / eta      whose gradient is that of  sg(W f'(W / e^u)) pi

It vanishes where W = e^u: what has been reinforced enough is left alone, whatever its advantage. Under `js`, f' is at most log(2) / 2
above and goes like log W - u below. On-policy that is REINFORCE with the advantage (softplus(u) - log 2) / 2, whose slope at A = 0 is
1 / (4 eta). No clip and no cap, as published; other levels than `sequence`, the paper's W, are for long answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from areal_like.errors import ConfigError
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT, check_level, ratio_S

_DIVERGENCES = ("js", "hellinger", "tv")


@OBJECTIVES.register("lad")
@dataclass(frozen=True, kw_only=True)
class Lad(Objective):
    """`sg(W f'(W / e^u)) pi`"""

    eta: float = 0.25
    """Advantage that asks for a factor e. 1/4 gives `js` REINFORCE's slope on-policy."""
    divergence: str = "js"
    """`js` x/2 log x - (x+1)/2 log((x+1)/2) | `hellinger` (sqrt(x) - 1)^2 / 2 | `tv` |x - 1| / 2."""
    level: str = "sequence"
    """Of W: `sequence` (the true product) | `geometric` | `token`."""

    skips_zero_advantage = False
    """Without an advantage W is still pulled to 1."""

    def __post_init__(self) -> None:
        check_level("objective.level", self.level)
        if self.divergence not in _DIVERGENCES:
            raise ConfigError(f"objective.divergence={self.divergence}: use one of {', '.join(_DIVERGENCES)}")
        if self.eta <= 0:
            raise ConfigError(f"objective.eta={self.eta:g}: want it above 0")

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The loss with the right gradient; `divergence` is the value that it is the gradient of."""
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
        """f'(x)"""
        if self.divergence == "js":
            return 0.5 * (math.log(2) - softplus(-log_x_S))
        if self.divergence == "hellinger":
            return 0.5 * (1 - torch.exp(-0.5 * log_x_S))
        return 0.5 * log_x_S.sign()

    def _value(self, w_S: Tensor, target_S: Tensor, log_x_S: Tensor) -> Tensor:
        """e^u f(W / e^u), with e^u the target."""
        if self.divergence == "js":
            return 0.5 * (w_S * log_x_S - (w_S + target_S) * (softplus(log_x_S) - math.log(2)))
        if self.divergence == "hellinger":
            return 0.5 * (w_S.sqrt() - target_S.sqrt()).square()
        return 0.5 * (w_S - target_S).abs()
