"""Terms around any objective: masks, a KL penalty towards a reference model, an entropy bonus, a cap.

    losses = mask * (cap * objective + kl.coef * KL(pi || ref) - entropy_coef * entropy)

The objective's advantages include the term of the teachers, -distill.coef log(pi / tea) of each token, if
there are any (`distill.py`). With `distill.loss=full`, distill.coef KL(pi || tea) is in the loss instead.

The cap (`staleness.beyond=cap`) is for tokens beyond the staleness bound, and min(1, |A / g|), where g is the
derivative of the objective's loss of the token by its log-prob. So g is at most that of REINFORCE, -A: the
importance weight, whatever the objective computes it from, is at most 1. A part of an objective that is not
proportional to A (the pull of `dppo_tv`, the target of `lad`) counts in g.

`build_objective` returns the bare objective if none of these is configured. The KL penalty on rewards is
not part of the loss (see `trainer/step/rewards.py`).

Estimators of KL(pi || ref) from one token, with x = log(pi / ref):

    k1 = x                  unbiased
    k2 = x^2 / 2            never negative
    k3 = exp(-x) - 1 + x    unbiased, never negative

In a loss their gradients matter: on-policy, the gradient of k2 is that of KL(pi || ref), the gradient of k3
that of KL(ref || pi), and the gradient of k1 is zero in expectation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from areal_like.config import DistillConfig, KlConfig
from areal_like.errors import ConfigError
from trainer.batching.scope import Scope
from trainer.gradients.base import Gradients
from trainer.objectives.base import (
    OBJECTIVES,
    Need,
    Objective,
    SampledTokens,
    StepStats,
    TokenLosses,
    checked_losses,
)
from trainer.objectives.distill import full_kl_S, teacher_means, with_teacher
from trainer.objectives.importance import MAX_EXPONENT
from trainer.objectives.kl_control import KlControl
from trainer.objectives.masks import MASKS, Mask

if TYPE_CHECKING:
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy


def kl_estimate(log_ratio: Tensor, *, estimator: str) -> Tensor:
    """Element-wise estimate of KL(pi || ref) from log(pi / ref), any shape.

    `estimator`: `k1` | `k2` | `k3`.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1((-log_ratio).clamp(-MAX_EXPONENT, MAX_EXPONENT)) + log_ratio


