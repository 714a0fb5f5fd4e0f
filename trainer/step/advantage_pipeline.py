"""The first stage of a step: turns groups of trajectories into training samples with advantages.

    groups -> task rewards recorded -> shapings in order -> R - kl.coef * sum_t KL_t(mu || ref)
           -> advantages (of group or critic) -> tokens beyond the staleness bound masked -> rescaled

With `buffer.overdue=close` a group's samples may be trained on in several steps, and each has a baseline of
its own (`trainer/advantages/parts.py`). Masked tokens are context from here on, like a prompt.

If rewards and advantage do not depend on the whole step, each group is processed as it arrives. Greedy
samples serve as baselines and are then left out.

The KL penalty uses the behavior policy mu, whose log-probs are recorded, so only the reference model needs a
forward pass. The penalty is a sum over the sample's tokens, so it also favors short completions; GAE
subtracts each token's term from the reward of that token. A greedy sample is shaped like its group but gets
no penalty, because its recorded log-probs are not the policy's. Shaping and penalty change copies; metrics
still show the task's reward.

Shape suffixes: S sampled tokens (of one trajectory or of the step over all ranks; tensors: of a micro-batch),
T tokens of one trajectory, J groups of the step over all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import EarlyMember
from trainer.advantages.base import Advantage, Estimator, FloatArray
from trainer.advantages.critic import Critic, ValueTarget
from trainer.advantages.gae import Gae
from trainer.advantages.parts import context_of, stand_in
from trainer.advantages.reward_history import RewardHistory
from trainer.advantages.reward_shaping import Shaping, ShapingContext
from trainer.advantages.turns import discounts_of_tokens, group_advantages, rewards_of_tokens
from trainer.batching.packing import PackedBatch, SampleCounts, TrainingSample, is_target, num_targets
from trainer.batching.positions import Origin, Position, as_context
from trainer.batching.scope import Scope
from trainer.batching.segments import segments_of, split_sample, split_targets, values_of_targets
from trainer.distributed.ranks import Ranks
from trainer.metrics.phase_timer import PhaseTimer
from trainer.metrics.step_totals import StepTotals
from trainer.models.policy import Policy
from trainer.objectives.composed import kl_estimate

log = logging.getLogger(__name__)

TrajectoryGroup = Sequence[Trajectory]
"""Samples of one prompt, in sample order; a greedy sample is the last."""
_Scored = tuple[Position, list[TrainingSample]]
"""A position and its whole samples, before they are cut into segments; greedy ones are left out."""
TokenPenalties = list[list[FloatArray]]
"""For each group, for each sample: the KL penalty [S] of its sampled tokens."""


class RewardTerms:
    """Applies reward shapings and the KL penalty.

    Its only state is `duals`, one number per shaping, which the checkpoint stores.
    """

    def __init__(
        self,
        shapings: Sequence[Shaping],
        ranks: Ranks,
        *,
        kl: KlConfig | None,
        reference: Policy | None,
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
        if self._kl is None:
            return shaped, penalties
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
        positions = [index * self._ranks.world_size + self._ranks.rank for index in range(len(groups))]
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

    def _kl_penalties(self, groups: Sequence[TrajectoryGroup]) -> TokenPenalties:
        """kl.coef times the KL estimate at each sampled token; zeros for greedy samples.

        Collective with a penalty.
        """
        if self._kl is None:
            return [[np.zeros(num_targets(t)) for t in group] for group in groups]
        kl, reference = self._kl, self._reference
        assert reference is not None

        def penalties_S(batch: PackedBatch) -> Tensor:
            ref_logp_S = reference(batch).logprobs_S
            behavior_logp_S = batch.behavior_logp_T[batch.sampled_S].to(ref_logp_S.dtype)
            return kl.coef * kl_estimate(behavior_logp_S - ref_logp_S, estimator=kl.estimator)

        sampled = [t for group in groups for t in group if not t.is_greedy]
        found = values_of_targets(sampled, penalties_S, self._ranks, budget_tokens=self._budget_tokens)
        remaining = iter(found)
        return [
            [np.zeros(num_targets(t)) if t.is_greedy else next(remaining) for t in group] for group in groups
        ]


class AdvantagePipeline:
    """In each step, `compute` is called first, and `learn` along with the policy's update."""

    def __init__(
        self,
        advantage: Estimator,
        rewards: RewardTerms,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        turn_discount: float = 1.0,
        closes: bool = False,
        masks_beyond: bool = True,
    ) -> None:
        """`turn_discount`: discount from one turn of a sample to the next. `closes`: `buffer.overdue=close`.

        `masks_beyond`: tokens beyond the staleness bound are masked; False: they are only marked.

        Raises ConfigError if the advantage needs a critic and there is none.
        """
        if isinstance(advantage, Gae) and critic is None:
            raise ConfigError("advantage=gae needs a critic, and none was built")
        self._advantage = advantage
        self._rewards = rewards
        self._ranks = ranks
        self._critic = critic
        self._turn_discount = turn_discount
        self._value_targets: list[ValueTarget] = []
        self.state = advantage.initial_state()
        """The estimator's state from earlier steps; checkpoints store it."""
        self._closes = closes
        self._masks_beyond = masks_beyond
        self.history = RewardHistory(decay=advantage.history_decay)
        """Running statistics of rewards, with `closes`; checkpoints store them."""

    @property
    def extra_totals(self) -> tuple[str, ...]:
        """Names that `compute` adds to the totals of a step."""
        shaped = () if self._rewards.is_identity else ("shaped_reward", "shaped_reward_square")
        return (*shaped, "greedy_reward") if self._advantage.uses_greedy else shaped

    def compute(
        self, positions: Iterable[Position], totals: StepTotals, timer: PhaseTimer, *, step: int
    ) -> Iterable[list[TrainingSample]]:
        """Turns this rank's groups, or parts of groups, into samples with advantages, after `step` steps.

        If rewards and advantage are of scope GROUP, groups are taken lazily as they arrive. Otherwise the
        call is collective and waits for the last group.
        """
        if self._closes:
            self.history.begin(step, duals=self._rewards.duals)
        recorded = (self._recorded(position, totals) for position in positions)
        if self._rewards.scope is Scope.GROUP and self._scope is Scope.GROUP:
            scored = ((position, *self._scored(position, totals, step=step)) for position in recorded)
            return self._split(self._samples(scored), totals)
        collected = list(recorded)
        with timer.span("compute_s"):
            shaped, penalties = self._rewards.shape_step([position.trajectories for position in collected])
            step_groups = list(self._record_shaped(shaped, totals))
            advantages = (
                self._critic_advantages(collected, step_groups, penalties)
                if self._critic is not None
                else [self._group_advantages(group) for group in step_groups]
            )
            samples = list(self._samples(zip(collected, step_groups, advantages, strict=True)))
            if self._scope is Scope.BATCH:
                samples = self._rescaled(samples)
            return list(self._split(samples, totals))

    @property
    def needs_whole_groups(self) -> str:
        """The part of the method that would compare the parts of closed groups at one position, which a run
        that was changed to another `buffer.overdue` has left, as one group; empty: none does.

        An estimator without `of_part` raises its own error.
        """
        if self._closes:
            return ""
        if shaping := self._rewards.shaping_of_whole_groups:
            return f"advantage.shaping {shaping}"
        used = self._advantage
        if isinstance(used, Advantage) and used.compares_samples:
            if self._scope is Scope.BATCH:
                return f"advantage {type(used).__name__}"
            if self._rewards.scope is Scope.BATCH:
                return "kl.place=reward"
        return ""

    @property
    def _scope(self) -> Scope:
        """The advantage's scope; parts have no `rescale`, but a critic's advantages are whitened."""
        return Scope.GROUP if self._closes and self._critic is None else self._advantage.scope

    def _recorded(self, position: Position, totals: StepTotals) -> Position:
        totals.recorded(position.trajectories)
        return position.as_whole_group() if self._closes and position.origins is None else position

    def _scored(
        self, position: Position, totals: StepTotals, *, step: int
    ) -> tuple[TrajectoryGroup, Sequence[float | FloatArray]]:
        """The samples with shaped rewards, and their advantages."""
        # A whole group that was recorded before the job's `buffer.overdue` was changed is one like any other.
        if position.origins is not None and (self._closes or position.is_of_parts):
            return self._scored_parts(position.trajectories, position.origins, totals, step=step)
        (shaped,) = self._record_shaped([self._rewards.shape_group(position.trajectories)], totals)
        return shaped, self._group_advantages(shaped)

    def _scored_parts(
        self,
        trajectories: TrajectoryGroup,
        origins: Sequence[Origin],
        totals: StepTotals,
        *,
        step: int,
    ) -> tuple[TrajectoryGroup, Sequence[float]]:
        """The samples with shaped rewards, and their advantages relative to the early members of each one's
        group."""
        assert isinstance(self._advantage, Advantage)
        shaped, advantages = [], []
        members_of: dict[int, Sequence[EarlyMember]] = {}
        self.history.begin(step, duals=self._rewards.duals)
        for trajectory, origin in zip(trajectories, origins, strict=True):
            running = self.history.as_of(origin.begin_step, step=step)
            if origin.ticket_id not in members_of:
                members_of[origin.ticket_id] = self._rewards.shape_members(origin.early, duals=running.duals)
            (own,) = self._rewards.shape_group([trajectory], duals=running.duals)
            context = context_of(members_of[origin.ticket_id], without=origin.sample_index, running=running)
            shaped.append(own)
            advantages.append(self._advantage.of_part(own.reward, context))
        (shaped_group,) = self._record_shaped([shaped], totals)
        return shaped_group, advantages

    def is_critic_warmup(self, step: int) -> bool:
        """True in the first steps, in which only the critic is trained."""
        return self._critic is not None and step < self._critic.settings.critic_warmup_steps

    def learn(self, totals: StepTotals, *, step: int) -> dict[str, float]:
        """Trains the critic on this step's value targets; updates dual variables and the estimator's state.

        Returns the metrics of those that exist. Collective.
        """
        metrics: dict[str, float] = {}
        if self._critic is not None:
            targets, self._value_targets = self._value_targets, []
            metrics = self._critic.learn(targets, step=step)
        self._rewards.update_duals(mean_tokens=totals.mean("response_tokens"))
        metrics = self._rewards.metrics() | metrics
        if self.state:
            metrics["reward_baseline"] = -self._advantage.shift(self.state)
            name = "reward" if self._rewards.is_identity else "shaped_reward"
            self.state = self._advantage.next_state(self.state, mean_reward=totals.mean(name))
        if self._closes:
            name = "reward" if self._rewards.is_identity else "shaped_reward"
            mean, square = totals.mean(name), totals.mean(f"{name}_square")
            self.history.append(step, mean=mean, square=square, duals=self._rewards.duals)
        return metrics

    def restore(self, state: Sequence[float]) -> None:
        """Sets the state from a checkpoint; if it belongs to another estimator, warns and keeps the initial
        one."""
        if len(state) == len(self.state):
            self.state = tuple(state)
        else:
            log.warning("advantage differs from the checkpoint's: its state from earlier steps is lost")

    def _record_shaped(
        self, groups: Iterable[TrajectoryGroup], totals: StepTotals
    ) -> Iterator[TrajectoryGroup]:
        """Passes the groups on and adds their shaped rewards to the totals."""
        for group in groups:
            if not self._rewards.is_identity:
                rewards = [trajectory.reward for trajectory in group if not trajectory.is_greedy]
                totals.add("shaped_reward", sum(rewards), count=float(len(rewards)))
                squares = sum(reward * reward for reward in rewards)
                totals.add("shaped_reward_square", squares, count=float(len(rewards)))
            yield group

    def _group_advantages(self, group: TrajectoryGroup) -> Sequence[float | FloatArray]:
        assert isinstance(self._advantage, Advantage)
        advantages = group_advantages(self._advantage, group, turn_discount=self._turn_discount)
        if not self.state:
            return advantages
        shift = self._advantage.shift(self.state)
        return [advantage + shift for advantage in advantages]

    def _critic_advantages(
        self,
        positions: Sequence[Position],
        groups: Sequence[TrajectoryGroup],
        penalties: TokenPenalties,
    ) -> list[list[FloatArray]]:
        """[num_tokens] advantages of each sample by GAE; keeps the value targets for `learn`.

        The advantages of a sample are computed from the values of all its sampled tokens, but the critic is
        not trained on masked ones. Collective. `groups`: the samples with shaped rewards.
        """
        assert self._critic is not None
        trajectories = [trajectory for group in groups for trajectory in group]
        token_penalties = [penalty_S for of_group in penalties for penalty_S in of_group]
        values = self._critic.values(trajectories)
        credited = self._critic.settings.of_samples(
            [
                rewards_of_tokens(trajectory, penalty_S=penalty_S)
                for trajectory, penalty_S in zip(trajectories, token_penalties, strict=True)
            ],
            values,
            discounts=[discounts_of_tokens(t, turn_discount=self._turn_discount) for t in trajectories],
        )
        beyond = [self._masked(p, index) for p in positions for index in range(len(p.trajectories))]
        self._value_targets, advantages = [], []
        for trajectory, values_S, (advantages_S, targets_S), beyond_T in zip(
            trajectories, values, credited, beyond, strict=True
        ):
            learned = trajectory
            if beyond_T is not None:
                within_S = ~beyond_T[is_target(trajectory)]
                values_S, targets_S = values_S[within_S], targets_S[within_S]
                learned = as_context(trajectory, beyond_T)
            if len(targets_S) or beyond_T is None:
                self._value_targets += [
                    ValueTarget(trajectory=segment, values_S=of_values, targets_S=of_targets)
                    for (_, segment), of_values, of_targets in zip(
                        segments_of(learned),
                        split_targets(values_S, learned),
                        split_targets(targets_S, learned),
                        strict=True,
                    )
                ]
            advantages_T = np.zeros(trajectory.num_tokens)
            advantages_T[is_target(trajectory)] = advantages_S
            advantages.append(advantages_T)
        remaining = iter(advantages)
        return [[next(remaining) for _ in group] for group in groups]

    def _masked(self, position: Position, index: int) -> NDArray[np.bool_] | None:
        """bool [num_tokens] of a sample: sampled tokens that are masked; None if there are none."""
        return position.beyond(index) if self._masks_beyond else None

    def _samples(
        self, scored: Iterable[tuple[Position, TrajectoryGroup, Sequence[float | FloatArray]]]
    ) -> Iterator[_Scored]:
        """The whole samples of each position, with the tokens beyond the bound masked or marked."""
        for number, (position, group, advantages) in enumerate(scored):
            place = number * self._ranks.world_size + self._ranks.rank
            samples = []
            for index, (trajectory, advantage) in enumerate(zip(group, advantages, strict=True)):
                if trajectory.is_greedy:
                    continue
                beyond_T, counts = position.beyond(index), None
                if beyond_T is not None and self._masks_beyond:
                    length = num_targets(trajectory)
                    trajectory = as_context(trajectory, beyond_T)
                    counts = SampleCounts(length - num_targets(trajectory), length, 1, index)
                samples.append(
                    TrainingSample(
                        trajectory=trajectory,
                        advantage=advantage,
                        group=place,
                        index=index,
                        lag=position.lags[index],
                        beyond=None if self._masks_beyond else beyond_T,
                        counts=counts,
                    )
                )
            yield position, samples

    def _split(self, positions: Iterable[_Scored], totals: StepTotals) -> Iterator[list[TrainingSample]]:
        """The samples of each position, cut into segments."""
        for position, samples in positions:
            if self._closes:
                totals.parts.note(position, samples)
            yield [part for sample in samples for part in split_sample(sample)]

    def _rescaled(self, positions: list[_Scored]) -> list[_Scored]:
        """Applies the estimator's `rescale` to the whole step. Collective."""
        samples = [sample for _, of_position in positions for sample in of_position]
        tokens = [
            np.broadcast_to(s.advantage, (s.trajectory.num_tokens,))[is_target(s.trajectory)] for s in samples
        ]
        places = [np.full(len(a), s.group) for a, s in zip(tokens, samples, strict=True)]
        advantages_S = self._ranks.gather(torch.from_numpy(np.concatenate([np.zeros(0), *tokens])))
        groups_S = self._ranks.gather(
            torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *places]))
        )
        shift, factor = self._advantage.rescale(advantages_S=advantages_S.numpy(), groups_S=groups_S.numpy())
        return [
            (position, [replace(s, advantage=(s.advantage + shift) * factor) for s in of_position])
            for position, of_position in positions
        ]
