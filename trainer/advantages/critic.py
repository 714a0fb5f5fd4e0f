"""Trains the critic of `advantage=gae`: values for every sampled token, and regression towards their targets.

    values(trajectories) -> [the policy's update] -> learn(targets): `critic_updates` AdamW updates

The critic is a separate model that starts from the policy's initial weights and is sharded and packed like
the policy. With `model.lora` it has a frozen base and an adapter of its own, and a head that is trained. Its
losses are summed and divided once by the step's number of sampled tokens, so the result does not depend on
the cuts into micro-batches or the number of ranks. The critic cuts its own micro-batches: they contain every
sequence, including those with zero advantage, which the policy skips.

Shape suffix: S sampled tokens (of one trajectory in numpy arrays, of a micro-batch in tensors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from areal_like.automatic_settings import recomputation
from areal_like.config import Config
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray
from trainer.advantages.gae import Gae
from trainer.batching.device_copies import copied
from trainer.batching.packing import Packer, in_lockstep
from trainer.batching.segments import values_of_targets
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.value_model import ValueModel
from trainer.optimizer import ShardedAdamW

_LR_RATIO = 10.0
"""Default ratio of critic's to policy's learning rate; usual in PPO for language models (1e-5 and 1e-6)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueTarget:
    """The critic's values [S] of one segment at the start of the step, and the targets [S] for them."""

    trajectory: Trajectory
    values_S: FloatArray
    targets_S: FloatArray


def value_loss(value_S: Tensor, old_S: Tensor, target_S: Tensor, *, clip: float) -> Tensor:
    """[S] half the squared error, as in PPO: 1/2 max((V - target)^2, (V_clipped - target)^2).

    V_clipped is V clamped to within `clip` of the old value; 0 turns clipping off.
    """
    loss_S = (value_S - target_S).square()
    if clip:
        clipped_S = old_S + (value_S - old_S).clamp(-clip, clip)
        loss_S = torch.maximum(loss_S, (clipped_S - target_S).square())
    return 0.5 * loss_S


class Critic:
    """A value model and its optimizer. `values` and `learn` are collective."""

    def __init__(
        self, model: ValueModel, optimizer: ShardedAdamW, ranks: Ranks, *, settings: Gae, budget_tokens: int
    ) -> None:
        """`model` is sharded. `budget_tokens`: most tokens of one of the critic's micro-batches."""
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self._ranks = ranks
        self._budget_tokens = budget_tokens

    @classmethod
    def of(
        cls, config: Config, settings: Gae, ranks: Ranks, *, initial: str, with_weights: bool = True
    ) -> Critic:
        """Builds the configured critic, untrained, from `initial`, the model that the run started from.

        `with_weights`: False leaves the weights undefined, for a caller that reads a checkpoint into them.
        """
        trainer = config.trainer
        model = ValueModel.build(
            initial,
            gradient_checkpointing=recomputation(config),
            offload_activations=trainer.offload_activations,
            lora_settings=replace(config.model.lora, path=""),
            seed=config.seed,
        )
        model.made_ready(config, ranks, with_weights=with_weights)
        optimizer = ShardedAdamW.of(trainer, model, ranks, lr=settings.critic_lr or _LR_RATIO * trainer.lr)
        return cls(model, optimizer, ranks, settings=settings, budget_tokens=trainer.tokens_per_microbatch)

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[S] values of each trajectory's sampled tokens, in order, computed without gradient."""
        return values_of_targets(
            trajectories,
            self.model,
            self._ranks,
            budget_tokens=self._budget_tokens,
            shares_prefixes=self.model.shares_prefixes,
        )

    def learn(self, targets: Sequence[ValueTarget], *, step: int) -> dict[str, float]:
        """Updates the critic after `step` completed steps.

        Returns metrics of the values before the update.

        `explained_variance`: 1 - Var(target - value) / Var(target): 0 for a critic that predicts the mean,
        NaN where all targets are equal.
        """
        target_S = np.concatenate([np.zeros(0), *(target.targets_S for target in targets)])
        error_S = target_S - np.concatenate([np.zeros(0), *(target.values_S for target in targets)])
        sums = [len(target_S), target_S.sum(), (target_S**2).sum(), error_S.sum(), (error_S**2).sum()]
        count, target_sum, target_square, error_sum, error_square = self._ranks.sum(
            torch.tensor(sums, dtype=torch.float64)
        ).tolist()
        count = max(count, 1.0)
        norm = 0.0
        for _ in range(self.settings.critic_updates):
            self._accumulate(targets)
            norm = self.optimizer.step(divisor=count, lr=self.optimizer.learning_rate(step))
        variance = target_square / count - (target_sum / count) ** 2
        unexplained = error_square / count - (error_sum / count) ** 2
        targets_differ = variance > 1e-12 * target_square / count  # a smaller variance is rounding
        return {
            "value_loss": 0.5 * error_square / count,
            "value_mean": (target_sum - error_sum) / count,
            "explained_variance": 1 - unexplained / variance if targets_differ else math.nan,
            "critic_grad_norm": norm,
        }

    def _accumulate(self, targets: Sequence[ValueTarget]) -> None:
        """Forward and backward of every sequence; leaves the sum of the losses' gradients in `.grad`."""
        self.model.zero_grad()
        remaining = iter(targets)
        samples = [TrainingSample(trajectory=t.trajectory, advantage=0.0, group=0) for t in targets]
        shares = self.model.shares_prefixes
        packer = Packer(budget_tokens=self._budget_tokens, shares_prefixes=shares)
        for batch, live in in_lockstep(packer.microbatches([samples]), self._ranks, shares_prefixes=shares):
            value_S = self.model(batch)
            if live:
                of_batch = list(islice(remaining, batch.num_sequences))
                arrays = [t.values_S for t in of_batch], [t.targets_S for t in of_batch]
                old_S, target_S = (
                    each_S.to(value_S.dtype)
                    for each_S in copied([np.concatenate(each) for each in arrays], value_S.device)
                )
                loss = value_loss(value_S, old_S, target_S, clip=self.settings.value_clip).sum()
            else:
                loss = value_S.sum() * 0.0
            loss.backward()  # type: ignore[no-untyped-call]
