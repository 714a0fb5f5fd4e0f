"""VCPO (arXiv 2602.17616): variance control for stale batches, in three parts that can be used separately.

    loss_i     = -sg(w_i) (A_i - b*) sum_t log pi_t / L_i
    weight     w_i = min(W_i, cap),  W_i = prod_t pi_t / mu_t of the sample
    step size  lr * sqrt(min(1, rho / rho_ref)),  rho = ESS / B of the untruncated W of the step's B samples
    baseline   b* = sum_i m_i A_i / sum_i m_i,  m_i = ||grad log pi_i / L_i||^2

The paper's m_i = ||w_i grad log pi_i / L_i||^2 minimizes the variance of the gradient that is used, and is
`baseline_weights=gradient`. The default leaves w_i out, because with it learning from stale samples collapses
at learning rates that the other methods tolerate. (The authors' release counts w_i twice and leaves out
1 / L_i.)

b* follows the shift and scale that an advantage applies to rewards: with A = (R - mean) / std, and b*_R
computed from R, the b* of A is (b*_R - mean) / std, so A - b* is the paper's (R - b*_R) / std. So the
configured advantage sets the scale (`grpo` divides by the population standard deviation, `dr_grpo` does not
divide), and the advantages of a group with equal rewards stay exactly zero. m_i includes masks and the
normalizer's 1 / L_i, like the gradient that is used. A per-token advantage enters by its mean over the
sample. The gradient of a sample of several segments is the sum of theirs.

A rho above rho_ref does not raise the step size. The method scales the learning rate and not the gradient,
because Adam cancels the scale of a gradient.

Shape suffixes: S sampled tokens, N samples, B samples of the whole step.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from areal_like.config.common import NonNegativeFloat
from areal_like.config.trainer import NormalizerName
from areal_like.errors import ConfigError
from trainer.batching.scope import Scope
from trainer.gradients.base import Gradients
from trainer.gradients.ghost_gradients import GhostGradients
from trainer.gradients.optimal_baseline import optimal_baseline
from trainer.gradients.per_sequence import SequenceGradients
from trainer.objectives.base import OBJECTIVES, Need, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import ess_ratio

if TYPE_CHECKING:
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy

log = logging.getLogger(__name__)

_MOST_PARAMS_OF_GHOST = 10**9
_REF_RATE = 1 / 20
"""Weight in a measured rho_ref of a step whose samples are all fresh."""


@OBJECTIVES.register("vcpo")
@dataclass(frozen=True, kw_only=True)
class Vcpo(Objective):
    """`-sg(w) (A - b*) log pi`, with a learning rate scaled by the effective sample size"""

    cap: NonNegativeFloat = 8.0
    """Largest weight of a sample; 0: no weights (all are 1)."""
    step_size: Literal["sqrt", "linear", "none"] = "sqrt"
    """Factor on the learning rate, with x = min(1, rho / rho_ref): `sqrt` of x | `linear`, x | `none`, 1."""
    rho_ref: float | Literal["measured"] = 1.0
    """ESS ratio of a full step size: 1, the job's on-policy value (.55 for several turns in the paper), or
    `measured`: a running mean of the ESS ratio of samples from their step's own weights (`next_state`)."""
    baseline: Literal["group", "batch", "none"] = "group"
    """Samples that share one b*: `group` (of a prompt) | `batch` (of the step) | `none` (no baseline)."""
    baseline_weights: Literal["score", "gradient"] = "score"
    """m_i of b*: `score`, ||grad log pi_i / L_i||^2 | `gradient`, with w_i in the norm, as in the paper.

    `gradient` minimizes the variance, but a stale sample of large w_i holds most of its own b*: it is then
    hardly trained on, and the others of its group are pushed away from it.
    """
    norms: Literal["auto", "ghost", "exact", "proxy"] = "auto"
    """Computation of ||grad log pi_i||: `auto` | `ghost` | `exact` | `proxy`.

    `auto`: `proxy` for models above a billion parameters, else `ghost`, whose memory grows with the layers
    (6 MB a token with 8B parameters). `ghost`: exact, from activations and their gradients. `exact`: by
    autograd, one backward per sample; slow, but for any architecture. `proxy`: norm of the gradient of the
    logits only; one pass over the logits.
    """
    leave_one_out: bool = False
    """Each sample's b* is computed from the others of its group, which removes its bias.

    Not with `norms=exact`.
    """
    normalizer: NormalizerName = "seq_mean_token_mean"
    """Normalizer of the loss; replaces `trainer.normalizer`."""

    @property
    def weighs_products(self) -> bool:
        return self.cap > 0

    def check(self) -> None:
        if not isinstance(self.rho_ref, str) and not 0 < self.rho_ref <= 1:
            raise ConfigError("objective: use rho_ref above 0 and at most 1, or measured")
        if self.leave_one_out and (self.baseline != "group" or self.norms == "exact"):
            raise ConfigError(
                "objective.leave_one_out needs objective.baseline=group, and not objective.norms=exact"
            )

    def for_model(self, num_params: int) -> Vcpo:
        """Returns this objective with `auto` replaced by the norms for a model of that size."""
        if self.norms != "auto":
            return self
        return replace(self, norms="proxy" if num_params > _MOST_PARAMS_OF_GHOST else "ghost")

    @property
    def takes_token_advantages(self) -> bool:  # type: ignore[override]
        """True without a b*, which is compared with the advantage of a whole sample."""
        return self.baseline == "none"

    @property
    def takes_parts(self) -> bool:
        """True without a b* of its own, or with `leave_one_out`."""
        return self.baseline == "none" or self.leave_one_out

    def for_parts(self) -> Vcpo:
        """Returns this objective without a b* of its own.

        The norms of the early members' gradients are not known in the step of a late one. Each sample is
        compared with the other early members of its group by the advantage estimator, which `leave_one_out`
        must ask for.
        """
        if not self.takes_parts:
            raise ConfigError(
                "buffer.overdue=close trains on parts of groups, and objective vcpo computes its baseline "
                "from whole ones: set objective.leave_one_out=true (with objective.baseline=group), so that "
                "each sample is compared with the other early members of its group, or buffer.overdue=wait"
            )
        return replace(self, baseline="none", leave_one_out=False)

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """BATCH if the loss contains a b* of the whole step."""
        return Scope.BATCH if self.norms == "proxy" and self.baseline == "batch" else Scope.GROUP

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({Need.COLLISION}) if self._is_proxy else frozenset()

    @property
    def whole_groups(self) -> bool:  # type: ignore[override]
        """True if a group's b* must be known within its micro-batch."""
        return self.baseline == "group" and self.norms != "exact"

    @property
    def one_sequence_per_microbatch(self) -> bool:  # type: ignore[override]
        """True for `norms=exact`: autograd gives one gradient per micro-batch."""
        return self.late_coefficients and self.norms == "exact"

    @property
    def late_coefficients(self) -> bool:  # type: ignore[override]
        """True with a baseline, except by proxy: A - b* is known only after the backward."""
        return self.baseline != "none" and self.norms != "proxy"

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """False if groups of zero advantage matter: for the effective sample size, or a b* of the step."""
        return self.step_size == "none" and self.baseline != "batch"

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """`-w (A - b*) log pi`; with late coefficients `-w log pi`, which `gradients` scales by A - b*.

        With `baseline_weights=score`, those are `-log pi`, which `gradients` scales by w (A - b*).
        """
        weight_N = self._weights(batch)
        means = {
            "clipped_fraction": batch.log_w_N > math.log(self.cap) if self.cap else torch.zeros_like(weight_N)
        }
        if self.late_coefficients:
            loss_S = -batch.logp_S
            if self.baseline_weights == "gradient":
                loss_S = loss_S * batch.spread_S(weight_N)
            return TokenLosses(loss_S=loss_S, means=means)
        if self.baseline == "none":
            return TokenLosses(
                loss_S=-batch.spread_S(weight_N) * batch.advantage_S * batch.logp_S, means=means
            )
        advantage_N = batch.mean_N(batch.advantage_S)
        if self.baseline == "batch":
            baseline_N = stats["baseline"].to(advantage_N).expand_as(advantage_N)
        else:
            baseline_N = optimal_baseline(
                self._proxy_squares(batch),
                advantage_N.double(),
                batch.group_N,
                leave_one_out=self.leave_one_out,
            ).to(advantage_N)
        means["baseline"] = baseline_N
        return TokenLosses(
            loss_S=-batch.spread_S(weight_N * (advantage_N - baseline_N)) * batch.logp_S, means=means
        )

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """Every sample's log W; for a measured rho_ref whether it is fresh; and for a proxy b* of the whole
        step, squared norms and advantages."""
        observed = {"log_w": batch.of_trained(batch.log_w_N)}
        if self._measures:
            observed["is_fresh"] = batch.of_trained(batch.sum_N(batch.lag_S.abs()) == 0)
        if self.scope is Scope.BATCH:
            observed |= {"squares": self._proxy_squares(batch), "advantage": batch.mean_N(batch.advantage_S)}
        return observed

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        log_w_B = observed["log_w"]
        stats = {"rho": torch.tensor(ess_ratio(log_w_B), dtype=torch.float64)}
        if self._measures:
            fresh_B = log_w_B[observed["is_fresh"] > 0]
            numbers = (ess_ratio(fresh_B), len(fresh_B) / max(1, len(log_w_B)))
            stats["fresh"] = torch.tensor(numbers, dtype=torch.float64)
        if self.scope is Scope.BATCH:
            squares_B = observed["squares"]
            one_group_B = torch.zeros(len(squares_B), dtype=torch.int64)
            stats["baseline"] = optimal_baseline(squares_B, observed["advantage"], one_group_B)[:1].sum()
        return stats

    def initial_state(self) -> tuple[float, ...]:
        """(m, n) of a measured rho_ref."""
        return (0.0, 0.0) if self._measures else ()

    def next_state(self, state: Sequence[float], stats: StepStats) -> tuple[float, ...]:
        """(m, n) of `rho_ref=measured`, which is m / n, and 1 while n = 0.

        The tokens of a fresh sample were all sampled by the weights at the start of its step (lag 0), so only
        the numerical mismatch of engine and trainer moves its W. With rho_f the ESS ratio of a step's fresh
        samples, and s their share of its samples:

            a = s / 20;   m <- (1 - a) m + a rho_f,   n <- (1 - a) n + a

        All samples of step 0 are fresh. An ESS ratio is higher for fewer and for shorter samples, and both
        bias those of a later step towards a larger rho_ref and so towards a smaller step size; s limits what
        a few of them can change.
        """
        if not self._measures or "fresh" not in stats:
            return tuple(state)
        mean, total = state
        rho, share = stats["fresh"].tolist()
        if not math.isfinite(rho):  # of a step whose gradient is not finite either, which changes no weights
            return tuple(state)
        if not share and not total:
            _log_unmeasured()
        weight = _REF_RATE * share
        return (1 - weight) * mean + weight * rho, (1 - weight) * total + weight

    def lr_scale(self, stats: StepStats) -> float:
        """sqrt(x), x or 1 by `step_size`; 1 for a step without data."""
        if self.step_size == "none" or "rho" not in stats:
            return 1.0
        x = min(1.0, float(stats["rho"]) / self._reference(stats))
        return math.sqrt(x) if self.step_size == "sqrt" else x

    def step_metrics(self, stats: StepStats) -> dict[str, float]:
        """`rho_ref`, if it is measured."""
        return {"rho_ref": self._reference(stats)} if self._measures else {}

    def gradients(self, policy: Policy, ranks: Ranks) -> Gradients:
        if not self.late_coefficients:
            return Gradients()
        over_batch = self.baseline == "batch"
        weights = self._weights if self.baseline_weights == "score" else None
        if self.norms == "exact":
            return SequenceGradients(policy, ranks, over_batch=over_batch, weights=weights)
        return GhostGradients(
            policy, ranks, over_batch=over_batch, leave_one_out=self.leave_one_out, weights=weights
        )

    @property
    def _measures(self) -> bool:
        """True if a rho_ref is measured and used."""
        return self.rho_ref == "measured" and self.step_size != "none"

    def _reference(self, stats: StepStats) -> float:
        """rho_ref of this step."""
        if isinstance(self.rho_ref, float | int):
            return self.rho_ref
        mean, total = stats["state"].tolist()
        return mean / total if total else 1.0

    @property
    def _is_proxy(self) -> bool:
        return self.baseline != "none" and self.norms == "proxy"

    def _weights(self, batch: SampledTokens) -> Tensor:
        """[N] min(W, cap)"""
        return (
            torch.exp(batch.log_w_N.clamp(max=math.log(self.cap)))
            if self.cap
            else torch.ones_like(batch.log_w_N)
        )

    def _proxy_squares(self, batch: SampledTokens) -> Tensor:
        """[N] float64: squared gradient norm with respect to the logits, times the w^2 and 1 / L^2 of m.

        Per token it is `1 - 2 pi_t + sum_v pi_v^2`.
        """
        assert batch.collision_S is not None
        squares_S = 1 - 2 * batch.logp_S.detach().exp() + batch.collision_S
        squares_N = batch.sum_N(squares_S if batch.kept_S is None else squares_S * batch.kept_S).double()
        weight_N = self._weights(batch).double()
        scale_N = weight_N if self.baseline_weights == "gradient" else torch.ones_like(weight_N)
        if self.normalizer == "seq_mean_token_mean":
            scale_N = scale_N / batch.counted_N(batch.counted_S).clamp(min=1).double()
        return squares_N * scale_N.square()


@functools.cache
def _log_unmeasured() -> None:
    """Once in a process."""
    log.warning(
        "objective.rho_ref=measured: no step has had a sample that its own weights sampled: rho_ref "
        "stays 1 until there is one"
    )
