"""The critic of `advantage=gae`: a value for every sampled token, learned beside the policy.

    values(trajectories) at the start of a step -> [policy's step] -> learn(lessons) : `critic_updates` times forward, backward, AdamW

It is a model of its own, begun from the policy's initial weights with a scalar head in place of the vocabulary's, sharded and packed as the
policy is. The head begins at zero: all values are 0 until it has learned, whatever the seed. A value is that of the state *before* its
token, so it reads the same hidden state as the token's log-prob. Losses are summed unnormalised and divided once by the step's tokens,
so neither cuts nor ranks change the result. Its micro-batches are its own: every sequence takes part, also those that teach the policy
nothing.

Shape suffixes: S sampled tokens, N sequences, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from areal_like.config import Config
from areal_like.trajectory import Trajectory
from trainer.advantages.base import FloatArray
from trainer.advantages.gae import Gae
from trainer.batching.microbatches import matched
from trainer.batching.packing import MicroBatch, PackedBatch, Packer, Sample, by_sequence
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.optimizer import ShardedAdamW

_LR_RATIO = 10.0
"""Of the critic's learning rate to the policy's, where none is given: what PPO for language models uses (1e-5 and 1e-6)."""


class ValueModel(PackedModel):
    """A causal LM whose head says what a state is worth."""

    def __init__(self, model: Any) -> None:
        """Takes over a transformers causal LM, whose head is thrown away."""
        head = nn.Linear(model.config.hidden_size, 1, dtype=model.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
        super().__init__(model)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[S] float32 (or the masters' dtype if wider): the value of the state before each sampled token."""
        value_S1 = self.model.get_output_embeddings()(self.hidden(batch))
        # A sum and not a squeeze: FSDP2 hangs its backward hook on outputs, which must not be views.
        value_S: Tensor = value_S1.to(torch.promote_types(value_S1.dtype, torch.float32)).sum(1)
        return value_S


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueTarget:
    """What the critic said of one trajectory's sampled tokens, and what it should have said."""

    trajectory: Trajectory
    values_S: FloatArray
    targets_S: FloatArray


def value_loss(value_S: Tensor, old_S: Tensor, target_S: Tensor, *, clip: float) -> Tensor:
    """Half the squared error, or that of the value held within `clip` of the old one if it is larger; 0: no clip."""
    loss_S = (value_S - target_S).square()
    if clip:
        near_S = old_S + (value_S - old_S).clamp(-clip, clip)
        loss_S = torch.maximum(loss_S, (near_S - target_S).square())
    return 0.5 * loss_S


class Critic:
    """Value model and optimizer. `values` and `learn` are collective."""

    def __init__(
        self, model: ValueModel, optimizer: ShardedAdamW, ranks: Ranks, *, settings: Gae, budget_tokens: int
    ) -> None:
        """`model` is sharded. `budget_tokens`: of one micro-batch."""
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self._ranks = ranks
        self._budget_tokens = budget_tokens

    @classmethod
    def of(cls, config: Config, settings: Gae, ranks: Ranks, *, initial: str) -> Critic:
        """The critic that a configuration describes, untrained. `initial`: the model that the run began with."""
        trainer = config.trainer
        model = ValueModel.load(initial, gradient_checkpointing=trainer.gradient_checkpointing).shard(
            ranks, dtype=config.model.dtype
        )
        optimizer = ShardedAdamW.of(trainer, model, ranks, lr=settings.critic_lr or _LR_RATIO * trainer.lr)
        return cls(model, optimizer, ranks, settings=settings, budget_tokens=trainer.tokens_per_microbatch)

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Of each trajectory's sampled tokens."""
        values: list[FloatArray] = []
        for batch, live in matched(self._cut(trajectories), self._ranks):
            with torch.no_grad():
                value_S = self.model(batch)
            if live:
                values += by_sequence(value_S, batch)
        return values

    def learn(self, lessons: Sequence[ValueTarget], *, step: int) -> dict[str, float]:
        """Moves the values towards their targets, after `step` completed steps. Metrics are of the values as they were before.

        `explained_variance`: 1 - Var(target - value) / Var(target), 0 for a critic that says the mean; NaN where all targets are equal.
        """
        targets_S = np.concatenate([np.zeros(0), *(lesson.targets_S for lesson in lessons)])
        errors_S = targets_S - np.concatenate([np.zeros(0), *(lesson.values_S for lesson in lessons)])
        sums = [len(targets_S), targets_S.sum(), (targets_S**2).sum(), errors_S.sum(), (errors_S**2).sum()]
        count, target, target_square, error, error_square = self._ranks.sum(
            torch.tensor(sums, dtype=torch.float64)
        ).tolist()
        count = max(count, 1.0)
        norm = 0.0
        for _ in range(self.settings.critic_updates):
            self._accumulate(lessons)
            norm = self.optimizer.step(divisor=count, lr=self.optimizer.learning_rate(step))
        variance = target_square / count - (target / count) ** 2
        unexplained = error_square / count - (error / count) ** 2
        has_spread = variance > 1e-12 * target_square / count
        return {
            "value_loss": 0.5 * error_square / count,
            "value_mean": (target - error) / count,
            "explained_variance": 1 - unexplained / variance if has_spread else math.nan,
            "critic_grad_norm": norm,
        }

    def _accumulate(self, lessons: Sequence[ValueTarget]) -> None:
        self.model.zero_grad()
        left = iter(lessons)
        for batch, live in matched(self._cut([lesson.trajectory for lesson in lessons]), self._ranks):
            value_S = self.model(batch)
            if live:
                taught = list(islice(left, batch.num_sequences))
                old_S, target_S = (
                    torch.from_numpy(np.concatenate(arrays)).to(value_S)
                    for arrays in (
                        [lesson.values_S for lesson in taught],
                        [lesson.targets_S for lesson in taught],
                    )
                )
                loss = value_loss(value_S, old_S, target_S, clip=self.settings.value_clip).sum()
            else:
                loss = value_S.sum() * 0.0
            loss.backward()  # type: ignore[no-untyped-call]

    def _cut(self, trajectories: Sequence[Trajectory]) -> Iterator[MicroBatch]:
        """In their order."""
        packer = Packer(budget_tokens=self._budget_tokens)
        yield from packer.add(
            [Sample(trajectory=trajectory, advantage=0.0, group=0) for trajectory in trajectories]
        )
        yield from packer.flush()
