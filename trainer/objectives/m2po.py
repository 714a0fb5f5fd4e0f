"""M2PO (arXiv 2510.01161): bounds the second moment of the step's log-ratios, in place of a fixed clip.

    authors   loss_t = max(-A r, -A clip(r, exp(-tau), exp(tau))),  r = pi_t / mu_t
              tau: the largest for which mean_harmful min((log r)^2, tau^2) < threshold
    areal     loss_t = -A r [kept];  mean over kept tokens of (log r)^2 < threshold

A token is harmful if a clip can act on it: A > 0 and r > 1, or A < 0 and r < 1. In the authors' form only
these count and are clipped, at the bound that the batch allows; the others are trained on without a limit.
AReaL's port drops the tokens with the largest squared log-ratio, of either sign, until the mean over the rest
is below the threshold; dropped tokens stay in the normalizer. At a standard deviation of log r of 1 it drops
73 % of the tokens where the authors' form clips 42 %.

The bound is computed over the whole step (scope BATCH; the authors' release uses a micro-batch). The authors'
optional minimum width of the clip is left out, as in their trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from areal_like.config.common import PositiveFloat
from trainer.batching.scope import Scope
from trainer.objectives.base import OBJECTIVES, Need, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT, live_ratio_S


@OBJECTIVES.register("m2po")
@dataclass(frozen=True, kw_only=True)
class M2po(Objective):
    """`max(-A r, -A clip(r, exp(-tau), exp(tau)))`, r = pi / mu, tau from the step's second moment"""

    ess_level = "token"

    scope = Scope.BATCH

    threshold: PositiveFloat = 0.04
    """Bound on the mean squared log-ratio."""
    variant: Literal["authors", "areal"] = "authors"
    """`authors` | `areal`: drop the tokens of the largest squared log-ratio, as AReaL does."""

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({Need.PROX}) if self.variant == "areal" else frozenset()

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """True in the authors' form, where a token without an advantage is never harmful."""
        return self.variant == "authors"

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The clipped surrogate (`clipped_fraction`), or the surrogate of the kept tokens
        (`kept_fraction`)."""
        r_S = live_ratio_S(batch.logp_S, batch.behavior_logp_S)
        bound = stats["bound"].to(r_S.device)
        if self.variant == "areal":
            kept_S = _dropped_by_S(batch).double() < bound
            return TokenLosses(loss_S=-batch.advantage_S * r_S * kept_S, means={"kept_fraction": kept_S})
        # Compared as in `observe`: exp(tau) in float32 may be on either side of the ratio that determined it.
        clipped_S = _is_harmful_S(batch) & (batch.log_ratio_S.square().double() >= bound)
        tau = bound.sqrt().clamp(max=MAX_EXPONENT).to(r_S)
        r_S = torch.where(clipped_S, torch.exp(tau * batch.advantage_S.sign()), r_S)
        return TokenLosses(loss_S=-batch.advantage_S * r_S, means={"clipped_fraction": clipped_S})

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """The squared log-ratio of every token; -1 for one that does not count."""
        if self.variant == "areal":
            return {"second_moment": _dropped_by_S(batch)}
        return {"second_moment": torch.where(_is_harmful_S(batch), batch.log_ratio_S.square(), -1.0)}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """`bound`: the smallest squared log-ratio that is clipped (tau^2) or dropped; infinite if none is.

        Tokens with equal ratios are dropped together, so the order of tokens does not matter.
        """
        moments = observed["second_moment"]
        ascending = moments[~(moments < 0)].sort().values  # of tokens that count, NaN among them
        infinite = ascending.new_tensor(torch.inf)
        if not len(ascending):
            return {"bound": infinite}
        rank = torch.arange(1, len(ascending) + 1)
        running = ascending.cumsum(0)
        if self.variant == "areal":
            num_kept = int((running / rank < self.threshold).sum())  # means of ascending values ascend
            return {"bound": ascending[num_kept] if num_kept < len(ascending) else infinite}
        if running[-1] / len(ascending) < self.threshold:
            return {"bound": infinite}
        capped = (running + (len(ascending) - rank) * ascending) / len(ascending)  # also ascending
        num_below = int((capped < self.threshold).sum())
        return {"bound": ascending[num_below - 1] if num_below else ascending.new_tensor(0.0)}


def _is_harmful_S(batch: SampledTokens) -> Tensor:
    """[S] bool: a clip can act on the token"""
    return batch.log_ratio_S * batch.advantage_S > 0


def _dropped_by_S(batch: SampledTokens) -> Tensor:
    """[S] log(mu / prox)^2"""
    assert batch.prox_logp_S is not None
    return (batch.behavior_logp_S - batch.prox_logp_S).square()
