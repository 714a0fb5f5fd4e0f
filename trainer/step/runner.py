"""One optimizer step, from groups as they come to updated weights.

    groups -> advantages -> packer -> micro-batches -> forward, losses, backward -> ... -> scale once -> clip -> AdamW

Gradients of unnormalised sums are accumulated while later groups are still being generated, and divided once by global counts, so
that neither cuts nor ranks nor the order of arrival change the result. An objective of scope BATCH waits for the whole step and
gets a pass without gradient first. Ranks run equal numbers of micro-batches, because FSDP's collectives have to match: before each
one they ask whether anybody has any left, and a rank that has none runs a dummy of weight zero.

A group whose advantages are all zero counts in the normaliser and is not run, unless the objective needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from areal_like.config import Config, KlConfig
from areal_like.errors import ArealError, ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import Estimator
from trainer.advantages.critic import Critic
from trainer.advantages.gae import Gae
from trainer.advantages.reward_shaping import Shaping
from trainer.batching.microbatches import matched
from trainer.batching.packing import MicroBatch, PackedBatch, Packer, Sample, num_targets
from trainer.batching.scope import Scope
from trainer.distributed.ranks import Ranks
from trainer.gradients.base import Gradients
from trainer.metrics.phase_timer import PhaseTimer
from trainer.metrics.step_totals import StepTotals
from trainer.models.policy import Policy, build_policy
from trainer.objectives import Need, Objective, SampledTokens, StepStats
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.recipe import Recipe
from trainer.step.reward_terms import Group, Rewards
from trainer.step.scoring import AdvantagePipeline, Lags

log = logging.getLogger(__name__)


class IncompleteStepError(ArealError):
    """The groups of a step ended early on some rank; no update was made anywhere."""


class StepRunner:
    """Owns what a step needs; `run` does one.

    idle -> run(groups) [collecting -> accumulating]* -> updating -> idle
    """

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
        reference: Policy | None = None,
        shapings: Sequence[Shaping] = (),
        kl: KlConfig | None = None,
        critic: Critic | None = None,
    ) -> None:
        """`budget_tokens`: of one micro-batch. `reference`: frozen, sharded like the policy, for objectives that need one.

        `shapings`: of the rewards, in order. `kl`: the penalty to be taken off rewards; None: none (one in the loss is the objective's).
        `critic`: for an advantage that needs one. Raises ConfigError when the objective needs a reference, or the advantage a critic, and
        there is none.
        """
        if Need.REF in objective.needs and reference is None:
            raise ConfigError(
                f"objective {type(objective).__name__} needs a reference model, and none is configured"
            )
        for setting, wanted, prescribed in (
            ("trainer.normalizer", normalizer.name, objective.normalizer),
            (
                "advantage",
                type(advantage).__name__,
                objective.advantage and type(objective.advantage).__name__,
            ),
        ):
            if prescribed not in (None, wanted):
                log.warning(
                    "%s=%s is ignored: %s prescribes %s",
                    setting,
                    wanted,
                    type(objective).__name__,
                    prescribed,
                )
        policy.with_collision = Need.COLLISION in objective.needs
        policy.with_entropy_gradient = Need.ENTROPY in objective.needs
        self.policy = policy
        self.optimizer = optimizer
        self._ranks = ranks
        self._objective = objective
        self._gradients = objective.gradients(policy, ranks)
        self._normalizer = replace(normalizer, name=objective.normalizer or normalizer.name)
        self._budget_tokens = budget_tokens
        self._reference = reference
        self.rewards = Rewards(shapings, ranks, kl=kl, reference=reference, budget_tokens=budget_tokens)
        self.critic = critic
        self.appraiser = AdvantagePipeline(
            objective.advantage or advantage, self.rewards, ranks, critic=critic
        )

    @classmethod
    def of(cls, config: Config, policy: Policy, ranks: Ranks, *, initial: str = "") -> StepRunner:
        """The runner that a configuration describes, with a fresh optimizer. `policy` is sharded.

        `initial`: the model that the run began with, which is the reference model where one is needed and none is named, and the critic's
        beginning.
        """
        trainer, recipe = config.trainer, Recipe.of(config)
        reference = None
        if recipe.needs_reference and (config.kl.reference or initial):
            reference = build_policy(config, config.kl.reference or initial, ranks).requires_grad_(False)
        critic = None
        if isinstance(recipe.estimator, Gae) and initial:
            critic = Critic.of(config, recipe.estimator, ranks, initial=initial)
        return cls(
            policy,
            ShardedAdamW.of(trainer, policy, ranks, lr=trainer.lr),
            ranks,
            objective=recipe.objective,
            advantage=recipe.advantage,
            normalizer=Normalizer(name=trainer.normalizer, max_tokens=config.sampling.max_new_tokens),
            budget_tokens=trainer.tokens_per_microbatch,
            reference=reference,
            shapings=recipe.shapings,
            kl=recipe.kl,
            critic=critic,
        )

    def run(
        self,
        groups: Iterable[Group],
        *,
        step: int,
        num_groups: int | None = None,
        lags: Callable[[Trajectory], Lags] | None = None,
    ) -> dict[str, float]:
        """One optimizer step after `step` completed ones. Collective. Returns its metrics, equal on all ranks but for seconds.

        `groups`: this rank's share in recorded order (of all groups of the step, j goes to rank j mod world size). It may block
        until the next group is there; that time is reported as `wait_s`. What it raises passes through, with no update done.
        `num_groups`: how many all ranks together must have seen; else IncompleteStepError on every rank, with no update done.
        `lags`: of each token of a trajectory, in optimizer steps; None: versions are numbers of steps.

        Metrics: loss, grad_norm, lr, lr_scale, reward, reward_std, response_tokens, prompt_tokens, truncated_fraction, num_groups,
        zero_advantage_groups, num_sequences, num_tokens (packed and run), num_microbatches (of all ranks), ess_ratio, log_w_mean,
        log_w_std, kl_k3, entropy, clipped_fraction, kept_fraction, mismatch_abs (mean |log pi/mu| of tokens that the current weights
        sampled, if any: the numerical mismatch of engine and trainer), what else the objective reports, shaped_reward (where advantages
        are not made of `reward`), shaping_dual_I (of a shaping that learns one), wait_s, compute_s, reduce_s, update_s, step_s.
        """
        clock, totals = PhaseTimer(_PHASES), StepTotals(self.appraiser.extra_totals)
        self.policy.zero_grad()  # a step that was given up may have left some
        lags = lags or (lambda trajectory: np.maximum(step - trajectory.versions.astype(np.int64), 0))
        samples = self.appraiser.appraise(clock.timed("wait_s", groups), totals, clock, lags=lags)
        stats: StepStats = {}
        with self._gradients as gradients:
            if self._objective.scope is Scope.BATCH:
                packs = list(self._cut(samples, totals))
                with torch.no_grad(), clock.span("compute_s"):
                    observed = [
                        self._observed(batch, live) for batch, live in matched(iter(packs), self._ranks)
                    ]
                stats = self._summarize(observed)
                self._accumulate(gradients, iter(packs), stats, totals, clock)
            else:
                seen = self._accumulate(gradients, self._cut(samples, totals), stats, totals, clock)
                stats = self._summarize(seen)
            with clock.span("reduce_s"):
                for name, (total, count) in gradients.finish().items():
                    totals.add(name, total, count=count)
        with clock.span("reduce_s"):
            totals.reduce(self._ranks)
        if num_groups is not None and totals.total("num_groups") < num_groups:
            raise IncompleteStepError(
                f"step {step} ended with {totals.total('num_groups'):.0f} of {num_groups} groups"
            )
        lr_scale = self._objective.lr_scale(stats)
        lr = 0.0 if self.appraiser.policy_waits(step) else self.optimizer.learning_rate(step) * lr_scale
        divisor = self._normalizer.divisor(
            num_tokens=totals.total("counted_tokens"), num_seqs=totals.total("counted_seqs")
        )
        with clock.span("update_s"):
            grad_norm = self.optimizer.step(divisor=divisor, lr=lr)
            lessons = self.appraiser.learn(step)
        self.rewards.advance(mean_tokens=totals.mean("response_tokens"))
        metrics = totals.metrics()
        metrics.update(self.rewards.metrics() | lessons)
        metrics.update(loss=totals.total("loss") / divisor, grad_norm=grad_norm, lr=lr, lr_scale=lr_scale)
        return {**metrics, **clock.seconds()}

    def _cut(self, groups: Iterable[list[Sample]], totals: StepTotals) -> Iterator[MicroBatch]:
        """Micro-batches as they become determined; groups without a gradient are only counted."""
        objective = self._objective
        packer = Packer(
            budget_tokens=self._budget_tokens,
            whole_groups=objective.whole_groups,
            one_sequence_per_microbatch=objective.one_sequence_per_microbatch,
        )
        for group in groups:
            idle = all(not np.any(sample.advantage) for sample in group)
            totals.add("zero_advantage_groups", float(idle))
            if idle and objective.skips_zero_advantage:
                totals.add("counted_tokens", float(sum(num_targets(sample.trajectory) for sample in group)))
                totals.add("counted_seqs", float(len(group)))
            else:
                yield from packer.add(group)
        yield from packer.flush()

    def _accumulate(
        self,
        gradients: Gradients,
        packs: Iterator[MicroBatch],
        stats: StepStats,
        totals: StepTotals,
        clock: PhaseTimer,
    ) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch; returns what the objective observed (scope GROUP)."""
        observed = []
        for batch, live in matched(packs, self._ranks):
            with clock.span("compute_s"):
                tokens = self._sampled(batch)
                losses = self._objective.losses(tokens, stats)
                loss_S, num_tokens, num_seqs = self._normalizer.weigh(losses, tokens)
                if not live:
                    loss_S = loss_S * 0.0
                gradients.add(loss_S, tokens=tokens, batch=batch)
                with torch.no_grad():
                    totals.observe(tokens, losses, live=live)
                    totals.add("counted_tokens", num_tokens if live else 0.0)
                    totals.add("counted_seqs", num_seqs if live else 0.0)
                    totals.add("num_tokens", float(batch.num_tokens if live else 0))
                    totals.add("num_microbatches", float(live))
                    if self._objective.scope is Scope.GROUP:
                        observed.append(_only(self._objective.observe(tokens), live=live))
        return observed

    def _observed(self, batch: PackedBatch, live: bool) -> dict[str, Tensor]:
        return _only(self._objective.observe(self._sampled(batch)), live=live)

    def _summarize(self, observed: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """StepStats from all micro-batches of all ranks. Collective if the objective observes anything."""
        names = sorted(observed[0]) if observed else []
        whole = {
            name: self._ranks.gather(torch.cat([o[name].double().cpu() for o in observed])) for name in names
        }
        return self._objective.summarize(whole) if whole else {}

    def _sampled(self, batch: PackedBatch) -> SampledTokens:
        """Runs the policy and collects what an objective may see."""
        logp_S, entropy_S, collision_S = self.policy(batch)
        ref_logp_S = None
        if Need.REF in self._objective.needs:
            assert self._reference is not None
            with torch.no_grad():
                ref_logp_S = self._reference(batch).logprobs_S
        at = batch.sampled_S
        segment_S = batch.segments_T[at]
        ones_S = torch.ones_like(entropy_S)
        return SampledTokens(
            logp_S=logp_S,
            behavior_logp_S=batch.behavior_logp_T[at].to(logp_S.dtype),
            advantage_S=batch.advantages_T[at].to(logp_S.dtype),
            segment_S=segment_S,
            length_N=ones_S.new_zeros(batch.num_sequences).index_add(0, segment_S, ones_S),
            reward_N=batch.rewards_N.to(logp_S.dtype),
            group_N=batch.groups_N,
            truncated_N=batch.truncated_N,
            version_S=batch.versions_T[at],
            lag_S=batch.lags_T[at].to(logp_S.dtype),
            entropy_S=entropy_S,
            prox_logp_S=logp_S.detach() if Need.PROX in self._objective.needs else None,
            ref_logp_S=ref_logp_S,
            collision_S=collision_S,
        )


def _only(vectors: dict[str, Tensor], *, live: bool) -> dict[str, Tensor]:
    return vectors if live else {name: vector[:0] for name, vector in vectors.items()}


_PHASES = ("wait_s", "compute_s", "reduce_s", "update_s")
