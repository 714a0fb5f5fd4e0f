"""Turns the task's rewards into those that advantages are computed from.

    R -> shapings in order -> R - kl.coef * sum_t KL_t(mu || ref)

The KL penalty uses the behavior policy mu, whose log-probs are recorded, so only the reference model needs a
forward pass. The penalty is a sum over the sample's tokens, so it also favors short completions; GAE
subtracts each token's term from the reward of that token. A greedy sample is shaped like its group but gets
no penalty, because its recorded log-probs are not the policy's. Shaping and penalty change copies; metrics
still show the task's reward.

Shape suffixes: S sampled tokens (of one trajectory; tensors: of a micro-batch), G samples of a group, J
groups of the step over all ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import EarlyMember
from trainer.advantages.base import FloatArray
from trainer.advantages.parts import stand_in
from trainer.advantages.reward_shaping import Shaping, ShapingContext
from trainer.batching.packing import PackedBatch, num_targets
from trainer.batching.scope import Scope
from trainer.batching.segments import values_of_targets
from trainer.distributed.ranks import Ranks
from trainer.models.policy import BaseReference, Policy
from trainer.objectives.composed import kl_estimate
from trainer.objectives.kl_control import KlControl

log = logging.getLogger(__name__)

TrajectoryGroup = Sequence[Trajectory]
"""Samples of one prompt, in sample order; a greedy sample is the last."""
TokenPenalties = list[list[FloatArray]]
"""For each group, for each sample: the KL penalty [S] of its sampled tokens."""


class RewardTerms:
    """Applies reward shapings and the KL penalty.

    Its only state is `duals`, one number per shaping, and the coefficient of the penalty; checkpoints store
    both.
    """

    def __init__(
        self,
        shapings: Sequence[Shaping],
        ranks: Ranks,
        *,
        kl: KlConfig | None,
        reference: Policy | BaseReference | None,
        budget_tokens: int,
    ) -> None:
        """`kl`: the penalty; None: none.

        `reference`: model for the penalty. `budget_tokens`: most tokens of one of its micro-batches.

        Raises ConfigError for a penalty without a reference model.
        """
        if kl is not None and reference is None:
            raise ConfigError("kl.place=reward needs a reference model: name one in kl.reference")
        self._shapings = shapings
        self._ranks = ranks
        self._kl = kl
        self.kl_control = None if kl is None else KlControl(kl)
        """The coefficient of the penalty, if there is one."""
        self.mean_kl = math.nan
        """Mean KL estimate over the sampled tokens of the step's samples on all ranks, with a penalty."""
        self._reference = reference
        self._budget_tokens = budget_tokens
        self.duals = [0.0] * len(shapings)

    @property
    def is_identity(self) -> bool:
        """True if the task's rewards are used unchanged."""
        return not self._shapings and self._kl is None

    @property
    def scope(self) -> Scope:
        """GROUP: `shape_group` suffices. BATCH: `shape_step` is needed."""
        if self._kl is not None or any(shaping.scope is Scope.BATCH for shaping in self._shapings):
            return Scope.BATCH
        return Scope.GROUP

    @property
    def shaping_of_whole_groups(self) -> str:
        """The first shaping that needs whole groups; empty: none does."""
        return next((type(shaping).__name__ for shaping in self._shapings if not shaping.takes_parts), "")

    def shape_group(
        self, group: TrajectoryGroup, *, ahead: Sequence[float] = (), duals: Sequence[float] = ()
    ) -> TrajectoryGroup:
        """Returns the group with shaped rewards.

        `ahead`: for each shaping, the share of groups that rank before this one. `duals`: the dual variables,
        by default the present ones.
        """
        shares = ahead or [0.0] * len(self._shapings)
        for shaping, dual, share in zip(self._shapings, duals or self.duals, shares, strict=True):
            rewards_G = shaping.rewards(group, ShapingContext(dual=dual, ahead=share))
            group = [replace(t, reward=float(r)) for t, r in zip(group, rewards_G, strict=True)]
        return group

    def shape_members(self, members: Sequence[EarlyMember], *, duals: Sequence[float]) -> list[EarlyMember]:
        """Returns the early members of a group with shaped rewards; `shape_group` without their content."""
        if not self._shapings:
            return list(members)
        shaped = self.shape_group([stand_in(member) for member in members], duals=duals)
        return [replace(member, reward=t.reward) for member, t in zip(members, shaped, strict=True)]

    def shape_step(self, groups: Sequence[TrajectoryGroup]) -> tuple[list[TrajectoryGroup], TokenPenalties]:
        """Returns this rank's groups with shaped and penalized rewards, and each token's share of the
        penalties.

        Collective.

        `groups`: this rank's share of the step, in recorded order.
        """
        shaped = [
            self.shape_group(group, ahead=ahead)
            for group, ahead in zip(groups, self._shares_ahead(groups), strict=True)
        ]
        penalties = self._kl_penalties(shaped)
        if self.kl_control is None:
            return shaped, penalties
        self.mean_kl = self._mean_of(shaped, penalties) / self.kl_control.coef
        penalized: list[TrajectoryGroup] = [
            [
                replace(t, reward=t.reward - float(penalty_S.sum()))
                for t, penalty_S in zip(group, of_group, strict=True)
            ]
            for group, of_group in zip(shaped, penalties, strict=True)
        ]
        return penalized, penalties

    def update_duals(self, *, mean_tokens: float) -> None:
        """Updates the dual variables after a step over samples of this mean number of sampled tokens."""
        self.duals = [
            s.next_dual(dual, mean_tokens=mean_tokens)
            for s, dual in zip(self._shapings, self.duals, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """`shaping_dual_I`: the dual variable of the shaping at index I, for those that have one."""
        with_dual = (i for i, s in enumerate(self._shapings) if type(s).next_dual is not Shaping.next_dual)
        return {f"shaping_dual_{i}": self.duals[i] for i in with_dual}

    def restore(self, duals: Sequence[float]) -> None:
        """Sets the dual variables from a checkpoint; warns and keeps zeros if their number differs."""
        if len(duals) == len(self.duals):
            self.duals = list(duals)
        else:
            log.warning(
                "advantage.shaping differs from the checkpoint's: its dual variables start again at 0"
            )

    def _shares_ahead(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        """For each group and shaping, the share of all ranks' groups that rank before it. Collective."""
        num_data, data_rank = self._ranks.num_data, self._ranks.data_rank
        positions = [index * num_data + data_rank for index in range(len(groups))]
        positions_J = self._ranks.gather(torch.tensor(positions, dtype=torch.int64)).numpy()
        shares: list[list[float]] = [[] for _ in groups]
        for shaping in self._shapings:
            scores = torch.tensor([shaping.score(group) for group in groups], dtype=torch.float64)
            scores_J = self._ranks.gather(scores).numpy()
            order = np.lexsort((positions_J, -scores_J))  # best score first, ties by recorded order
            share_of = {int(positions_J[j]): rank / len(order) for rank, j in enumerate(order)}
            for of_group, position in zip(shares, positions, strict=True):
                of_group.append(share_of[position])
        return shares

    def _mean_of(self, groups: Sequence[TrajectoryGroup], penalties: TokenPenalties) -> float:
        """The mean over the tokens of all ranks' samples but greedy ones; NaN without tokens. Collective."""
        found = [
            penalty_S
            for group, of_group in zip(groups, penalties, strict=True)
            for trajectory, penalty_S in zip(group, of_group, strict=True)
            if not trajectory.is_greedy
        ]
        sums = torch.tensor([sum(float(p.sum()) for p in found), sum(map(len, found))], dtype=torch.float64)
        total, count = self._ranks.sum(sums).tolist()
        return total / count if count else math.nan

    def _kl_penalties(self, groups: Sequence[TrajectoryGroup]) -> TokenPenalties:
        """The coefficient times the KL estimate at each sampled token; zeros for greedy samples.

        Collective with a penalty.
        """
        if self._kl is None:
            return [[np.zeros(num_targets(t)) for t in group] for group in groups]
        kl, reference = self._kl, self._reference
        assert reference is not None and self.kl_control is not None
        coef = self.kl_control.coef

        def penalties_S(batch: PackedBatch) -> Tensor:
            ref_logp_S = reference(batch).logprobs_S
            behavior_logp_S = batch.behavior_logp_T[batch.sampled_S].to(ref_logp_S.dtype)
            return coef * kl_estimate(behavior_logp_S - ref_logp_S, estimator=kl.estimator)

        sampled = [t for group in groups for t in group if not t.is_greedy]
        found = values_of_targets(
            sampled,
            penalties_S,
            self._ranks,
            budget_tokens=self._budget_tokens,
            shares_prefixes=reference.shares_prefixes,
        )
        remaining = iter(found)
        return [
            [np.zeros(num_targets(t)) if t.is_greedy else next(remaining) for t in group] for group in groups
        ]
