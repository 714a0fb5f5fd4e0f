"""PPO's clipped surrogate (arXiv 1707.06347), and the decoupled form for stale data.

    ppo            loss_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = pi_t / mu_t
    decoupled_ppo  loss_t = sg(w) max(-A r, -A clip(r, 1 - clip, 1 + clip)),
                   r = pi_t / prox_t,  w = prox_t / mu_t

`ppo`: with DAPO's bounds (arXiv 2503.14476) a ratio may rise further than it may fall. `dual_clip` bounds the
loss of a token with A < 0 that has become likelier (arXiv 1912.09729).

`decoupled_ppo` (arXiv 2110.00641; AReaL, arXiv 2505.24298): clips around prox, the weights at the start of
the step, and corrects for the data's age by the weight w. With one optimizer step per batch and prox
recomputed, r is 1 and the clip has no effect: the weight alone corrects for staleness.

With `prox=snapshot` and `prox=average`, prox is a copy of the policy that lags behind: its weights at the
last multiple of `interval` steps, or an exponential average of them (PPO-EWMA, arXiv 2110.00641, section
3.2). The clip then limits the distance from that copy over several steps. The copy costs memory and a forward
(`trainer/step/proximal.py`). Both have the same average lag if decay is (interval - 1) / (interval + 1).

A-3PO (`prox=interpolated`, arXiv 2512.06547) puts prox between mu and pi instead, so that the clip takes
effect:

    log prox = log mu + alpha (log pi - log mu),  alpha = (v - 1 - v_b) / (v - v_b) = lag / (lag + 1)

for a token sampled by version v_b, where v is the version that the step will make and lag the token's lag at
the start of the step. (In other systems A-3PO also saves a forward pass for prox. Here there is none to save,
because the recomputed prox is pi, detached.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from areal_like.config.common import PositiveFloat, PositiveInt
from areal_like.errors import ConfigError
from trainer.objectives.base import (
    OBJECTIVES,
    Need,
    Objective,
    ProximalRule,
    SampledTokens,
    StepStats,
    TokenLosses,
)
from trainer.objectives.importance import Level, live_ratio_S, ratio_S


def clipped_surrogate(ratio_S: Tensor, bounded_S: Tensor, advantage_S: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ([S] `max(-A r, -A bounded)`, [S] bool: the bound has cut the token off).

    Both ratios carry the gradient.
    """
    loss_S = torch.maximum(-advantage_S * ratio_S, -advantage_S * bounded_S)
    return loss_S, (advantage_S * (ratio_S - bounded_S) > 0).detach()


@OBJECTIVES.register("ppo")
@dataclass(frozen=True, kw_only=True)
class Ppo(Objective):
    """`max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, r = pi / mu of a token"""

    ess_level = "token"

    clip_low: float = 0.2
    """A ratio below 1 - clip_low is not lowered further."""
    clip_high: PositiveFloat = 0.28
    """A ratio above 1 + clip_high is not raised further (.28 is DAPO's, .2 the original)."""
    dual_clip: float = 0.0
    """Largest ratio that counts for A < 0, above 1 + clip_high (typically 3); 0 turns it off."""

    def check(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ConfigError("objective: use clip_low between 0 and 1")
        if self.dual_clip != 0 and not self.dual_clip > 1 + self.clip_high:
            raise ConfigError(
                f"objective.dual_clip={self.dual_clip}: use 0 (off) or a value above 1 + clip_high"
            )

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The clipped surrogate; `clipped_fraction` counts tokens that a bound has cut off."""
        r_S = live_ratio_S(batch.logp_S, batch.behavior_logp_S)
        loss_S, clipped_S = clipped_surrogate(
            r_S, r_S.clamp(1 - self.clip_low, 1 + self.clip_high), batch.advantage_S
        )
        if self.dual_clip:
            ceiling_S = -batch.advantage_S * self.dual_clip
            beyond_S = (batch.advantage_S < 0) & (loss_S > ceiling_S)
            loss_S = torch.where(beyond_S, ceiling_S, loss_S)
            clipped_S = clipped_S | beyond_S
        return TokenLosses(loss_S=loss_S, means={"clipped_fraction": clipped_S})


@OBJECTIVES.register("decoupled_ppo")
@dataclass(frozen=True, kw_only=True)
class DecoupledPpo(Objective):
    """`sg(w) max(-A r, -A clip(r, 1 - clip, 1 + clip))`, r = pi / prox, w = prox / mu"""

    clip: float = 0.2
    """Half-width of the band around 1 in which pi / prox is not clipped."""
    prox: Literal["recomputed", "interpolated", "snapshot", "average"] = "recomputed"
    """`recomputed` (weights at the start of the step) | `interpolated` between mu and pi by lag (A-3PO) |
    `snapshot` (weights some steps ago) | `average` (of the weights so far)."""
    interval: PositiveInt = 8
    """With `prox=snapshot`: steps until the copy is replaced."""
    decay: float = 0.8
    """With `prox=average`: weight of a step's policy relative to that of the next."""
    level: Level = "token"
    """Level of the weight: `token` | `sequence` | `geometric`."""
    mode: Literal["truncate", "mask", "none"] = "truncate"
    """`truncate` weights at `cap` | `mask` tokens with a weight above `cap` | `none`."""
    cap: PositiveFloat = 5.0
    """Largest weight; ignored under `mode=none`."""

    def check(self) -> None:
        if not 0 < self.decay < 1 or not 0 < self.clip < 1:
            raise ConfigError("objective: use clip and decay between 0 and 1")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset(() if self.prox == "interpolated" else {Need.PROX})

    @property
    def proximal(self) -> ProximalRule | None:  # type: ignore[override]
        if self.prox == "snapshot":
            return ProximalRule(interval=self.interval)
        return ProximalRule(decay=self.decay) if self.prox == "average" else None

    @property
    def ess_level(self) -> str:  # type: ignore[override]
        return self.level

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The weighted surrogate; `clipped_fraction`: cut by clip or cap, `kept_fraction`: not masked."""
        prox_logp_S = self.prox_logp_S(batch)
        r_S = live_ratio_S(batch.logp_S, prox_logp_S)
        loss_S, clipped_S = clipped_surrogate(r_S, r_S.clamp(1 - self.clip, 1 + self.clip), batch.advantage_S)
        weight_S = ratio_S(batch, prox_logp_S - batch.behavior_logp_S, level=self.level)
        kept_S = torch.ones_like(clipped_S)
        if self.mode == "truncate":
            clipped_S = clipped_S | (weight_S > self.cap)
            weight_S = weight_S.clamp(max=self.cap)
        elif self.mode == "mask":
            kept_S = weight_S <= self.cap
        return TokenLosses(
            loss_S=loss_S * weight_S * kept_S, means={"clipped_fraction": clipped_S, "kept_fraction": kept_S}
        )

    def prox_logp_S(self, batch: SampledTokens) -> Tensor:
        """[S] log-probs around which the ratio is clipped."""
        if self.prox != "interpolated":
            assert batch.prox_logp_S is not None
            return batch.prox_logp_S
        alpha_S = batch.lag_S / (batch.lag_S + 1)
        return batch.behavior_logp_S + alpha_S * batch.log_ratio_S
