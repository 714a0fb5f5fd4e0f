"""What stands beside an objective, once for all of them: masks, a KL penalty towards a reference model, an entropy bonus.

    losses = mask * (objective + kl.coef * kl(pi, ref) - entropy_coef * entropy)

`build_objective` returns the bare objective where nothing of this is asked for. KL in the reward is not here: it changes rewards
before advantages are made (`trainer/step/reward_terms.py`).

Estimators of KL(pi || ref) from a token, x = pi - ref: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (never negative, like k2; unbiased, like
k1). In a loss their gradients are what matters: on-policy, k2's is that of KL(pi || ref), k3's that of KL(ref || pi), and k1's is zero in
expectation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from trainer.advantages.base import Advantage
from trainer.batching.scope import Scope
from trainer.gradients.base import Gradients
from trainer.objectives.base import OBJECTIVES, Need, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT
from trainer.objectives.masks import MASKS, Mask

if TYPE_CHECKING:
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy


def kl_estimate(log_ratio: Tensor, *, estimator: str) -> Tensor:
    """k1, k2 or k3 of KL(pi || ref) from log pi/ref."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1((-log_ratio).clamp(-MAX_EXPONENT, MAX_EXPONENT)) + log_ratio


@dataclass(frozen=True, kw_only=True)
class Composed(Objective):
    """An objective with masks and terms around it; everything else is the objective's own."""

    inner: Objective
    masks: tuple[Mask, ...] = ()
    kl: KlConfig | None = None
    """The penalty in the loss; None: none."""
    entropy_coef: float = 0.0

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """BATCH where any part needs the whole step."""
        return (
            Scope.BATCH
            if Scope.BATCH in (self.inner.scope, *(mask.scope for mask in self.masks))
            else Scope.GROUP
        )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """The objective's, and the terms'."""
        terms = {Need.REF} if self.kl else set()
        return self.inner.needs | terms | ({Need.ENTROPY} if self.entropy_coef else set())

    @property
    def whole_groups(self) -> bool:  # type: ignore[override]
        """The objective's."""
        return self.inner.whole_groups

    @property
    def one_sequence_per_microbatch(self) -> bool:  # type: ignore[override]
        """The objective's."""
        return self.inner.one_sequence_per_microbatch

    @property
    def late_coefficients(self) -> bool:  # type: ignore[override]
        """The objective's."""
        return self.inner.late_coefficients

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """Terms and counting masks concern tokens without an advantage too, and so do masks that look at the whole step."""
        indifferent = all(mask.denominator == "original" and mask.scope is Scope.GROUP for mask in self.masks)
        return self.inner.skips_zero_advantage and indifferent and not self.kl and not self.entropy_coef

    @property
    def single_version(self) -> bool:  # type: ignore[override]
        """The objective's."""
        return self.inner.single_version

    @property
    def advantage(self) -> Advantage | None:  # type: ignore[override]
        """The objective's."""
        return self.inner.advantage

    @property
    def normalizer(self) -> str | None:  # type: ignore[override]
        """The objective's."""
        return self.inner.normalizer

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The objective's losses and the terms, of the tokens that every mask keeps."""
        batch = self._masked(batch, stats, [*enumerate(self.masks)])
        bare = self.inner.losses(batch, _part(stats, ""))
        loss_S, counted_S, means = bare.loss_S, bare.counted_S, dict(bare.means)
        if self.kl is not None:
            assert batch.ref_logp_S is not None
            kl_S = kl_estimate(batch.logp_S - batch.ref_logp_S, estimator=self.kl.estimator)
            loss_S = loss_S + self.kl.coef * kl_S
            means["kl_ref"] = kl_S
        if self.entropy_coef:
            loss_S = loss_S - self.entropy_coef * batch.entropy_S
        if batch.kept_S is not None:
            loss_S = torch.where(batch.kept_S, loss_S, 0.0)
            means["kept_fraction"] = batch.kept_S & means.get("kept_fraction", batch.kept_S).bool()
        if batch.counted_S is not None:
            counted_S = batch.counted_S if counted_S is None else counted_S & batch.counted_S
        return TokenLosses(loss_S=loss_S, counted_S=counted_S, means=means)

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """What each part observes; a mask's names begin with its place in the list.

        What a mask of scope BATCH will drop is not known yet: to the objective it is still there.
        """
        known = [(index, mask) for index, mask in enumerate(self.masks) if mask.scope is Scope.GROUP]
        observed = self.inner.observe(self._masked(batch, {}, known))
        for index, mask in enumerate(self.masks):
            observed |= {f"{index}/{name}": vector for name, vector in mask.observe(batch).items()}
        return observed

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """Each part's stats under its own names."""
        mine = _part(observed, "")
        stats = self.inner.summarize(mine) if mine else {}
        for index, mask in enumerate(self.masks):
            if theirs := _part(observed, f"{index}/"):
                stats |= {f"{index}/{name}": fact for name, fact in mask.summarize(theirs).items()}
        return stats

    def _masked(
        self, batch: SampledTokens, stats: StepStats, masks: Sequence[tuple[int, Mask]]
    ) -> SampledTokens:
        """The batch that knows what these masks, with their places in the list, leave of it."""
        kept_S, counted_S = batch.kept_S, batch.counted_S
        for index, mask in masks:
            mask_S = mask.kept_S(batch, _part(stats, f"{index}/"))
            kept_S = mask_S if kept_S is None else kept_S & mask_S
            if mask.denominator == "kept":
                counted_S = mask_S if counted_S is None else counted_S & mask_S
        return replace(batch, kept_S=kept_S, counted_S=counted_S)

    def lr_scale(self, stats: StepStats) -> float:
        """The objective's."""
        return self.inner.lr_scale(_part(stats, ""))

    def gradients(self, policy: Policy, ranks: Ranks) -> Gradients:
        """The objective's."""
        return self.inner.gradients(policy, ranks)


def build_objective(
    settings: Mapping[str, Any], *, max_tokens: int = 0, kl: KlConfig | None = None, entropy_coef: float = 0.0
) -> Objective:
    """The objective that the configuration describes, with what stands beside it.

    `settings`: its section, with an optional list `masks`. `max_tokens`: the job's limit of sampled tokens, for an objective that has a
    setting of that name and was not given one. Raises ConfigError.
    """
    bare = dict(settings)
    job = {"max_tokens": max_tokens} if max_tokens else {}
    masks = MASKS.build_list(bare.pop("masks", None), job=job)
    inner = OBJECTIVES.build(bare, job=job)
    in_loss = kl if kl is not None and kl.coef and kl.place == "loss" else None
    if inner.late_coefficients and (in_loss is not None or entropy_coef):
        raise ConfigError(
            f"{type(inner).__name__} takes no other terms in its loss: use kl.place=reward and no entropy bonus"
        )
    if not masks and in_loss is None and not entropy_coef:
        return inner
    return Composed(inner=inner, masks=masks, kl=in_loss, entropy_coef=entropy_coef)


def _part(named: StepStats, prefix: str) -> dict[str, Tensor]:
    """Entries of one part: those with its prefix (without it), or those with none."""
    if not prefix:
        return {name: value for name, value in named.items() if "/" not in name}
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
