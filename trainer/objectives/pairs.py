"""Objectives on the pairs of a group: online DPO, and REBEL.

    d_ij        = s_i - s_j,  s_i = sum_t log(pi_t / anchor_t) of sample i
    online_dpo    -log sigmoid(beta d_ij)            for R_i > R_j
    rebel         [beta d_ij - (R_i - R_j)]^2

    loss = mean over groups of the mean over the group's pairs; a group without a pair counts as 0

A group's pairs are its best sample against its worst, or all. For DPO a pair needs different rewards; REBEL
also regresses pairs of equal ones. Online DPO samples two completions and lets a judge compare them; to take
the best and the worst of a larger group is our choice.

DPO (arXiv 2305.18290, equation 7) on pairs of the current policy (online DPO, arXiv 2402.04792): rewards only
decide which of two samples is better, so their scale does not matter. `anchor` is the frozen reference model.
Here pairs are as stale as the samples: DPO prescribes no distribution of its pairs, so no correction is
applied.

REBEL (arXiv 2404.16767, algorithm 1; beta is its 1 / eta): regresses the difference of log-ratios on the
difference of rewards, which removes the normalizing constant that OAPL estimates as V*. `anchor` is the
policy that sampled; its solution is exact if a group's samples are of one version. On all pairs of a group it
is OAPL's loss with the best constant in place of V*.

Additions: the anchor is a setting; REBEL's beta has a default, the one of OAPL's beta2.

The value of a token's loss is an equal share of half of each of its sample's pairs; its gradient reaches only
its own log-prob, so masks compose.

Shape suffixes: S sampled tokens, N samples (in two dimensions: pairs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from areal_like.config.common import NonNegativeFloat, PositiveFloat, PositiveInt
from areal_like.trajectory import Trajectory
from trainer.advantages.base import Advantage, rewards_of
from trainer.advantages.group import centered
from trainer.objectives.base import OBJECTIVES, Need, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.oapl import default_beta2

Pairs = Literal["best_worst", "all"]
Anchor = Literal["reference", "behavior"]


@dataclass(frozen=True, kw_only=True)
class RewardSpread(Advantage):
    """R - mean, of whole samples: zero where no two rewards of a group differ. The losses do not use it."""

    credits_turns = False

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [float(a) for a in centered(rewards_of(group))]


@dataclass(frozen=True, kw_only=True)
class _OnPairs(Objective):
    """Base of both objectives: pairs, anchor, and the distribution of pairs' losses over tokens."""

    normalizer = "seq_mean_token_sum"
    whole_groups = True
    advantage = RewardSpread()
    takes_token_advantages = False

    pairs: Pairs = "best_worst"
    """Pairs of a group: `best_worst` (one pair) | `all`."""
    anchor: Anchor = "reference"
    """Policy whose log-probs the log-ratios are relative to: `reference` | `behavior` (that sampled)."""

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({Need.REF} if self.anchor == "reference" else ())

    def _of_pairs(
        self, batch: SampledTokens, value: Callable[[Tensor, Tensor], Tensor], *, with_ties: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """([S] losses of tokens, [N, N] d_ij, R_i - R_j, and whether i and j are a pair, i the better one).

        `value`: element-wise loss of a pair from d_ij and R_i - R_j.
        """
        anchor_S = batch.ref_logp_S if self.anchor == "reference" else batch.behavior_logp_S
        assert anchor_S is not None
        score_N = batch.sum_N(batch.logp_S.detach() - anchor_S)
        paired_NN = pairs_of(batch.reward_N, batch.group_N, only_extremes=self.pairs != "all", ties=with_ties)
        same_NN = batch.group_N[:, None] == batch.group_N
        # Multiplied by the size of the group: the normalizer divides by the number of samples, not of groups.
        num_pairs_N = same_NN.to(score_N) @ paired_NN.to(score_N).sum(1)
        weight_NN = paired_NN * (same_NN.sum(1) / num_pairs_N.clamp(min=1))[:, None]
        with torch.enable_grad():
            leaf_N = score_N.detach().requires_grad_()
            distance_NN = leaf_N[:, None] - leaf_N
            margin_NN = batch.reward_N[:, None] - batch.reward_N
            loss_NN = torch.where(paired_NN, value(distance_NN, margin_NN), 0.0) * weight_NN
            (slope_N,) = torch.autograd.grad(loss_NN.sum(), leaf_N)
        loss_NN = loss_NN.detach()
        share_N = 0.5 * (loss_NN.sum(0) + loss_NN.sum(1)) / batch.length_N.clamp(min=1)
        loss_S = batch.spread_S(share_N) + batch.spread_S(slope_N) * (batch.logp_S - batch.logp_S.detach())
        return loss_S, distance_NN.detach(), margin_NN, paired_NN


def pairs_of(reward_N: Tensor, group_N: Tensor, *, only_extremes: bool, ties: bool) -> Tensor:
    """[N, N] bool: i and j are a pair, i the one of higher reward.

    `only_extremes`: the first best of each group against its last worst, else all pairs. `ties`: also pairs
    of equal rewards, in which i comes first.
    """
    index_N = torch.arange(len(reward_N), device=reward_N.device)
    same_NN = group_N[:, None] == group_N
    is_first_NN = index_N[:, None] < index_N
    better_NN = reward_N[:, None] > reward_N
    level_NN = (reward_N[:, None] == reward_N) & is_first_NN
    ahead_NN = same_NN & (better_NN | level_NN)
    if only_extremes:
        # No sample of the group is ahead of the first, and the last is ahead of none.
        is_best_N, is_worst_N = ~ahead_NN.any(0), ~ahead_NN.any(1)
        ahead_NN = ahead_NN & is_best_N[:, None] & is_worst_N
    return ahead_NN if ties else ahead_NN & better_NN


@OBJECTIVES.register("online_dpo")
@dataclass(frozen=True, kw_only=True)
class OnlineDpo(_OnPairs):
    """`-log sigmoid(beta (s_i - s_j))` for a better sample i and a worse j, s the sum of log(pi / ref)"""

    beta: PositiveFloat = 0.1
    """Weight of the log-ratio: the smaller, the farther from the anchor pairs pull."""

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The pairs' losses; `pair_margin` is the mean of beta (s_i - s_j)."""
        loss_S, distance_NN, _, paired_NN = self._of_pairs(
            batch, lambda distance, _: -F.logsigmoid(self.beta * distance), with_ties=False
        )
        means, chosen = {"pair_margin": self.beta * distance_NN}, {"pair_margin": paired_NN}
        return TokenLosses(loss_S=loss_S, means=means, chosen=chosen)


@OBJECTIVES.register("rebel")
@dataclass(frozen=True, kw_only=True)
class Rebel(_OnPairs):
    """`[beta (s_i - s_j) - (R_i - R_j)]^2`, s the sum of log(pi / mu)"""

    skips_zero_advantage = False

    pairs: Pairs = "all"
    """Pairs of a group: `best_worst` (one pair) | `all`."""
    anchor: Anchor = "behavior"
    """Policy whose log-probs the log-ratios are relative to: `behavior` (that sampled) | `reference`."""
    beta: NonNegativeFloat = 0.0
    """Weight of the log-ratio, 1 / eta in the paper; 0: by length, as `beta2` of `oapl`."""
    max_tokens: PositiveInt = 64
    """Length for the default of beta; the trainer fills in `sampling.max_new_tokens`."""

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The pairs' squared residuals; `residual_abs` is the mean |residual| of a pair."""
        beta = self.beta or default_beta2(self.max_tokens)
        loss_S, distance_NN, margin_NN, paired_NN = self._of_pairs(
            batch, lambda distance, margin: (beta * distance - margin).square(), with_ties=True
        )
        means = {"residual_abs": (beta * distance_NN - margin_NN).abs()}
        return TokenLosses(loss_S=loss_S, means=means, chosen={"residual_abs": paired_NN})
