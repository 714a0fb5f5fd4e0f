"""Gradients with a variance-minimizing baseline at the cost of one ordinary backward (see `ghost_tape.py`).

    backward -> squared norms [N] -> b* [N] -> coefficients w (A - b*) [N] -> gradients, reduced into shards

With one baseline for the whole step, b* is known only after the last micro-batch. Then `sum w_i A_i g_i` is
accumulated in the shards' `.grad`, `sum w_i g_i` in a second set of shards, and b* times the second is
subtracted at the end.

g_i is the gradient of a whole sample, so its norm includes the products of its segments' gradients: to the
tape, all rows of a sample are one sequence. One approximation: with one baseline for the step, a sample that
is too long for a micro-batch counts with the sum of its parts' squared norms.

Notation: A_i advantage, g_i gradient of sample i at advantage 1, w_i weight (1, or outside of the norms).
Shape suffixes: S sampled tokens of a micro-batch, N its samples.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.distributed.sharding import add_gradient, reduced
from trainer.gradients.base import Gradients, WeightsN
from trainer.gradients.ghost_layers import SegmentRows
from trainer.gradients.ghost_tape import GhostTape
from trainer.gradients.optimal_baseline import optimal_baseline

if TYPE_CHECKING:
    from trainer.batching.packing import PackedBatch
    from trainer.batching.sampled_tokens import SampledTokens
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy


class GhostGradients(Gradients):
    """Takes losses at advantage 1, in micro-batches of whole groups (with `over_batch`: of any samples)."""

    def __init__(
        self,
        policy: Policy,
        ranks: Ranks,
        *,
        over_batch: bool = False,
        leave_one_out: bool = False,
        weights: WeightsN | None = None,
    ) -> None:
        """`over_batch`: one baseline for all samples of the step and all ranks.

        `weights`: weights of the samples' gradients, which do not apply to their norms; None: 1.
        Raises ConfigError for a model with layers that GhostTape does not support.
        """
        self._policy = policy
        self._ranks = ranks
        self._over_batch = over_batch
        self._leave_one_out = leave_one_out
        self._weights = weights
        self._params = {name: param for name, param in policy.named_parameters() if param.requires_grad}
        self._tape = GhostTape(policy, head=policy.model.get_output_embeddings())

    def __enter__(self) -> GhostGradients:
        super().__enter__()
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._score_shards: dict[str, Tensor] = {}
        self._loss_sum: Tensor | float = 0.0
        self._baselines: Tensor | float = 0.0
        self._num_sequences: Tensor | float = 0.0
        self._tape.attach()
        # No chunks: the tape keeps what chunking would free, and needs all rows of the head in one call.
        self._chunk_tokens, self._policy.chunk_tokens = self._policy.chunk_tokens, sys.maxsize
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tape.detach()
        self._policy.chunk_tokens = self._chunk_tokens

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """Runs one backward, then forms each parameter's gradient from what the tape recorded."""
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        device = loss_S.device
        rows = SegmentRows.of(batch.sample_lengths, device=device)
        head_rows = SegmentRows.of(
            batch.sum_N(torch.ones_like(batch.sampled_S)).tolist(), device=device, like=batch.sample_lengths
        )
        with torch.no_grad():
            squares_N = self._tape.squares(rows, head_rows, read_S=batch.sampled_S - 1)
            advantage_N = tokens.mean_N(tokens.advantage_S).double()
            weight_N = torch.ones_like(advantage_N)
            if self._weights is not None:
                weight_N = self._weights(tokens).to(advantage_N)
            loss_N = batch.sum_N(loss_S.detach())
            if self._over_batch:
                self._sums += torch.stack([squares_N.sum(), (squares_N * advantage_N).sum()]).cpu()
                self._add(weight_N * advantage_N, loss_N)
                for name, full in self._tape.combined(weight_N):
                    shard = reduced(self._params[name], full)
                    self._score_shards[name] = (
                        self._score_shards[name] + shard if name in self._score_shards else shard
                    )
                self._loss_sum += (weight_N * loss_N).sum()
            else:
                baseline_N = optimal_baseline(
                    squares_N,
                    advantage_N,
                    tokens.group_N,
                    leave_one_out=self._leave_one_out,
                )
                self._add(weight_N * (advantage_N - baseline_N), loss_N)
                self._baselines += (baseline_N * (squares_N > 0)).sum()
            self._num_sequences += (squares_N > 0).double().sum()  # zero for a dummy
        self._tape.clear()

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """With one baseline for the step: subtracts b* times `sum w_i g_i`, now that all norms are known."""
        if self._over_batch:
            square_sum, weighted_sum = self._ranks.sum(self._sums).tolist()
            baseline = weighted_sum / square_sum if square_sum > 0 else 0.0
            for name, scores in self._score_shards.items():
                add_gradient(self._params[name], scores.mul_(-baseline))
            self._loss -= baseline * self._loss_sum
            self._baselines = baseline * self._num_sequences
        return {"loss": (self._loss, 1.0), "baseline": (self._baselines, self._num_sequences)}

    def _add(self, coefficient_N: Tensor, loss_N: Tensor) -> None:
        """Adds `sum c_i g_i` to the shards' gradients and `sum c_i loss_i` to the loss."""
        self._loss += (coefficient_N * loss_N).sum()
        for name, full in self._tape.combined(coefficient_N):
            add_gradient(self._params[name], reduced(self._params[name], full))
