"""M2PO (arXiv 2510.01161): bound the second moment of the log-ratio over the step, by dropping the fewest, most extreme tokens.

A clip treats every token alike however stale the batch is. Here the tokens with the largest (mu - prox)^2 are dropped until the mean
over the rest is below the threshold; what is kept trains on the unclipped `-A pi/mu`. The set depends on the whole step: scope BATCH.
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
    """`-A r` on the tokens kept, r = pi/mu; dropped ones stay in the normaliser."""

    scope = Scope.BATCH
    needs = frozenset({Need.PROX})
    skips_zero_advantage = False  # tokens of every group are in the moment

    threshold: float = 0.04
    """The mean of (mu - prox)^2 over the tokens kept stays below this."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigError(f"objective.threshold={self.threshold}: want a value above 0")

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The masked surrogate."""
        kept_S = _second_moment_S(batch).double() < stats["first_dropped"].to(batch.behavior_logp_S.device)
        return TokenLosses(
            loss_S=-batch.advantage_S * live_ratio_S(batch.logp_S, batch.behavior_logp_S) * kept_S,
            means={"kept_fraction": kept_S},
        )

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """Every token's second moment."""
        return {"second_moment": _second_moment_S(batch)}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """The smallest moment that is dropped (infinite: none). Ties go together, so that the order of tokens cannot matter."""
        ascending_S = observed["second_moment"].sort().values
        running_S = ascending_S.cumsum(0) / torch.arange(1, len(ascending_S) + 1)
        num_kept = int(
            (running_S < self.threshold).sum()
        )  # the running mean of an ascending sequence ascends
        infinite = ascending_S.new_tensor(torch.inf)
        return {"first_dropped": ascending_S[num_kept] if num_kept < len(ascending_S) else infinite}


def _second_moment_S(batch: SampledTokens) -> Tensor:
    assert batch.prox_logp_S is not None
    return (batch.behavior_logp_S - batch.prox_logp_S).square()
