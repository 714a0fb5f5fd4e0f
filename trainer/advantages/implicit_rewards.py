"""The implicit process reward model of `advantage=prime`: rewards of tokens, and its updates from outcomes.

    targets(trajectories) -> [the policy's update] -> learn(targets): one AdamW update

The model phi is a causal language model that is sharded, packed and saved like the policy. The loss of a
sample depends on its tokens only through the sum of their rewards, so its gradient by the log-prob of every
token of the sample is the same number, which is known from the forward that computed the rewards: the update
needs one forward and backward, and a sample's segments may lie in different micro-batches. Sums over samples
are divided once by their number in the step, so neither cuts nor ranks change the result. Tokens beyond the
staleness bound count: which weights sampled a completion does not matter for learning to predict its outcome.

Shape suffixes: S sampled tokens, N samples of the step on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from areal_like.config import Config, LoraConfig
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray
from trainer.advantages.prime import Prime, cross_entropy
from trainer.batching.device_copies import copied
from trainer.batching.packing import PackedBatch, Packer, in_lockstep, num_targets
from trainer.batching.segments import segments_of, values_of_targets
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.policy import BaseReference, Policy, build_policy
from trainer.optimizer import ShardedAdamW

_LR_RATIO = 2.0
"""Default ratio of the reward model's to the policy's learning rate: 1e-6 and 5e-7 in the authors' recipe."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutcomeTarget:
    """One sample, to learn from."""

    trajectory: Trajectory
    rewards_S: FloatArray
    """Rewards of its sampled tokens under the model before the update."""


class ImplicitRewards:
    """The model and its optimizer. `targets` and `learn` are collective."""

    def __init__(
        self,
        model: Policy,
        optimizer: ShardedAdamW,
        reference: Policy | BaseReference,
        ranks: Ranks,
        *,
        settings: Prime,
        budget_tokens: int,
    ) -> None:
        """`model`, `reference`: sharded. `budget_tokens`: most tokens of one of the model's micro-batches."""
        model.with_entropy = False
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self._reference = reference
        self._ranks = ranks
        self._budget_tokens = budget_tokens
        self._shares_prefixes = model.shares_prefixes and reference.shares_prefixes

    @classmethod
    def of(
        cls,
        config: Config,
        settings: Prime,
        ranks: Ranks,
        *,
        reference: Policy | BaseReference,
        initial: str,
        with_weights: bool = True,
    ) -> ImplicitRewards:
        """Builds the configured model from `initial`, the model that the run started from.

        `with_weights`: False leaves the weights undefined, for a caller that reads a checkpoint into them.
        """
        trainer = config.trainer
        plain = replace(config, model=replace(config.model, lora=LoraConfig(), router_replay=False))
        model = build_policy(plain, initial, ranks, with_weights=with_weights)
        optimizer = ShardedAdamW.of(trainer, model, ranks, lr=settings.prm_lr or _LR_RATIO * trainer.lr)
        return cls(
            model,
            optimizer,
            reference,
            ranks,
            settings=settings,
            budget_tokens=trainer.tokens_per_microbatch,
        )

    def targets(self, trajectories: Sequence[Trajectory]) -> list[OutcomeTarget]:
        """The samples with the rewards of their sampled tokens, in order, computed without gradient."""

        def rewards_S(batch: PackedBatch) -> Tensor:
            log_ratio_S: Tensor = self.model(batch).logprobs_S - self._reference(batch).logprobs_S
            return self.settings.beta * log_ratio_S

        found = values_of_targets(
            trajectories,
            rewards_S,
            self._ranks,
            budget_tokens=self._budget_tokens,
            shares_prefixes=self._shares_prefixes,
        )
        return [
            OutcomeTarget(trajectory=t, rewards_S=r_S) for t, r_S in zip(trajectories, found, strict=True)
        ]

    def learn(self, targets: Sequence[OutcomeTarget], *, step: int) -> dict[str, float]:
        """Updates the model after `step` completed steps. Returns metrics of the rewards before the update.

        `prm_loss`: mean cross-entropy; `prm_accuracy`: share of samples whose outcome is on the predicted
        side of 1/2; `prm_outcomes_clipped`: share of samples whose task's reward is not in 0..1.
        """
        logits_N = np.array([target.rewards_S.sum() for target in targets])
        raw_N = np.array([target.trajectory.reward for target in targets])
        outcomes_N = raw_N.clip(0.0, 1.0)
        losses_N, slopes_N = cross_entropy(logits_N, outcomes_N)
        counted = (
            np.ones(len(targets)),
            losses_N,
            (logits_N > 0) == (outcomes_N > 0.5),
            logits_N,
            outcomes_N != raw_N,
        )
        sums = torch.tensor([float(values_N.sum()) for values_N in counted], dtype=torch.float64)
        count, *totals = self._ranks.sum(sums).tolist()
        count = max(count, 1.0)
        self._accumulate(targets, slopes_N)
        norm = self.optimizer.step(divisor=count, lr=self.optimizer.learning_rate(step))
        names = ("prm_loss", "prm_accuracy", "prm_reward_mean", "prm_outcomes_clipped")
        means = {name: total / count for name, total in zip(names, totals, strict=True)}
        return means | {"prm_grad_norm": norm}

    def _accumulate(self, targets: Sequence[OutcomeTarget], slopes_N: FloatArray) -> None:
        """Forward and backward of every sequence; leaves the sum of the losses' gradients in `.grad`."""
        self.model.zero_grad()
        samples, weights = [], []
        for target, slope in zip(targets, (self.settings.beta * slopes_N).tolist(), strict=True):
            for _, segment in segments_of(target.trajectory):
                samples.append(TrainingSample(trajectory=segment, advantage=0.0, group=0))
                weights.append(np.full(num_targets(segment), slope))
        remaining = iter(weights)
        shares = self.model.shares_prefixes
        packer = Packer(budget_tokens=self._budget_tokens, shares_prefixes=shares)
        for batch, live in in_lockstep(packer.microbatches([samples]), self._ranks, shares_prefixes=shares):
            logp_S = self.model(batch).logprobs_S
            if live:
                weights_S = np.concatenate(list(islice(remaining, batch.num_sequences)))
                (weight_S,) = copied([weights_S], logp_S.device)
                loss = (weight_S.to(logp_S.dtype) * logp_S).sum()
            else:
                loss = logp_S.sum() * 0.0
            loss.backward()
