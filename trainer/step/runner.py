"""One optimizer step, from groups of trajectories to updated weights.

`StepRunner.run` is the whole algorithm:

    groups -> advantages -> micro-batches -> [forward -> losses -> backward]* -> divide -> clip -> AdamW

Gradients of unnormalized sums accumulate while later groups are still being generated, and are divided once
by global counts, so the result depends neither on the cuts nor on the number of ranks nor on the order of
arrival. An objective of scope BATCH waits for the whole step and gets a pass without gradient first. All
ranks run equal numbers of micro-batches (see `batching/packing.py`).

Samples of several segments that are too long for one micro-batch come last (`long_samples.py`).

A group whose advantages are all zero counts in the normalizer but is not run, unless the objective needs it.

Shape suffix: S sampled tokens of a micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from areal_like.wire.messages.consumer import Group
from trainer.advantages.base import Estimator
from trainer.advantages.critic import Critic, ValueTarget
from trainer.advantages.implicit_rewards import ImplicitRewards, OutcomeTarget
from trainer.advantages.reward_shaping import Shaping
from trainer.batching.balancer import Balancer
from trainer.batching.packing import PackedBatch, Packer, in_lockstep, is_target, num_targets
from trainer.batching.positions import Position
from trainer.batching.routes import FaultKind
from trainer.batching.sampled_tokens import SampledTokens
from trainer.batching.scope import Scope
from trainer.batching.segments import cut, trained_segments
from trainer.batching.training_sample import MicroBatch, TrainingSample
from trainer.distributed.ranks import IncompleteStepError, Ranks
from trainer.gradients.base import Gradients
from trainer.metrics.lag import LagTally
from trainer.metrics.model_flops import ModelFlops, cost_of
from trainer.metrics.speed import PhaseTimer, StepSpeed
from trainer.metrics.step_totals import OF_BEYOND, StepTotals
from trainer.models.packed_model import PackedModel
from trainer.models.policy import BaseReference, Distributions, Policy
from trainer.objectives import Need, Objective, StepStats
from trainer.objectives.base import checked_losses
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.profiling.ranges import named_range, ranged
from trainer.step.group_advantages import GroupAdvantages, ScoredPosition
from trainer.step.long_samples import LongSample, PartLosses
from trainer.step.proximal import ProximalPolicy
from trainer.step.rewards import RewardTerms, TrajectoryGroup
from trainer.step.step_advantages import StepAdvantages, Targets
from trainer.step.teachers import Teachers

log = logging.getLogger(__name__)


class StepRunner:
    """Runs optimizer steps, one `run` each: idle -> [collecting -> accumulating]* -> updating -> idle."""

    def __init__(
        self,
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        objective: Objective,
        advantage: Estimator,
        normalizer: Normalizer,
        budget_tokens: int,
        reference: Policy | BaseReference | None = None,
        shapings: Sequence[Shaping] = (),
        kl: KlConfig | None = None,
        critic: Critic | None = None,
        prm: ImplicitRewards | None = None,
        proximal: ProximalPolicy | None = None,
        teachers: Teachers | None = None,
        turn_discount: float = 1.0,
        peak_tflops: float = 0.0,
        balances: bool = False,
        beyond: str = "",
    ) -> None:
        """`build_step_runner` builds one from a configuration. `policy` and `reference` are sharded.

        `budget_tokens`: most tokens of a micro-batch. `reference`: frozen model, for objectives that need
        one. `shapings`: reward shapings, in order. `kl`: penalty on rewards; None: none (one in the loss is
        part of the objective). `critic`, `prm`: for an advantage that needs one. `proximal`: for an objective
        with a rule for it. `teachers`: for an objective that needs their log-probs. `turn_discount`: between
        the turns of a sample. `peak_tflops`: peak of one rank's device, for MFU; 0: looked up by its name.
        `balances`: divide the sequences over the ranks by cost once a step is complete; no effect with an
        objective that runs one sequence at a time. `beyond`: `staleness.beyond`, with `buffer.overdue=close`;
        empty: another `buffer.overdue`. Raises ConfigError if the objective's reference or teachers, or the
        advantage's critic, are missing.
        """
        if Need.REF in objective.needs and reference is None:
            raise ConfigError(
                f"objective {objective.display_name} needs a reference model, and none is configured "
                "(kl.reference)"
            )
        if Need.TEACHER in objective.needs and teachers is None:
            raise ConfigError(
                f"objective {objective.display_name} needs the log-probs of a teacher, and none is "
                "configured (distill.teachers)"
            )
        if objective.proximal is not None and proximal is None:
            raise ConfigError(
                f"objective {objective.display_name} needs a proximal policy, and none was built"
            )
        policy.with_collision = Need.COLLISION in objective.needs
        policy.with_entropy_gradient = Need.ENTROPY in objective.needs
        self.policy = policy
        self.optimizer = optimizer
        self.critic = critic
        self.prm = prm
        self.proximal = proximal
        self.on_first_forward: Callable[[PackedBatch, Tensor], None] = lambda batch, logp_S: None
        """Called in each step with this rank's first micro-batch and its log-probs [S] under the weights at
        the start of the step."""
        self._is_first_forward = True
        self._has_warned_of_routes = False
        self._ranks = ranks
        self._objective = objective
        self._reference = reference
        self._teachers = teachers
        self._beyond = beyond
        self._normalizer = replace(normalizer, name=objective.normalizer or normalizer.name)
        self._gradients = objective.gradients(policy, ranks)
        self._objective_state = objective.initial_state()
        self.rewards = RewardTerms(shapings, ranks, kl=kl, reference=reference, budget_tokens=budget_tokens)
        self.advantages = GroupAdvantages(
            objective.advantage or advantage,
            self.rewards,
            turn_discount=turn_discount,
            closes=bool(beyond),
            masks_beyond=beyond in ("", "mask"),
        )
        self._kl_control = self.rewards.kl_control or objective.kl_control
        self._step_advantages: StepAdvantages | None = None
        if self.advantages.scope is Scope.BATCH:
            self._step_advantages = StepAdvantages(self.advantages, ranks, critic=critic, prm=prm)
        others: list[PackedModel] = []
        if reference is not None and Need.REF in objective.needs:
            others.append(reference.policy if isinstance(reference, BaseReference) else reference)
        if proximal is not None:
            others.append(proximal.model)
        judges: list[PackedModel] = []
        if teachers is not None and Need.TEACHER in objective.needs:
            judges += teachers.models.values()
        self._shares_prefixes = (
            objective.shares_prefixes
            and not objective.late_coefficients
            and all(model.shares_prefixes for model in (policy, *others, *judges))
        )
        self._routes_shape = None if policy.replay is None else policy.replay.shape
        limits: dict[str, Any] = {
            "budget_tokens": budget_tokens,
            "whole_groups": objective.whole_groups,
            "shares_prefixes": self._shares_prefixes,
        }
        self._cutter = Packer(budget_tokens=budget_tokens, shares_prefixes=self._shares_prefixes)
        is_single = objective.one_sequence_per_microbatch
        self._packer: Packer | Balancer
        if balances and not is_single:
            route_bytes = 0 if self._routes_shape is None else self._routes_shape.bytes_per_token
            cost = cost_of(ModelFlops.of(policy.model))
            self._packer = Balancer(ranks, cost=cost, route_bytes=route_bytes, **limits)
        else:
            self._packer = Packer(one_sequence_per_microbatch=is_single, **limits)
        self._speed = StepSpeed(policy, ranks, others=others, one_of=judges, peak_tflops=peak_tflops)

    def run(
        self,
        groups: Iterable[TrajectoryGroup | Position],
        *,
        step: int,
        num_groups: int | None = None,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Runs one optimizer step after `step` completed steps. Collective.

        Returns the step's metrics (see `_metrics`), equal on all ranks except for times.

        `groups`: this rank's share in recorded order (`Ranks.share_of`). It may block until the next group
        arrives; that time is reported as `wait_s`. Its exceptions propagate, and no update is made.
        `num_groups`: number of groups that all ranks together must have seen; with fewer, every rank raises
        IncompleteStepError and makes no update. In groups that are not a `Position` a version is the number
        of steps before it.
        `is_abandoned`: called between micro-batches; once it is true on any rank, every rank raises
        IncompleteStepError, and weights, moments and all other state are as before the step.
        """
        timer = self._speed.begin(step)
        totals = StepTotals((*self.advantages.extra_totals, *(OF_BEYOND if self._beyond else ())))
        self._is_first_forward, self._has_warned_of_routes = True, False
        self.policy.zero_grad()  # an abandoned step may have left gradients
        with self._ranks.abandonable(is_abandoned):
            positions = self._positions(timer.timed("wait_s", groups), totals, step=step)
            # One position at a time as they arrive, unless rewards or advantages depend on the whole step.
            scored, targets = self._scored(positions, timer, step=step)
            microbatches: Iterable[MicroBatch] = self._packer.microbatches(self._trained(scored, totals))
            del scored  # its samples are freed once they are in micro-batches
            with self._gradients as gradients:
                if self._objective.scope is Scope.BATCH:
                    microbatches = list(microbatches)  # waits for the last group
                    observed = self._observations(microbatches, totals, timer)
                    long_samples = self._long_samples(totals, timer)
                    stats = of_losses = self._summarize(observed, long_samples)
                    self._accumulate(gradients, microbatches, stats, totals, timer)
                else:
                    of_losses = {}
                    observed = self._accumulate(gradients, microbatches, of_losses, totals, timer)
                    long_samples = self._long_samples(totals, timer)
                    stats = self._summarize(observed, long_samples)  # only for `lr_scale`
                self._accumulate_long(gradients, long_samples, of_losses, totals, timer)
                with timer.span("reduce_s"):
                    totals.add_all(gradients.finish())
        with timer.span("reduce_s"):
            totals.reduce(self._ranks)
        if num_groups is not None and totals.total("num_groups") < num_groups:
            raise IncompleteStepError(
                f"step {step} ended with {totals.total('num_groups'):.0f} of {num_groups} groups"
            )
        with timer.span("update_s"):
            update = self._update(stats, targets, totals, step=step)
        return self._metrics(update, totals, timer)

    def _positions(
        self, groups: Iterable[TrajectoryGroup | Position], totals: StepTotals, *, step: int
    ) -> Iterator[Position]:
        """The positions with their places in the step, and with the routes that the policy replays.

        Raises ConfigError if one has parts of closed groups and the method needs whole ones: the run was
        changed from `buffer.overdue=close`, and the ledger still had them.
        """
        needs = self.advantages.needs_whole_groups
        if self._needs_whole_groups:
            needs = f"objective {self._objective.display_name}"
        for number, group in enumerate(groups):
            position = group if isinstance(group, Position) else Position.plain(group, step=step)
            if self._beyond and position.origins is None:
                position = position.as_whole_group()
            if needs and position.is_of_parts and not self._beyond:
                raise ConfigError(
                    f"{needs} cannot train on parts of groups, and this step has some, which were recorded "
                    "with buffer.overdue=close: continue with buffer.overdue=close and the method that the "
                    "run had, or start a new run from a checkpoint (model.path=...)"
                )
            place = number * self._ranks.num_data + self._ranks.data_rank
            yield self._routed(replace(position, place=place), totals, step=step)

    @property
    def _needs_whole_groups(self) -> bool:
        """True if the objective needs all samples of a group."""
        return self._objective.whole_groups or not self._objective.takes_parts

    def _routed(self, position: Position, totals: StepTotals, *, step: int) -> Position:
        """The position, without the samples whose routes cannot be replayed; counts them."""
        position, faults = position.routed(self._routes_shape, whole_groups=self._needs_whole_groups)
        if not faults:
            return position
        for fault in faults.values():
            totals.add(fault.kind, 1.0)
        for index in position.left_out:
            totals.add("unrouted_tokens", num_targets(position.trajectories[index]))
        if not self._has_warned_of_routes:
            self._has_warned_of_routes = True
            index, fault = min(faults.items())
            log.warning(
                "step %d: sample %d of position %d is not trained on, because its routes cannot be replayed "
                "(model.router_replay): %s. metrics.jsonl counts such samples: %s",
                step,
                index,
                position.place,
                fault.text,
                ", ".join(FaultKind),
            )
        return position

    def _scored(
        self, positions: Iterable[Position], timer: PhaseTimer, *, step: int
    ) -> tuple[Iterable[ScoredPosition], Targets]:
        """(the positions with advantages, the targets of critic or reward model, if there is one)."""
        if self._step_advantages is None:
            return (self.advantages.of_position(position, step=step) for position in positions), []
        collected = list(positions)
        with timer.span("compute_s"):
            return self._step_advantages.of_positions(collected)

    def _trained(
        self, scored: Iterable[ScoredPosition], totals: StepTotals
    ) -> Iterator[list[TrainingSample]]:
        """Yields the samples of each position that need a gradient. The others are only counted."""
        for each in scored:
            shaped = () if self.rewards.is_identity else each.shaped
            totals.recorded(each.position.trajectories, shaped=shaped)
            self.advantages.record(each, totals)
            if self._beyond:
                totals.parts.note(each.position, each.samples)
            samples = [trained_segments(sample) for sample in each.samples]
            is_zero = all(not np.any(sample.advantage) for sample in samples)
            totals.add("zero_advantage_groups", float(is_zero))
            skipped = samples
            if not (is_zero and self._objective.skips_zero_advantage):
                skipped = [s for s in samples if s.num_masked and not is_target(s.trajectory).any()]
            totals.skipped(skipped)
            yield [sample for sample in samples if sample not in skipped]

    def _observations(
        self, microbatches: Iterable[MicroBatch], totals: StepTotals, timer: PhaseTimer
    ) -> list[dict[str, Tensor]]:
        """The objective's vectors of each micro-batch, from a pass without gradient. Collective."""
        with torch.no_grad(), timer.span("compute_s"):
            return [
                self._observe(self._within(self._forward(batch, totals, live=live)), live=live)
                for batch, live in in_lockstep(
                    microbatches, self._ranks, shares_prefixes=self._shares_prefixes
                )
            ]

    def _accumulate(
        self,
        gradients: Gradients,
        microbatches: Iterable[MicroBatch],
        stats: StepStats,
        totals: StepTotals,
        timer: PhaseTimer,
    ) -> list[dict[str, Tensor]]:
        """Forward -> losses -> backward of every micro-batch. Collective.

        Returns the vectors of an objective of scope GROUP.
        """
        observed: list[dict[str, Tensor]] = []
        for batch, live in in_lockstep(microbatches, self._ranks, shares_prefixes=self._shares_prefixes):
            with timer.span("compute_s"):
                tokens = self._within(self._forward(batch, totals, live=live))
                with named_range("objective"):
                    losses = checked_losses(self._objective, tokens, stats)
                    loss_S, *counted = self._normalizer.weigh(losses, tokens)
                # Multiplied by zero: a rank without work still runs a dummy forward and backward, which keeps
                # FSDP2's collectives in step with the other ranks.
                with named_range("backward"):
                    gradients.add(loss_S if live else loss_S * 0.0, tokens=tokens, batch=batch)
                totals.trained(batch, live=live)
                totals.observe(tokens, losses, counted=counted, live=live)
                if self._objective.scope is Scope.GROUP:
                    observed.append(self._observe(tokens, live=live))
        return observed

    def _long_samples(self, totals: StepTotals, timer: PhaseTimer) -> list[LongSample]:
        """The samples that are too long for a micro-batch, from a pass without gradient. Collective.

        If another rank has some, one that has none returns a dummy.
        """
        samples = [cut(sample, self._cutter) for sample in self._packer.set_aside]
        microbatches = [(part,) for parts in samples for part in parts]
        found: list[tuple[SampledTokens, bool]] = []
        for batch, live in in_lockstep(microbatches, self._ranks, shares_prefixes=self._shares_prefixes):
            with torch.no_grad(), timer.span("compute_s"):
                found.append((self._forward(batch, totals, live=live), live))
        own, dummies = ([tokens for tokens, live in found if live is wanted] for wanted in (True, False))
        remaining = iter(own)
        return [
            LongSample(parts=parts, tokens=SampledTokens.of_parts([next(remaining) for _ in parts]))
            for parts in samples
        ] + [LongSample(parts=(), tokens=tokens) for tokens in dummies[:1]]

    def _accumulate_long(
        self,
        gradients: Gradients,
        long_samples: Sequence[LongSample],
        stats: StepStats,
        totals: StepTotals,
        timer: PhaseTimer,
    ) -> None:
        """Losses of each whole sample -> forward and backward of its parts. Collective."""
        if not long_samples:  # on no rank
            return
        of_parts: list[PartLosses] = []
        with timer.span("compute_s"):
            for sample in long_samples:
                leaves = sample.with_leaves(entropy=Need.ENTROPY in self._objective.needs)
                tokens = self._within(leaves)
                losses = checked_losses(self._objective, tokens, stats)
                loss_S, *counted = self._normalizer.weigh(losses, tokens)
                totals.observe(tokens, losses, counted=counted, live=sample.is_live)
                if sample.is_live:
                    of_parts += sample.losses_of_parts(loss_S, leaves=leaves, tokens=tokens)
        microbatches = [(part,) for sample in long_samples for part in sample.parts]
        remaining = iter(of_parts)
        for batch, live in in_lockstep(microbatches, self._ranks, shares_prefixes=self._shares_prefixes):
            with timer.span("compute_s"):
                tokens = self._forward(batch, totals, live=live)
                loss_S = tokens.logp_S * 0.0
                if live:
                    of_part = next(remaining)
                    tokens, loss_S = of_part.tokens, of_part.of(tokens)
                gradients.add(loss_S, tokens=tokens, batch=batch)
                totals.trained(batch, live=live)

    @ranged("forward")
    def _forward(self, batch: PackedBatch, totals: StepTotals, *, live: bool) -> SampledTokens:
        """Log-probs of the micro-batch's sampled tokens, with the inputs that the objective needs.

        Collective under FSDP2.
        """
        needs = self._objective.needs
        prox_logp_S = ref_logp_S = teacher_logp_S = None
        teacher: Distributions | None = None
        # Before the policy's forward: with an adapter these are forwards of the same model.
        with torch.no_grad():
            if Need.PROX in needs and self.proximal is not None:
                prox_logp_S = self.proximal(batch).logprobs_S
            if Need.REF in needs:
                assert self._reference is not None
                ref_logp_S = self._reference(batch).logprobs_S
            if Need.TEACHER in needs:
                assert self._teachers is not None
                if Need.REVERSE_KL in needs:
                    teacher_logp_S, teacher = self._teachers.distributions(batch)
                else:
                    teacher_logp_S = self._teachers(batch)
        output = self.policy(batch, teacher)
        if Need.PROX in needs and self.proximal is None:
            # One optimizer step per batch: the weights at the start of the step are the current ones.
            prox_logp_S = output.logprobs_S.detach()
        totals.add("model_flops", self._speed.flops_of(batch) if live else 0.0)
        if self.policy.replay is not None:
            num_other, num_choices = self.policy.replay.disagreement()
            counts = live or batch.context is not None  # the rank's own rows of a micro-batch
            totals.add(
                "router_disagreement", num_other if counts else 0.0, count=num_choices if counts else 0.0
            )
        if self._is_first_forward:
            self._is_first_forward = False
            self.on_first_forward(batch, output.logprobs_S)
        tokens = SampledTokens.of(
            batch,
            *output,
            prox_logp_S=prox_logp_S,
            ref_logp_S=ref_logp_S,
            teacher_logp_S=teacher_logp_S,
        )
        if live and tokens.beyond_S is not None and torch.is_grad_enabled():  # not in a pass for statistics
            totals.observe_beyond(tokens)
        return tokens

    def _within(self, tokens: SampledTokens) -> SampledTokens:
        """With `staleness.beyond=ratio`: without the tokens beyond the bound that have an extreme ratio."""
        if self._beyond != "ratio" or tokens.beyond_S is None:
            return tokens
        return tokens.only(~tokens.is_extreme_S)

    @torch.no_grad()
    def _observe(self, tokens: SampledTokens, *, live: bool) -> dict[str, Tensor]:
        """The objective's vectors of these tokens, by name; for a dummy (not `live`) they have length 0."""
        observed = self._objective.observe(tokens)
        return observed if live else {name: vector[:0] for name, vector in observed.items()}

    def _summarize(
        self, observed: Sequence[dict[str, Tensor]], long_samples: Sequence[LongSample]
    ) -> StepStats:
        """The objective's statistics of the step, from its vectors in all micro-batches of all ranks.

        Collective if it observes anything.
        """
        of_long = [self._observe(self._within(each.tokens), live=each.is_live) for each in long_samples]
        observed = [*observed, *of_long]
        names = sorted(observed[0]) if observed else []
        gathered = {
            name: self._ranks.gather(torch.cat([vectors[name].double().cpu() for vectors in observed]))
            for name in names
        }
        return self._objective.summarize(gathered) if gathered else {}

    def _update(
        self, stats: StepStats, targets: Targets, totals: StepTotals, *, step: int
    ) -> dict[str, float]:
        """Divide by global counts -> clip -> AdamW; then critic or reward model, proximal policy, and the
        state of rewards and advantages. Collective. Returns metrics of the update."""
        divisor = self._normalizer.divisor(
            num_tokens=totals.total("counted_tokens"), num_seqs=totals.total("counted_seqs")
        )
        if self._objective_state:
            self._objective_state = self._objective.next_state(self._objective_state, stats)
            stats = {**stats, "state": torch.tensor(self._objective_state, dtype=torch.float64)}
        lr_scale = self._objective.lr_scale(stats)
        is_critic_warmup = self.critic is not None and step < self.critic.settings.critic_warmup_steps
        lr = 0.0 if is_critic_warmup else self.optimizer.learning_rate(step) * lr_scale
        with named_range("optimizer"):
            grad_norm = self.optimizer.step(divisor=divisor, lr=lr)
            if self.proximal is not None:
                self.proximal.follow(step)
        metrics: dict[str, float] = {}
        if self.critic is not None:
            metrics = self.critic.learn(cast(list[ValueTarget], targets), step=step)
        elif self.prm is not None:
            metrics = self.prm.learn(cast(list[OutcomeTarget], targets), step=step)
        metrics |= self.advantages.learn(totals, step=step) | self._objective.step_metrics(stats)
        metrics |= self._adapt_kl(totals)
        loss = totals.total("loss") / divisor
        return metrics | {"loss": loss, "grad_norm": grad_norm, "lr": lr, "lr_scale": lr_scale}

    def _adapt_kl(self, totals: StepTotals) -> dict[str, float]:
        """Adapts the coefficient of a KL penalty; returns the step's coefficient and KL, if there is one."""
        control = self._kl_control
        if control is None:
            return {}
        is_in_reward = control is self.rewards.kl_control
        kl = self.rewards.mean_kl if is_in_reward else totals.mean("kl_ref")
        if not is_in_reward and not totals.count("kl_ref"):
            kl = math.nan
        metrics = {"kl_coef": control.coef} | ({"kl_ref": kl} if math.isfinite(kl) else {})
        control.update(kl)
        return metrics

    def _metrics(self, update: dict[str, float], totals: StepTotals, timer: PhaseTimer) -> dict[str, Any]:
        """The metrics of the step that just ended. Collective.

        loss, grad_norm, lr, lr_scale, lr_base, those of the samples (`StepTotals`), num_groups,
        zero_advantage_groups, num_tokens (of the sequences run), shared_share (of them, not computed),
        num_microbatches (of all ranks), balance (see `MicrobatchPlan.busy_share`), ess_ratio and at other
        levels, ess_weights (at the objective's), log_w_mean, log_w_std, kl_k3, entropy, clipped_fraction,
        kept_fraction, mismatch_abs (mean |log(pi / mu)| of tokens that the current weights sampled, if there
        are any: the numerical mismatch of engine and trainer), the objective's own, shaped_reward (where
        advantages are not computed from `reward`), shaping_dual_I (of a shaping with a dual variable),
        reward_baseline (of advantage=running), rho_ref (of vcpo, if it is measured), the critic's, wait_s,
        compute_s, reduce_s, update_s, step_s, and those of `StepSpeed`. With router replay
        router_disagreement (share of the recorded choices of experts that the present routers would not have
        made) and those of `StepTotals.route_metrics` (samples that are left out). With buffer.overdue=close
        also those of `PartTable` (tokens beyond the staleness bound, early and late samples, lags by each
        sample's oldest trained token) and, if such tokens are not all masked, beyond_log_ratio_abs and
        beyond_ess_ratio: masked ones have no log-probs, because their logits are not computed.
        """
        metrics = totals.metrics() | update | {"lr_base": self.optimizer.lr}
        if self._beyond:
            metrics |= totals.part_metrics(self._ranks, beyond=self._beyond)
        if self._routes_shape is not None:
            metrics |= totals.route_metrics()
        metrics["ess_weights"] = totals.ess_ratios()[self._objective.ess_level]
        if isinstance(self._packer, Balancer):
            metrics["balance"] = self._packer.busy_share
        num_tokens, flops = totals.total("num_tokens"), totals.total("model_flops")
        return metrics | self._speed.metrics(timer, num_tokens=num_tokens, flops=flops)

    def run_served(
        self,
        groups: Iterable[Group],
        *,
        step: int,
        num_groups: int,
        max_staleness: int,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Calls `run` on groups as the buffer serves them, and adds the metrics of their lags. Collective.

        Asserts that no lag is above `max_staleness` or the bound of its group, or with `buffer.overdue=close`
        masks the tokens of a larger one than the group states.
        """
        if self._beyond:
            positions = (Position.of(group) for group in groups)
            return self.run(positions, step=step, num_groups=num_groups, is_abandoned=is_abandoned)
        lags = LagTally(max_staleness)
        metrics = self.run(
            (lags.counted(group) for group in groups),
            step=step,
            num_groups=num_groups,
            is_abandoned=is_abandoned,
        )
        return metrics | lags.reduced(self._ranks)

    @property
    def saved(self) -> dict[str, Any]:
        """The models and optimizers of a checkpoint, by the arguments of `Checkpoints.save` and `load`."""
        return {
            "policy": self.policy,
            "optimizer": self.optimizer,
            "critic": self.critic,
            "prm": self.prm,
            "proximal": self.proximal,
        }

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores in addition to weights and moments, for `restore`; JSON."""
        state: dict[str, Any] = {
            "shaping_duals": self.rewards.duals,
            "advantage_state": list(self.advantages.state),
        }
        if self._objective_state:
            state["objective_state"] = list(self._objective_state)
        if self._kl_control is not None and self._kl_control.is_adaptive:
            state["kl_coef"] = self._kl_control.coef
        if history := self.advantages.history.dump():
            state["reward_history"] = history
        if any(of_steps := [history.dump() for history in self.advantages.step_histories]):
            state["step_histories"] = of_steps
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`; a checkpoint of an earlier version has only `shaping_duals`, and
        one of a run without `buffer.overdue=close` has no `reward_history`, and one of an objective without a
        state no `objective_state`."""
        self.rewards.restore(state["shaping_duals"])
        self.advantages.restore(state.get("advantage_state", []))
        self.advantages.history.restore(state.get("reward_history", []), num_duals=len(self.rewards.duals))
        of_steps = dict(enumerate(state.get("step_histories", [])))
        for index, history in enumerate(self.advantages.step_histories):
            history.restore(of_steps.get(index, []), num_duals=0)
        if self._kl_control is not None and self._kl_control.is_adaptive:
            self._kl_control.coef = state.get("kl_coef", self._kl_control.settings.coef)
        if len(kept := state.get("objective_state", [])) == len(self._objective_state):
            self._objective_state = tuple(kept)  # else another objective's: this one begins to measure
