"""REINFORCE, and truncated or masked importance sampling (TIS, IcePop) on it.

    reinforce  loss_t = -A log pi_t
    tis        loss_t = -sg(w) A log pi_t,  w from pi / mu at `level`

`mode=truncate` takes min(w, cap): low variance, biased towards the behavior policy. `mode=mask` takes w
inside [low, high] and zero outside (IcePop), so that tokens too far off-policy are not trained on. A masked
token may leave the normalizer (`denominator=kept`) or stay in it (`original`: a bad batch then takes a
smaller step). To reject in addition by the ratio at another level, add the mask `band`.

A fixed sequence-level band filters by length: the mismatch between engine and trainer alone gives a standard
deviation of log W of about .031 sqrt(L).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from areal_like.config.common import PositiveFloat
from areal_like.errors import ConfigError
from trainer.batching.scope import Scope
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import Level, ratio_S, within_S


@OBJECTIVES.register("reinforce")
@dataclass(frozen=True, kw_only=True)
class Reinforce(Objective):
    """`-A log pi`, without any correction: correct on-policy, and the baseline for corrections."""

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        return TokenLosses(loss_S=-batch.advantage_S * batch.logp_S)


_LEAST_MEAN = 1e-8


@OBJECTIVES.register("tis")
@dataclass(frozen=True, kw_only=True)
class TruncatedIS(Objective):
    """`-sg(w) A log pi`

    Typical caps: token 2, sequence 2 (verl) or 8, token 5 (AReaL); typical token mask: [.5, 5] (IcePop).
    """

    level: Level = "sequence"
    """Level of the weight: `token` | `sequence` (the true product) | `geometric` (length-normalized)."""
    mode: Literal["truncate", "mask"] = "truncate"
    """`truncate` at `cap` | `mask` outside [low, high]."""
    cap: PositiveFloat = 2.0
    """Largest weight under `mode=truncate`."""
    low: float = 0.5
    """Lower end of the band of `mode=mask`."""
    high: float = 5.0
    """Upper end of that band."""
    denominator: Literal["original", "kept"] = "original"
    """Tokens that count in the normalizer: `original` (all) | `kept` (those that are not masked)."""
    normalize: bool = False
    """Divide weights by their mean over the step's tokens (samples for the other levels). Scope BATCH.

    A mean below 1e-8 leaves them as they are: a step so far off-policy is not learned from as if it were not.
    """

    def check(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError("objective: use 0 <= low < high")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """BATCH with `normalize`, which needs the mean weight of the step."""
        return Scope.BATCH if self.normalize else Scope.GROUP

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """False if the normalizer or the mean weight depends on every token's weight."""
        return self.denominator == "original" and not self.normalize

    @property
    def ess_level(self) -> str:  # type: ignore[override]
        return self.level

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """`-sg(w) A log pi`; `clipped_fraction` counts truncated tokens, `kept_fraction` those not masked."""
        weight_S, kept_S, clipped_S = self._weights(batch)
        if self.normalize:
            weight_S = weight_S / stats["mean_weight"].to(weight_S)
        return TokenLosses(
            loss_S=-weight_S * batch.advantage_S * batch.logp_S,
            counted_S=kept_S if self.denominator == "kept" else None,
            means={"clipped_fraction": clipped_S, "kept_fraction": kept_S},
        )

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        if not self.normalize:
            return {}
        weight_S, _, _ = self._weights(batch)
        if self.level == "token":
            return {"weight": weight_S}
        return {"weight": batch.mean_N(weight_S), "has_tokens": batch.length_N > 0}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        if not self.normalize:
            return {}
        weight = observed["weight"]
        mean = (weight[observed["has_tokens"] > 0] if "has_tokens" in observed else weight).mean()
        return {"mean_weight": mean if mean >= _LEAST_MEAN else torch.ones_like(mean)}

    def _weights(self, batch: SampledTokens) -> tuple[Tensor, Tensor, Tensor]:
        """([S] weights, [S] bool kept, [S] bool truncated)"""
        weight_S = ratio_S(batch, batch.log_ratio_S, level=self.level)
        kept_S = torch.ones_like(weight_S, dtype=torch.bool)
        clipped_S = torch.zeros_like(kept_S)
        if self.mode == "truncate":
            clipped_S = weight_S > self.cap
            weight_S = weight_S.clamp(max=self.cap)
        else:
            kept_S = within_S(weight_S, low=self.low, high=self.high)
        return weight_S * kept_S, kept_S, clipped_S