@dataclass(frozen=True, kw_only=True)
class Composed(Objective):
    """An objective with masks and terms; other attributes are those of the inner objective."""

    inner: Objective
    """The objective without masks and terms."""
    masks: tuple[Mask, ...] = ()
    kl: KlConfig | None = None
    """KL penalty in the loss; None: none."""
    kl_control: KlControl | None = None
    """Its coefficient, if there is one."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0: none."""
    caps_beyond: bool = False
    """The importance weight of a token beyond the staleness bound is at most 1."""
    teacher_coef: float = 0.0
    """Weight of the teachers' term in the advantages; 0: none."""
    teacher_is_full: bool = False
    """That term is a KL over the vocabulary in the loss."""

    def check(self) -> None:
        for name in Objective.__annotations__.keys() - vars(Composed).keys():
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def display_name(self) -> str:
        return self.inner.display_name

    @property
    def weighs_products(self) -> bool:
        return self.inner.weighs_products

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return (
            Scope.BATCH
            if Scope.BATCH in (self.inner.scope, *(mask.scope for mask in self.masks))
            else Scope.GROUP
        )

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        terms = {
            need
            for need, is_used in (
                (Need.REF, self.kl),
                (Need.ENTROPY, self.entropy_coef),
                (Need.TEACHER, self.teacher_coef),
                (Need.REVERSE_KL, self.teacher_is_full),
            )
            if is_used
        }
        return self.inner.needs | terms

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """False if a term or mask also affects tokens with zero advantage."""
        # A mask that changes the normalizer or gathers statistics of the step needs all groups.
        masks_allow = all(mask.denominator == "original" and mask.scope is Scope.GROUP for mask in self.masks)
        has_terms = bool(self.kl or self.entropy_coef or self.teacher_coef)
        return self.inner.skips_zero_advantage and masks_allow and not has_terms

    @property
    def takes_parts(self) -> bool:
        return self.inner.takes_parts

    def for_model(self, num_params: int) -> Composed:
        """Returns the same composition around the inner objective for a model of that size."""
        return replace(self, inner=self.inner.for_model(num_params))

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        batch = self._masked(self._taught(batch), stats, [*enumerate(self.masks)])
        bare = checked_losses(self.inner, batch, _part(stats, ""))
        loss_S, counted_S, means, chosen = bare.loss_S, bare.counted_S, dict(bare.means), dict(bare.chosen)
        if self.teacher_coef:
            of_teachers, has_teacher = teacher_means(batch)
            means, chosen = means | of_teachers, chosen | has_teacher
        if self.caps_beyond and batch.beyond_S is not None:
            loss_S = _capped(loss_S, batch)
        if self.kl is not None:
            assert batch.ref_logp_S is not None
            kl_S = kl_estimate(batch.logp_S - batch.ref_logp_S, estimator=self.kl.estimator)
            coef = self.kl.coef if self.kl_control is None else self.kl_control.coef
            loss_S = loss_S + coef * kl_S
            means["kl_ref"] = kl_S
        if self.teacher_is_full:
            loss_S = loss_S + self.teacher_coef * full_kl_S(batch)
        if self.entropy_coef:
            loss_S = loss_S - self.entropy_coef * batch.entropy_S
        if batch.kept_S is not None:
            loss_S = torch.where(batch.kept_S, loss_S, 0.0)
            means["kept_fraction"] = batch.kept_S & means.get("kept_fraction", batch.kept_S).bool()
        if batch.counted_S is not None:
            counted_S = batch.counted_S if counted_S is None else counted_S & batch.counted_S
        return TokenLosses(loss_S=loss_S, counted_S=counted_S, means=means, chosen=chosen)

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """The vectors of objective and masks; a mask's names begin with its index in the list.

        The inner objective still sees the tokens that masks of scope BATCH will drop, which are not known
        yet.
        """
        batch = self._taught(batch)
        of_group = [(index, mask) for index, mask in enumerate(self.masks) if mask.scope is Scope.GROUP]
        observed = self.inner.observe(self._masked(batch, {}, of_group))
        for index, mask in enumerate(self.masks):
            observed |= {f"{index}/{name}": vector for name, vector in mask.observe(batch).items()}
        return observed

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """The stats of objective and masks; a mask's names begin with its index in the list."""
        of_inner = _part(observed, "")
        stats = self.inner.summarize(of_inner) if of_inner else {}
        for index, mask in enumerate(self.masks):
            if of_mask := _part(observed, f"{index}/"):
                stats |= {f"{index}/{name}": value for name, value in mask.summarize(of_mask).items()}
        return stats

    def _taught(self, batch: SampledTokens) -> SampledTokens:
        is_in_advantage = self.teacher_coef and not self.teacher_is_full
        return with_teacher(batch, coef=self.teacher_coef) if is_in_advantage else batch

    def _masked(
        self, batch: SampledTokens, stats: StepStats, masks: Sequence[tuple[int, Mask]]
    ) -> SampledTokens:
        """The batch with `kept_S` and `counted_S` set by these masks, given with their list indices."""
        kept_S, counted_S = batch.kept_S, batch.counted_S
        for index, mask in masks:
            mask_S = mask.kept_S(batch, _part(stats, f"{index}/"))
            kept_S = mask_S if kept_S is None else kept_S & mask_S
            if mask.denominator == "kept":
                counted_S = mask_S if counted_S is None else counted_S & mask_S
        return replace(batch, kept_S=kept_S, counted_S=counted_S)

    def initial_state(self) -> tuple[float, ...]:
        return self.inner.initial_state()

    def next_state(self, state: Sequence[float], stats: StepStats) -> tuple[float, ...]:
        return self.inner.next_state(state, _part(stats, ""))

    def lr_scale(self, stats: StepStats) -> float:
        return self.inner.lr_scale(_part(stats, ""))

    def step_metrics(self, stats: StepStats) -> dict[str, float]:
        return self.inner.step_metrics(_part(stats, ""))

    def gradients(self, policy: Policy, ranks: Ranks) -> Gradients:
        return self.inner.gradients(policy, ranks)


