"""M2PO (arXiv 2510.01161): bounds the step's second moment of the log-ratio by dropping extreme tokens.

    loss_t = -A r [kept],  r = pi_t / mu_t;  mean over kept tokens of (log(mu_t / prox_t))^2 < threshold

A clip treats every token alike however stale the batch is. Here the tokens with the largest squared log-ratio
are dropped until the mean over the rest is below the threshold, and the rest is trained on without a clip.
The set depends on the whole step: scope BATCH. Dropped tokens stay in the normalizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from trainer.batching.scope import Scope
from trainer.objectives.base import OBJECTIVES, Need, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import live_ratio_S


@OBJECTIVES.register("m2po")
@dataclass(frozen=True, kw_only=True)
class M2po(Objective):
    """`-A r` on the tokens kept, r = pi / mu"""

    scope = Scope.BATCH
    needs = frozenset({Need.PROX})
    skips_zero_advantage = False  # the second moment is that of the tokens of all groups

    threshold: float = 0.04
    """Bound on the mean of log(mu / prox)^2 over the tokens kept."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"objective.threshold={self.threshold}: use a value above 0")

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The surrogate of the tokens kept; `kept_fraction` is their share."""
        kept_S = _second_moment_S(batch).double() < stats["first_dropped"].to(batch.behavior_logp_S.device)
        return TokenLosses(
            loss_S=-batch.advantage_S * live_ratio_S(batch.logp_S, batch.behavior_logp_S) * kept_S,
            means={"kept_fraction": kept_S},
        )

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """The squared log-ratio of every token."""
        return {"second_moment": _second_moment_S(batch)}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """The smallest squared log-ratio that is dropped (infinite: none).

        Equal ones are dropped together, so the order of tokens cannot matter.
        """
        ascending_S = observed["second_moment"].sort().values
        running_S = ascending_S.cumsum(0) / torch.arange(1, len(ascending_S) + 1)
        num_kept = int((running_S < self.threshold).sum())  # running means of ascending values ascend
        infinite = ascending_S.new_tensor(torch.inf)
        return {"first_dropped": ascending_S[num_kept] if num_kept < len(ascending_S) else infinite}


def _second_moment_S(batch: SampledTokens) -> Tensor:
    """[S] log(mu / prox)^2"""
    assert batch.prox_logp_S is not None
    return (batch.behavior_logp_S - batch.prox_logp_S).square()
