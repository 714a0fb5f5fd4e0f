"""Computes the advantages of a whole step, where rewards or advantages depend on all of its groups.

    all positions -> shaped and penalized rewards -> advantages (of group or critic) -> masked -> rescaled

Shape suffixes: S sampled tokens (of one trajectory, or of the step over all ranks), T tokens of one
trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from areal_like.errors import ConfigError
from trainer.advantages.base import FloatArray
from trainer.advantages.critic import Critic, ValueTarget
from trainer.advantages.gae import Gae
from trainer.advantages.turns import discounts_of_tokens, rewards_of_tokens
from trainer.batching.packing import is_target
from trainer.batching.positions import Position, as_context
from trainer.batching.segments import segments_of, split_targets
from trainer.distributed.ranks import Ranks
from trainer.step.group_advantages import GroupAdvantages, ScoredPosition
from trainer.step.rewards import TokenPenalties, TrajectoryGroup


class StepAdvantages:
    """`of_positions` is called once in each step, on all ranks."""

    def __init__(self, groups: GroupAdvantages, ranks: Ranks, *, critic: Critic | None = None) -> None:
        """`groups`: the advantages of each group by itself. Raises ConfigError if the advantage needs a
        critic and there is none."""
        if isinstance(groups.estimator, Gae) and critic is None:
            raise ConfigError("advantage=gae needs a critic, and none was built")
        self._groups = groups
        self._ranks = ranks
        self._critic = critic

    def of_positions(
        self, positions: Sequence[Position]
    ) -> tuple[Sequence[ScoredPosition], list[ValueTarget]]:
        """The samples of this rank's positions with advantages, and the critic's targets. Collective.

        `positions`: this rank's share of the step, in recorded order. The targets are empty without a critic.
        """
        shaped, penalties = self._groups.rewards.shape_step([each.trajectories for each in positions])
        advantages: Sequence[Sequence[float | FloatArray]]
        targets: list[ValueTarget] = []
        if self._critic is None:
            advantages = [self._groups.of_group(group) for group in shaped]
        else:
            advantages, targets = self._of_critic(self._critic, positions, shaped, penalties)
        scored = list(map(self._groups.scored, positions, shaped, advantages))
        return self._rescaled(scored) if self._groups.is_rescaled else scored, targets

    def _of_critic(
        self,
        critic: Critic,
        positions: Sequence[Position],
        shaped: Sequence[TrajectoryGroup],
        penalties: TokenPenalties,
    ) -> tuple[list[list[FloatArray]], list[ValueTarget]]:
        """(advantages [num_tokens] of each sample by GAE, the critic's targets). Collective.

        The advantages of a sample are computed from the values of all its sampled tokens, but the critic is
        not trained on masked ones.
        """
        trajectories = [trajectory for group in shaped for trajectory in group]
        token_penalties = [penalty_S for of_group in penalties for penalty_S in of_group]
        values, turn_discount = critic.values(trajectories), self._groups.turn_discount
        credited = critic.settings.of_samples(
            [
                rewards_of_tokens(trajectory, penalty_S=penalty_S)
                for trajectory, penalty_S in zip(trajectories, token_penalties, strict=True)
            ],
            values,
            discounts=[discounts_of_tokens(t, turn_discount=turn_discount) for t in trajectories],
        )
        masked = [
            each.masked(index, masks_beyond=self._groups.masks_beyond)
            for each in positions
            for index in range(len(each.trajectories))
        ]
        advantages, targets = [], []
        for trajectory, values_S, (advantages_S, targets_S), masked_T in zip(
            trajectories, values, credited, masked, strict=True
        ):
            target_T = is_target(trajectory)
            advantages_T = np.zeros(trajectory.num_tokens)
            advantages_T[target_T] = advantages_S
            advantages.append(advantages_T)
            learned = trajectory
            if masked_T is not None:
                within_S = ~masked_T[target_T]
                values_S, targets_S = values_S[within_S], targets_S[within_S]
                learned = as_context(trajectory, masked_T)
                if not len(targets_S):
                    continue
            targets += [
                ValueTarget(trajectory=segment, values_S=of_values, targets_S=of_targets)
                for (_, segment), of_values, of_targets in zip(
                    segments_of(learned),
                    split_targets(values_S, learned),
                    split_targets(targets_S, learned),
                    strict=True,
                )
            ]
        remaining = iter(advantages)
        return [[next(remaining) for _ in group] for group in shaped], targets

    def _rescaled(self, scored: Sequence[ScoredPosition]) -> list[ScoredPosition]:
        """Applies the estimator's `rescale` to the whole step. Collective."""
        samples = [sample for each in scored for sample in each.samples]
        tokens = [
            np.broadcast_to(s.advantage, (s.trajectory.num_tokens,))[is_target(s.trajectory)] for s in samples
        ]
        places = [np.full(len(a), s.group) for a, s in zip(tokens, samples, strict=True)]
        advantages_S = self._ranks.gather(torch.from_numpy(np.concatenate([np.zeros(0), *tokens])))
        groups_S = self._ranks.gather(
            torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *places]))
        )
        shift, factor = self._groups.estimator.rescale(
            advantages_S=advantages_S.numpy(), groups_S=groups_S.numpy()
        )
        return [
            replace(
                each, samples=[replace(s, advantage=(s.advantage + shift) * factor) for s in each.samples]
            )
            for each in scored
        ]