def build_objective(
    settings: Mapping[str, Any],
    *,
    max_tokens: int = 0,
    kl: KlConfig | None = None,
    distill: DistillConfig | None = None,
    entropy_coef: float = 0.0,
    takes_parts: bool = False,
    caps_beyond: bool = False,
) -> Objective:
    """Builds the configured objective with its masks and terms. Raises ConfigError.

    `settings`: the section `objective`, with an optional list `masks`. `max_tokens`: the job's limit of
    sampled tokens, for an objective that has a setting of that name and was not given one. `distill`: its
    teachers' term is added to the advantages; None: there is none, whatever the objective. `takes_parts`:
    the job has `buffer.overdue=close`. `caps_beyond`: and `staleness.beyond=cap`.
    """
    bare = dict(settings)
    job = {"max_tokens": max_tokens} if max_tokens else {}
    coef = distill.coef if distill is not None and distill.teachers else 0.0
    masks = MASKS.build_list(bare.pop("masks", None), job=job)
    inner = OBJECTIVES.build(bare, job=job)
    if Need.TEACHER in inner.needs and distill is not None and not coef:
        raise ConfigError(
            f"objective {inner.display_name} needs a teacher: name one in distill.teachers, for example "
            "distill.teachers.default=DIRECTORY"
        )
    if takes_parts:
        inner = inner.for_parts()
    if caps_beyond and inner.late_coefficients:
        raise ConfigError(
            f"staleness.beyond=cap: objective {inner.display_name} has no weights of tokens that could be "
            "capped: use mask or ratio"
        )
    if coef and not inner.takes_token_advantages:
        raise ConfigError(
            f"distill.teachers: objective {inner.display_name} has one advantage for all tokens of a sample, "
            "and a teacher judges each token: use objective=distill, or another such as tis, ppo or gspo"
        )
    in_loss = kl if kl is not None and kl.coef and kl.place == "loss" else None
    if inner.late_coefficients and (in_loss is not None or entropy_coef):
        raise ConfigError(
            f"{inner.display_name} allows no other terms in its loss: "
            "use kl.place=reward and no entropy bonus"
        )
    if not masks and in_loss is None and not entropy_coef and not caps_beyond and not coef:
        return inner
    return Composed(
        inner=inner,
        masks=masks,
        kl=in_loss,
        kl_control=None if in_loss is None else KlControl(in_loss),
        entropy_coef=entropy_coef,
        caps_beyond=caps_beyond,
        teacher_coef=coef,
        teacher_is_full=bool(coef) and distill is not None and distill.loss == "full",
    )


def _capped(loss_S: Tensor, batch: SampledTokens) -> Tensor:
    """[S] the losses, scaled at tokens beyond the bound so that no derivative by a log-prob is above |A|."""
    if not loss_S.requires_grad:
        return loss_S
    assert batch.beyond_S is not None
    (slope_S,) = torch.autograd.grad(loss_S.sum(), batch.logp_S, retain_graph=True)
    is_steep_S = batch.beyond_S & (slope_S.abs() > batch.advantage_S.abs())
    scale_S = torch.where(is_steep_S, batch.advantage_S.abs() / slope_S.abs(), 1.0)
    return loss_S * scale_S


def _part(named: StepStats, prefix: str) -> dict[str, Tensor]:
    """The entries of the mask with this prefix, which is removed; for '', those of the inner objective."""
    if not prefix:
        return {name: value for name, value in named.items() if "/" not in name}
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
