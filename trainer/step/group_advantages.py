"""Computes the advantages of one position of a step: of a whole group, or of parts of closed groups.

    shaped rewards -> advantages -> tokens beyond the staleness bound masked -> samples to train on

It needs only the position and what earlier steps have left (the estimator's state, the shapings' dual
variables, the history of rewards), so a position is processed as soon as it arrives. Rewards or advantages
that depend on the whole step are in `step_advantages.py`.

With `buffer.overdue=close` a group's samples may be trained on in several steps, and each has a baseline of
its own (`trainer/advantages/parts.py`). Masked tokens are context from here on, like a prompt. Greedy samples
serve as baselines and are then left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import EarlyMember
from trainer.advantages.base import Advantage, Estimator, FloatArray
from trainer.advantages.parts import RewardHistory, RewardStatistics, context_of
from trainer.advantages.process import rewards_of_steps
from trainer.advantages.turns import group_advantages
from trainer.batching.packing import num_targets
from trainer.batching.positions import Position, as_context
from trainer.batching.scope import Scope
from trainer.batching.training_sample import TrainingSample
from trainer.metrics.step_totals import OF_STEPS, StepTotals
from trainer.step.rewards import RewardTerms, TrajectoryGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPosition:
    """A position with the rewards that advantages are computed from, and the samples to train on."""

    position: Position
    shaped: TrajectoryGroup
    """Its trajectories with shaped and penalized rewards."""
    samples: Sequence[TrainingSample]
    """Whole samples, before they are cut into segments; without greedy ones."""


class GroupAdvantages:
    """`of_position` for each position of a step (or `StepAdvantages` for all of them), then `learn`."""

    def __init__(
        self,
        estimator: Estimator,
        rewards: RewardTerms,
        *,
        turn_discount: float = 1.0,
        closes: bool = False,
        masks_beyond: bool = True,
    ) -> None:
        """`turn_discount`: discount from one turn of a sample to the next. `closes`: `buffer.overdue=close`.

        `masks_beyond`: tokens beyond the staleness bound are masked; False: they are only marked.
        """
        self.estimator = estimator
        self.rewards = rewards
        self.turn_discount = turn_discount
        self.closes = closes
        self.masks_beyond = masks_beyond
        self.state = estimator.initial_state()
        """The estimator's state from earlier steps; checkpoints store it."""
        self.history = RewardHistory(decay=estimator.history_decay)
        """Running statistics of rewards, with `closes`; checkpoints store them."""
        self.step_histories = [
            RewardHistory(decay=estimator.history_decay)
            for _ in (OF_STEPS if closes and estimator.credits_steps else ())
        ]
        """Likewise of the rewards of steps and of their sums over a sample, for an estimator that compares
        steps."""

    @property
    def is_rescaled(self) -> bool:
        """True if the estimator's `rescale` applies: parts have none, but a critic's advantages are
        whitened."""
        are_parts = self.closes and isinstance(self.estimator, Advantage)
        return self.estimator.scope is Scope.BATCH and not are_parts

    @property
    def scope(self) -> Scope:
        """BATCH if rewards or advantages depend on the whole step."""
        return Scope.BATCH if self.is_rescaled else self.rewards.scope

    @property
    def needs_whole_groups(self) -> str:
        """The part of the method that would compare the parts of closed groups at one position, which a run
        that was changed to another `buffer.overdue` has left, as one group; empty: none does.

        An estimator without `of_part` raises its own error.
        """
        if shaping := self.rewards.shaping_of_whole_groups:
            return f"advantage.shaping {shaping}"
        if not isinstance(self.estimator, Advantage):
            return "" if self.estimator.takes_parts else f"advantage {type(self.estimator).__name__}"
        if self.estimator.compares_samples:
            if self.estimator.scope is Scope.BATCH:
                return f"advantage {type(self.estimator).__name__}"
            if self.rewards.scope is Scope.BATCH:
                return "kl.place=reward"
        return ""

    @property
    def extra_totals(self) -> tuple[str, ...]:
        """Names of a step's totals that only some methods have."""
        names: list[str] = []
        if not self.rewards.is_identity:
            names += ["shaped_reward", "shaped_reward_square"]
        if self.estimator.uses_greedy:
            names.append("greedy_reward")
        return tuple(names)

    def record(self, scored: ScoredPosition, totals: StepTotals) -> None:
        """Adds the rewards of steps to a step's totals, for an estimator that compares them."""
        if not self.estimator.credits_steps:
            return
        steps = [rewards_of_steps(trajectory) for trajectory in scored.position.trajectories]
        sums = [rewards_K.sum() for rewards_K in steps]
        for name, rewards in zip(OF_STEPS, (np.concatenate(steps), np.array(sums)), strict=True):
            totals.add(name, float(rewards.sum()), count=float(len(rewards)))
            totals.add(f"{name}_square", float(np.square(rewards).sum()), count=float(len(rewards)))

    def of_position(self, position: Position, *, step: int) -> ScoredPosition:
        """The position's samples with advantages, after `step` completed steps."""
        # A whole group that was recorded before the job's `buffer.overdue` was changed is one like any other.
        if position.origins is not None and (self.closes or position.is_of_parts):
            return self._of_parts(position, step=step)
        shaped = self.rewards.shape_group(position.trajectories)
        return self.scored(position, shaped, self.of_group(shaped))

    def of_group(self, shaped: TrajectoryGroup) -> Sequence[float | FloatArray]:
        """The advantages of a whole group: for each sample a number, or an array [num_tokens]."""
        assert isinstance(self.estimator, Advantage)
        advantages = group_advantages(self.estimator, shaped, turn_discount=self.turn_discount)
        if not self.state:
            return advantages
        shift = self.estimator.shift(self.state)
        return [advantage + shift for advantage in advantages]

    def scored(
        self, position: Position, shaped: TrajectoryGroup, advantages: Sequence[float | FloatArray]
    ) -> ScoredPosition:
        """The samples with these advantages. Tokens beyond the bound are masked or marked; samples that are
        left out are masked."""
        samples = []
        for index, (trajectory, advantage) in enumerate(zip(shaped, advantages, strict=True)):
            if trajectory.is_greedy:
                continue
            masked_T, num_masked = position.masked(index, masks_beyond=self.masks_beyond), 0
            if masked_T is not None:
                num_masked = num_targets(trajectory)
                trajectory = as_context(trajectory, masked_T)
                num_masked -= num_targets(trajectory)
            sample = TrainingSample(
                trajectory=trajectory,
                advantage=advantage,
                group=position.place,
                lag=position.lags[index],
                beyond=None if self.masks_beyond else position.beyond(index),
                num_masked=num_masked,
            )
            samples.append(sample)
        return ScoredPosition(position=position, shaped=shaped, samples=samples)

    def learn(self, totals: StepTotals, *, step: int) -> dict[str, float]:
        """Updates dual variables, the estimator's state and the history after a step, from its totals over
        all ranks; returns the metrics of those that exist."""
        name = "reward" if self.rewards.is_identity else "shaped_reward"
        if self.closes:
            self.history.begin(step, duals=self.rewards.duals)
        self.rewards.update_duals(mean_tokens=totals.mean("response_tokens"))
        metrics = self.rewards.metrics()
        if self.estimator.credits_steps:
            num_steps = totals.count("step_reward")
            metrics["steps_per_sample"] = num_steps / max(totals.count("step_reward_sum"), 1.0)
            if num_steps:
                metrics["step_reward_mean"] = totals.mean("step_reward")
            for history, of_steps in zip(self.step_histories, OF_STEPS, strict=False):
                if num_steps:
                    history.begin(step, duals=())
                    mean, square = totals.mean(of_steps), totals.mean(f"{of_steps}_square")
                    history.append(step, mean=mean, square=square, duals=())
        if self.state:
            metrics["reward_baseline"] = -self.estimator.shift(self.state)
            self.state = self.estimator.next_state(self.state, mean_reward=totals.mean(name))
        if self.closes:
            mean, square = totals.mean(name), totals.mean(f"{name}_square")
            self.history.append(step, mean=mean, square=square, duals=self.rewards.duals)
        return metrics

    def restore(self, state: Sequence[float]) -> None:
        """Sets the state from a checkpoint; if it belongs to another estimator, warns and keeps the initial
        one."""
        if len(state) == len(self.state):
            self.state = tuple(state)
        else:
            log.warning("advantage differs from the checkpoint's: its state from earlier steps is lost")

    def _of_parts(self, position: Position, *, step: int) -> ScoredPosition:
        """Compares each sample with the early members of its own group."""
        assert isinstance(self.estimator, Advantage) and position.origins is not None
        shaped: list[Trajectory] = []
        advantages: list[float | FloatArray] = []
        of_group: dict[int, tuple[RewardStatistics, list[EarlyMember]]] = {}
        self.history.begin(step, duals=self.rewards.duals)
        for history in self.step_histories:
            history.begin(step, duals=())
        for trajectory, origin in zip(position.trajectories, position.origins, strict=True):
            if origin.ticket_id not in of_group:
                running = self.history.as_of(origin.begin_step, step=step)
                members = self.rewards.shape_members(origin.early, duals=running.duals)
                of_group[origin.ticket_id] = running, members
            running, members = of_group[origin.ticket_id]
            (own,) = self.rewards.shape_group([trajectory], duals=running.duals)
            context = context_of(members, without=origin.sample_index, running=running)
            if self.step_histories:
                steps, sums = (h.as_of(origin.begin_step, step=step) for h in self.step_histories)
                context = replace(context, steps=steps, step_sums=sums)
            shaped.append(own)
            advantages.append(self.estimator.of_partial(own, context))
        return self.scored(position, shaped, advantages)
