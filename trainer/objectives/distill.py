"""On-policy distillation: the student samples, and each of its tokens is judged by a teacher.

    loss_t = -sg(w_t) A_t log pi_t,   A_t = -coef sg(log pi_t - log tea_t),   w_t = min(pi_t / mu_t, cap)

This is the reverse KL per token as the advantage, as in "On-policy distillation" (Thinking Machines, 2025),
on completions of the student as in GKD (arXiv 2306.13649, with its divergence KL(student || teacher) and only
the student's own data). Several teachers, one for each label, are those of MOPD (arXiv 2606.30406): the
label of a sample selects its teacher.

In expectation over a token that pi itself samples after a given prefix, the gradient is that of KL(pi || tea)
at this prefix: the derivative of log pi in the KL contributes E[grad log pi] = 0. With stale tokens w = pi /
mu restores this expectation; cap makes it biased towards the policy that sampled, with less variance. What is
left out at both is the effect of a token on the prefixes of later ones (a discount of 0): the gradient is
that of the sum of the KLs at the prefixes that were sampled, not of the KL of whole sequences.

`distill.loss=full` takes the KL over the whole vocabulary at each prefix in place of its estimate from one
token, as GKD does: the loss is coef KL(pi || tea), without an importance weight, because no token of it was
sampled. The prefixes are those of the policy that sampled.

The objective here is token-level TIS (`tis.py`) without an advantage of its own. `composed.py` adds A_t, to
it and to any other objective, there beside the advantages of the task's rewards. Log-ratios are clamped to
+-20 nats. A token without a teacher has no such term, and with this objective it does not count in the
normalizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from areal_like.trajectory import Trajectory
from trainer.advantages.base import Advantage
from trainer.advantages.parts import PartContext
from trainer.objectives.base import OBJECTIVES, Need, SampledTokens, StepStats, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT, Level
from trainer.objectives.tis import TruncatedIS


def reverse_kl_S(batch: SampledTokens) -> Tensor:
    """[S] log(pi / tea) of each token, detached, clamped; NaN for tokens without a teacher.

    Its mean over tokens that pi sampled is an unbiased estimate of the mean of KL(pi || tea).
    """
    assert batch.teacher_logp_S is not None
    return (batch.logp_S.detach() - batch.teacher_logp_S).clamp(-MAX_EXPONENT, MAX_EXPONENT)


def full_kl_S(batch: SampledTokens) -> Tensor:
    """[S] KL(pi || tea) over the vocabulary, with gradient; 0 for tokens without a teacher."""
    assert batch.reverse_kl_S is not None and batch.teacher_logp_S is not None
    return torch.where(batch.teacher_logp_S.isnan(), 0.0, batch.reverse_kl_S)


def with_teacher(batch: SampledTokens, *, coef: float) -> SampledTokens:
    """The batch with the teachers' term added to its advantages; 0 for tokens without a teacher."""
    return replace(batch, advantage_S=batch.advantage_S - coef * reverse_kl_S(batch).nan_to_num(nan=0.0))


def teacher_means(batch: SampledTokens) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`TokenLosses.means` and `chosen` of `reverse_kl`, over tokens with a teacher, and `teacher_share`."""
    sampled_S = reverse_kl_S(batch)
    has_S = ~sampled_S.isnan()
    kl_S = sampled_S if batch.reverse_kl_S is None else batch.reverse_kl_S
    return {"reverse_kl": kl_S, "teacher_share": has_S}, {"reverse_kl": has_S}


@dataclass(frozen=True, kw_only=True)
class NoAdvantage(Advantage):
    """0 for all samples: rewards are recorded and not trained on."""

    credits_turns = False
    takes_parts = True

    @property
    def compares_samples(self) -> bool:
        return False

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [0.0] * len(group)

    def of_part(self, reward: float, context: PartContext) -> float:
        return 0.0


@OBJECTIVES.register("distill")
@dataclass(frozen=True, kw_only=True)
class Distill(TruncatedIS):
    """`-sg(w) A log pi`: of a job, A is the teachers' term alone, which `Composed` adds"""

    advantage = NoAdvantage()

    level: Level = "token"
    """Level of the weight: `token` | `sequence` (the true product) | `geometric` (length-normalized)."""

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({Need.TEACHER})

    @property
    def skips_zero_advantage(self) -> bool:  # type: ignore[override]
        """False: the teachers' term is known only after the forward."""
        return False

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The losses and metrics of `tis`; tokens without a teacher do not count."""
        assert batch.teacher_logp_S is not None
        found = super().losses(batch, stats)
        has_S = ~batch.teacher_logp_S.isnan()
        counted_S = has_S if found.counted_S is None else found.counted_S & has_S
        return replace(found, counted_S=counted_S)
