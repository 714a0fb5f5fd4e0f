"""From the rewards that tasks gave to those that advantages are made of: shaping, then the price of leaving a reference model.

    shaping in order -> R - kl.coef * sum_t KL(mu || ref) -> advantages

The penalty is that of the policy which sampled, whose log-probs are on record: no forward but the reference's. It is a sum over the
sample, so it pays for brevity too; who learns from rewards of tokens is told each token's part. A greedy sample is shaped like its group
and pays no penalty: its log-probs are not the policy's. Both kinds of change are made on copies; metrics show what the task said.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray
from trainer.advantages.reward_shaping import Shaping, ShapingContext
from trainer.batching.microbatches import matched
from trainer.batching.packing import Packer, Sample, by_sequence, num_targets
from trainer.batching.scope import Scope
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.objectives.composed import kl_estimate

log = logging.getLogger(__name__)

Group = Sequence[Trajectory]
"""Samples of one prompt, in sample order; a greedy one is the last."""
Costs = list[list[FloatArray]]
"""What each sampled token of each sample of each group costs."""


class Rewards:
    """Changes the rewards of a step's groups. `duals` is its whole state, one number a shaping; the checkpoint holds it."""

    def __init__(
        self,
        shapings: Sequence[Shaping],
        ranks: Ranks,
        *,
        kl: KlConfig | None,
        reference: Policy | None,
        budget_tokens: int,
    ) -> None:
        """`kl`: the penalty; None: none. `reference`: for the penalty. `budget_tokens`: of a micro-batch of its forward.

        Raises ConfigError for a penalty without a reference.
        """
        if kl is not None and reference is None:
            raise ConfigError("kl.place=reward needs a reference model: name one in kl.reference")
        self._shapings = shapings
        self._ranks = ranks
        self._kl = kl
        self._reference = reference
        self._budget_tokens = budget_tokens
        self.duals = [0.0] * len(shapings)

    @property
    def is_plain(self) -> bool:
        """Nothing is changed."""
        return not self._shapings and self._kl is None

    @property
    def scope(self) -> Scope:
        """BATCH: only `of_step` can do it."""
        return (
            Scope.BATCH
            if self._kl is not None or any(s.scope is Scope.BATCH for s in self._shapings)
            else Scope.GROUP
        )

    def of_group(self, group: Group, *, ahead: Sequence[float] = ()) -> Group:
        """The shaped group. `ahead`: its standing by each shaping's score."""
        standings = ahead or [0.0] * len(self._shapings)
        for shaping, dual, place in zip(self._shapings, self.duals, standings, strict=True):
            rewards_G = shaping.rewards(group, ShapingContext(dual=dual, ahead=place))
            group = [replace(t, reward=float(r)) for t, r in zip(group, rewards_G, strict=True)]
        return group

    def of_step(self, groups: Sequence[Group]) -> tuple[list[Group], Costs]:
        """This rank's groups of a step in recorded order, and what of their rewards was taken off at which token. Collective."""
        shaped = [
            self.of_group(group, ahead=place)
            for group, place in zip(groups, self._standings(groups), strict=True)
        ]
        costs = self._costs(shaped)
        if self._kl is None:
            return shaped, costs
        paid = [
            [
                replace(t, reward=t.reward - float(cost_S.sum()))
                for t, cost_S in zip(group, prices, strict=True)
            ]
            for group, prices in zip(shaped, costs, strict=True)
        ]
        return [*paid], costs

    def advance(self, *, mean_tokens: float) -> None:
        """After a step over samples of this mean length."""
        self.duals = [
            s.next_dual(dual, mean_tokens=mean_tokens)
            for s, dual in zip(self._shapings, self.duals, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """Dual variables of the shapings that learn one, by their place in the list."""
        learners = (i for i, s in enumerate(self._shapings) if type(s).next_dual is not Shaping.next_dual)
        return {f"shaping_dual_{i}": self.duals[i] for i in learners}

    def restore(self, duals: Sequence[float]) -> None:
        """Goes on from a checkpoint's `duals`; from zero, with a warning, if it is of other shapings."""
        if len(duals) == len(self.duals):
            self.duals = list(duals)
        else:
            log.warning(
                "advantage.shaping is not what the checkpoint was made with: dual variables begin at 0 again"
            )

    def _standings(self, groups: Sequence[Group]) -> list[list[float]]:
        """For each group and shaping, the share of all ranks' groups that rank before it. Collective."""
        mine = [index * self._ranks.world_size + self._ranks.rank for index in range(len(groups))]
        positions_J = self._ranks.gather(torch.tensor(mine, dtype=torch.int64)).numpy()
        standings: list[list[float]] = [[] for _ in groups]
        for shaping in self._shapings:
            scores_J = self._ranks.gather(
                torch.tensor([shaping.score(group) for group in groups], dtype=torch.float64)
            ).numpy()
            order = np.lexsort((positions_J, -scores_J))
            ahead = {int(positions_J[j]): place / len(order) for place, j in enumerate(order)}
            for places, position in zip(standings, mine, strict=True):
                places.append(ahead[position])
        return standings

    def _costs(self, groups: Sequence[Group]) -> Costs:
        if self._kl is None:
            return [[np.zeros(num_targets(t)) for t in group] for group in groups]
        assert self._reference is not None
        packer = Packer(budget_tokens=self._budget_tokens)
        samples = [
            Sample(trajectory=t, advantage=0.0, group=0) for group in groups for t in group if not t.is_greedy
        ]
        costs: list[FloatArray] = []
        for batch, live in matched(iter([*packer.add(samples), *packer.flush()]), self._ranks):
            with torch.no_grad():
                ref_logp_S = self._reference(batch).logprobs_S
            if live:
                kl_S = kl_estimate(
                    batch.behavior_logp_T[batch.sampled_S].to(ref_logp_S.dtype) - ref_logp_S,
                    estimator=self._kl.estimator,
                )
                costs += by_sequence(self._kl.coef * kl_S, batch)
        left = iter(costs)
        return [[np.zeros(num_targets(t)) if t.is_greedy else next(left) for t in group] for group in groups]
