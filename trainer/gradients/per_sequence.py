"""Per-sample gradients by autograd, with a variance-minimizing baseline, in one backward per sample.

    G_R = sum_i w_i A_i g_i    G_S = sum_i w_i g_i    gradient of a group = G_R - b* G_S

b* is known once the group's last norm is known, so two accumulators suffice: no pass is run twice and no g_i
is kept. Micro-batches are single samples, or parts of one that is too long, whose gradients are added up
before the norm is taken. Parameters stay unsharded on every rank during the step, since FSDP2's
reduce-scatter would mix the samples of several ranks; groups are added up locally, and the step's sum is
reduced once. In a context group each rank has a part of a sample's gradient: they are added up before the
norm, and the group's first rank continues with the sum. This supports any architecture, at the price of the
full model, two accumulators and one gradient of its size on every rank (two while a sample is cut).

Notation: A_i advantage, g_i gradient of sample i at advantage 1, w_i weight (1, or outside of the norms).
Shape suffixes: S sampled tokens, N samples.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.batching.packing import PackedBatch
from trainer.batching.sampled_tokens import SampledTokens
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import add_gradient, reduced, reshard
from trainer.gradients.base import Gradients, WeightsN
from trainer.gradients.optimal_baseline import optimal_baseline

if TYPE_CHECKING:
    from trainer.models.policy import Policy


class SequenceGradients(Gradients):
    """Takes micro-batches of one sequence each, group after group, with losses at advantage 1."""

    def __init__(
        self, policy: Policy, ranks: Ranks, *, over_batch: bool = False, weights: WeightsN | None = None
    ) -> None:
        """`over_batch`: one baseline for all sequences of the step and all ranks.

        `weights`: weights of the sequences' gradients, which do not apply to their norms; None: 1.
        """
        self._policy = policy
        self._ranks = ranks
        self._over_batch = over_batch
        self._weights = weights

    def __enter__(self) -> SequenceGradients:
        super().__enter__()
        self._group = -1
        self._begun: list[Tensor] | None = None
        self._squares: list[Tensor] = []
        self._advantages: list[float] = []
        self._loss_sum = self._baselines = 0.0
        self._num_sequences = 0
        reshard(self._policy)
        self._shards = [param for param in self._policy.parameters() if param.requires_grad]
        self._total = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in self._shards]
        self._scores = [torch.zeros_like(total) for total in self._total]
        for module in self._policy.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)
                module.set_reshard_after_backward(False, recurse=False)
                module.set_requires_gradient_sync(False, recurse=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._policy.named_modules():
            if isinstance(module, FSDPModule):
                reshards = self._policy.reshard_after_forward and name != ""
                module.set_reshard_after_forward(reshards, recurse=False)
                module.set_reshard_after_backward(True, recurse=False)
                module.set_requires_gradient_sync(True, recurse=False)
        reshard(self._policy)
        del self._shards, self._total, self._scores

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """Adds one sample, or a part of it; the first of a group finishes the group before it."""
        assert len(tokens.length_N) == 1
        # After the forward, parameters are unsharded.
        params = [param for param in self._policy.parameters() if param.requires_grad]
        computed = torch.autograd.grad(loss_S.sum(), params, allow_unused=True, materialize_grads=True)
        grads = [grad.to(total.dtype) for grad, total in zip(computed, self._total, strict=True)]
        if batch.context is not None:
            assert self._ranks.context is not None
            self._ranks.context.add_up(grads)
            if not self._ranks.has_samples:
                return
        group = int(tokens.group_N)
        if group != self._group and not self._over_batch:
            self._finish_group()
        self._group = group
        if self._begun is not None:
            torch._foreach_add_(grads, self._begun)
        self._begun = grads if batch.is_continued else None
        advantage = float(tokens.mean_N(tokens.advantage_S))
        weight = 1.0 if self._weights is None else float(self._weights(tokens))
        loss = weight * float(loss_S.detach().sum())
        self._loss += advantage * loss
        self._loss_sum += loss
        if batch.is_continued:
            return
        torch._foreach_add_(self._total, grads, alpha=weight * advantage)
        torch._foreach_add_(self._scores, grads, alpha=weight)
        self._squares.append(torch.stack(torch._foreach_norm(grads)).double().square().sum())
        self._advantages.append(advantage)

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        if self._over_batch:
            squares_N, advantage_N = self._sequences()
            sums = self._ranks.sum(torch.stack([squares_N.sum(), (squares_N * advantage_N).sum()]))
            self._subtract_baseline(float(sums[1] / sums[0]) if sums[0] > 0 else 0.0)
        else:
            self._finish_group()
        for shard, total in zip(self._shards, self._total, strict=True):
            add_gradient(shard, reduced(shard, total))
        return {"loss": (self._loss, 1.0), "baseline": (self._baselines, self._num_sequences)}

    def _sequences(self) -> tuple[Tensor, Tensor]:
        """(squared norms, advantages) [N] of the unfinished group's sequences: float64, on the host."""
        squares_N = torch.stack(self._squares).cpu() if self._squares else torch.zeros(0, dtype=torch.float64)
        return squares_N, torch.tensor(self._advantages, dtype=torch.float64)

    def _finish_group(self) -> None:
        if self._squares:
            squares_N, advantage_N = self._sequences()
            self._subtract_baseline(
                float(optimal_baseline(squares_N, advantage_N, torch.zeros(len(squares_N)))[0])
            )

    def _subtract_baseline(self, baseline: float) -> None:
        """Adds `-b* G_S` of the unfinished sequences to the step's sum and starts the next group."""
        torch._foreach_add_(self._total, self._scores, alpha=-baseline)
        torch._foreach_zero_(self._scores)
        self._loss -= baseline * self._loss_sum
        self._baselines += baseline * len(self._squares)
        self._num_sequences += len(self._squares)
        self._loss_sum = 0.0
        self._squares, self._advantages = [], []
