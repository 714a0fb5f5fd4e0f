"""Computes the advantages of a whole step, where rewards or advantages depend on all of its groups.

    all positions -> shaped and penalized rewards -> advantages (of group, critic or reward model)
                  -> masked -> rescaled

Shape suffixes: S sampled tokens (of one trajectory, or of the step over all ranks), T tokens of one
trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray, rewards_of
from trainer.advantages.critic import Critic, ValueTarget
from trainer.advantages.gae import Gae
from trainer.advantages.implicit_rewards import ImplicitRewards, OutcomeTarget
from trainer.advantages.prime import Prime
from trainer.advantages.turns import discounts_of_tokens, rewards_of_tokens
from trainer.batching.packing import is_target
from trainer.batching.positions import Position, as_context
from trainer.batching.segments import segments_of, split_targets
from trainer.distributed.ranks import Ranks
from trainer.step.group_advantages import GroupAdvantages, ScoredPosition
from trainer.step.rewards import TokenPenalties, TrajectoryGroup

Targets = list[ValueTarget] | list[OutcomeTarget]
"""What the critic, or the reward model, learns from after the step."""


class StepAdvantages:
    """`of_positions` is called once in each step, on all ranks."""

    def __init__(
        self,
        groups: GroupAdvantages,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        prm: ImplicitRewards | None = None,
    ) -> None:
        """`groups`: the advantages of each group by itself. Raises ConfigError if the advantage needs a
        critic or a reward model and there is none."""
        if isinstance(groups.estimator, Gae) and critic is None:
            raise ConfigError("advantage=gae needs a critic, and none was built")
        if isinstance(groups.estimator, Prime) and prm is None:
            raise ConfigError("advantage=prime needs a reward model, and none was built")
        self._groups = groups
        self._ranks = ranks
        self._critic = critic
        self._prm = prm

    def of_positions(self, positions: Sequence[Position]) -> tuple[Sequence[ScoredPosition], Targets]:
        """The samples of this rank's positions with advantages, and the targets of critic or reward model.
        Collective.

        `positions`: this rank's share of the step, in recorded order. The targets are empty without such a
        model.
        """
        shaped, penalties = self._groups.rewards.shape_step([each.trajectories for each in positions])
        advantages: Sequence[Sequence[float | FloatArray]]
        targets: Targets = []
        if self._critic is not None:
            advantages, targets = self._of_critic(self._critic, positions, shaped, penalties)
        elif self._prm is not None:
            advantages, targets = self._of_prm(self._prm, positions, shaped)
        else:
            advantages = [self._groups.of_group(group) for group in shaped]
        scored = list(map(self._groups.scored, positions, shaped, advantages))
        return self._rescaled(scored) if self._groups.is_rescaled else scored, targets

    def _of_prm(
        self, prm: ImplicitRewards, positions: Sequence[Position], shaped: Sequence[TrajectoryGroup]
    ) -> tuple[list[list[FloatArray]], list[OutcomeTarget]]:
        """(advantages [num_tokens] of each sample, the reward model's targets). Collective.

        The reward model learns from the task's rewards.
        """
        targets = prm.targets([t for each in positions for t in each.trajectories])
        remaining = iter(targets)
        advantages = []
        for group in shaped:
            process = [next(remaining).rewards_S for _ in group]
            found = prm.settings.of_group(rewards_of(group), process)
            advantages.append([_at_targets(t, a_S) for t, a_S in zip(group, found, strict=True)])
        return advantages, targets

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
            advantages.append(_at_targets(trajectory, advantages_S))
            learned = trajectory
            if masked_T is not None:
                within_S = ~masked_T[is_target(trajectory)]
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


def _at_targets(trajectory: Trajectory, value_S: FloatArray) -> FloatArray:
    """[num_tokens] the values of the tokens that are trained on; 0 elsewhere."""
    value_T = np.zeros(trajectory.num_tokens)
    value_T[is_target(trajectory)] = value_S
    return value_T
