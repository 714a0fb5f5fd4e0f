"""From the groups of a step to samples with advantages; the first half of a step, the second is the policy's.

    groups -> recorded -> rewards shaped -> compared: with the group, or with the critic -> rescaled over the step -> samples

While nothing needs the whole step, groups pass one by one as they come. Greedy samples are compared with and go no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import Advantage, Estimator, FloatArray
from trainer.advantages.critic import Critic, ValueTarget
from trainer.advantages.gae import Gae
from trainer.batching.packing import Sample
from trainer.batching.scope import Scope
from trainer.distributed.ranks import Ranks
from trainer.metrics.phase_timer import PhaseTimer
from trainer.metrics.step_totals import StepTotals
from trainer.step.reward_terms import Costs, Group, Rewards

Lags = NDArray[np.int64]
"""[num_tokens]"""


class AdvantagePipeline:
    """Of one step at a time: `appraise`, then, when the policy has learned from it, `learn`."""

    def __init__(
        self, advantage: Estimator, rewards: Rewards, ranks: Ranks, *, critic: Critic | None = None
    ) -> None:
        """Raises ConfigError when the advantage needs a critic and there is none."""
        if isinstance(advantage, Gae) and critic is None:
            raise ConfigError("advantage=gae needs a critic, and none was built")
        self._advantage = advantage
        self._rewards = rewards
        self._ranks = ranks
        self._critic = critic
        self._lessons: list[ValueTarget] = []

    @property
    def extra_totals(self) -> tuple[str, ...]:
        """Names that `appraise` adds to the totals of a step."""
        shaped = () if self._rewards.is_plain else ("shaped_reward",)
        return (*shaped, "greedy_reward") if self._advantage.uses_greedy else shaped

    def appraise(
        self,
        groups: Iterable[Group],
        totals: StepTotals,
        clock: PhaseTimer,
        *,
        lags: Callable[[Trajectory], Lags],
    ) -> Iterable[list[Sample]]:
        """This rank's groups with their advantages. Collective unless everything is of scope GROUP; then groups are taken as they come."""
        recorded = (totals.recorded(group) for group in groups)
        if self._rewards.scope is Scope.GROUP and self._advantage.scope is Scope.GROUP:
            graded = (self._shown(self._rewards.of_group(group), totals) for group in recorded)
            return self._samples(((group, self._compared(group)) for group in graded), lags)
        collected = list(recorded)
        with clock.span("compute_s"):
            paid, costs = self._rewards.of_step(collected)
            for group in paid:
                self._shown(group, totals)
            advantages = (
                self._valued(paid, costs)
                if self._critic is not None
                else [self._compared(group) for group in paid]
            )
            samples = list(self._samples(zip(paid, advantages, strict=True), lags))
            return self._rescaled(samples) if self._advantage.scope is Scope.BATCH else samples

    def policy_waits(self, step: int) -> bool:
        """Whether the critic alone learns in this step."""
        return self._critic is not None and step < self._critic.settings.critic_warmup_steps

    def learn(self, step: int) -> dict[str, float]:
        """Teaches the critic, if there is one, what this step's values should have been; its metrics. Collective."""
        if self._critic is None:
            return {}
        lessons, self._lessons = self._lessons, []
        return self._critic.learn(lessons, step=step)

    def _shown(self, group: Group, totals: StepTotals) -> Group:
        if not self._rewards.is_plain:
            rewards = [trajectory.reward for trajectory in group if not trajectory.is_greedy]
            totals.add("shaped_reward", sum(rewards), count=float(len(rewards)))
        return group

    def _compared(self, group: Group) -> Sequence[float | FloatArray]:
        assert isinstance(self._advantage, Advantage)
        return self._advantage.of_group(group)

    def _valued(self, groups: Sequence[Group], costs: Costs) -> list[list[FloatArray]]:
        """Advantages [num_tokens] of each sample by the critic's values, which `learn` will correct. Collective."""
        assert self._critic is not None
        trajectories = [trajectory for group in groups for trajectory in group]
        prices = [cost_S for group in costs for cost_S in group]
        self._lessons, tokens = [], []
        for trajectory, cost_S, values_S in zip(
            trajectories, prices, self._critic.values(trajectories), strict=True
        ):
            rewards_S = -cost_S
            rewards_S[-1:] += (
                trajectory.reward + cost_S.sum()
            )  # what the sample is worth has its costs taken off already
            advantages_S, targets_S = self._critic.settings.of_tokens(rewards_S, values_S)
            self._lessons.append(ValueTarget(trajectory=trajectory, values_S=values_S, targets_S=targets_S))
            advantages_T = np.zeros(trajectory.num_tokens)
            advantages_T[1:][trajectory.loss_mask[1:] == 1] = advantages_S
            tokens.append(advantages_T)
        left = iter(tokens)
        return [[next(left) for _ in group] for group in groups]

    def _samples(
        self,
        compared: Iterable[tuple[Group, Sequence[float | FloatArray]]],
        lags: Callable[[Trajectory], Lags],
    ) -> Iterator[list[Sample]]:
        for index, (group, advantages) in enumerate(compared):
            position = index * self._ranks.world_size + self._ranks.rank
            yield [
                Sample(trajectory=trajectory, advantage=advantage, group=position, lag=lags(trajectory))
                for trajectory, advantage in zip(group, advantages, strict=True)
                if not trajectory.is_greedy
            ]

    def _rescaled(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        """Applies what the advantage says about the whole step. Collective."""
        samples = [sample for group in groups for sample in group]
        tokens = [
            np.broadcast_to(s.advantage, (s.trajectory.num_tokens,))[1:][s.trajectory.loss_mask[1:] == 1]
            for s in samples
        ]
        positions = [np.full(len(a), s.group) for a, s in zip(tokens, samples, strict=True)]
        advantages_S = self._ranks.gather(torch.from_numpy(np.concatenate([np.zeros(0), *tokens])))
        groups_S = self._ranks.gather(
            torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *positions]))
        )
        shift, factor = self._advantage.rescale(advantages_S=advantages_S.numpy(), groups_S=groups_S.numpy())
        return [[replace(s, advantage=(s.advantage + shift) * factor) for s in group] for group in groups]
