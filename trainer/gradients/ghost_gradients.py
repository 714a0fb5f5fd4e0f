"""A variance-minimising baseline at the price of one ordinary backward: norms and gradients of a packed micro-batch from a `GhostTape`.

    backward -> squared norms [N] -> b* -> coefficients A - b* [N] -> every parameter's gradient, one at a time, reduced into its shard

With one baseline for the step, b* comes too late for that; so `sum A_i g_i` goes into the shards and `sum g_i` into second ones.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.distributed.sharding import add_gradient, reduced
from trainer.gradients.base import Gradients
from trainer.gradients.ghost_tape import GhostTape
from trainer.gradients.optimal_baseline import optimal_baseline
from trainer.gradients.segment_rows import Rows

if TYPE_CHECKING:
    from trainer.batching.packing import PackedBatch
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy
    from trainer.objectives.base import SampledTokens


class GhostGradients(Gradients):
    """Micro-batches of whole groups (of any sequences with `over_batch`); `loss_S` is that of advantage 1."""

    def __init__(
        self, policy: Policy, ranks: Ranks, *, over_batch: bool = False, leave_one_out: bool = False
    ) -> None:
        """`over_batch`: one baseline for all sequences of the step and all ranks. Raises ConfigError for a model it does not know."""
        self._policy = policy
        self._ranks = ranks
        self._over_batch = over_batch
        self._leave_one_out = leave_one_out
        self._params = {name: param for name, param in policy.named_parameters() if param.requires_grad}
        self._tape = GhostTape(policy, head=policy.model.get_output_embeddings())

    def __enter__(self) -> GhostGradients:
        super().__enter__()
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._scores: dict[str, Tensor] = {}
        self._loss_scores: Tensor | float = 0.0
        self._baselines: Tensor | float = 0.0
        self._num_sequences: Tensor | float = 0.0
        self._tape.attach()
        # The tape keeps what chunking would free, and must see the head's rows at once.
        self._chunk_tokens, self._policy.chunk_tokens = self._policy.chunk_tokens, sys.maxsize
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tape.detach()
        self._policy.chunk_tokens = self._chunk_tokens

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """One backward, then products of what it left."""
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        device = loss_S.device
        rows = Rows.of(batch.lengths, device=device)
        head_rows = Rows.of(
            [int(length) for length in tokens.length_N.tolist()], device=device, like=batch.lengths
        )
        with torch.no_grad():
            squares_N = self._tape.squares(rows, head_rows, read_S=batch.sampled_S - 1)
            advantage_N = tokens.mean_N(tokens.advantage_S).double()
            loss_N = tokens.sum_N(loss_S.detach())
            if self._over_batch:
                self._sums += torch.stack([squares_N.sum(), (squares_N * advantage_N).sum()]).cpu()
                self._add(advantage_N, loss_N)
                for name, whole in self._tape.combined(torch.ones_like(advantage_N)):
                    shard = reduced(self._params[name], whole)
                    self._scores[name] = self._scores[name] + shard if name in self._scores else shard
                self._loss_scores += loss_N.sum()
            else:
                baseline_N = optimal_baseline(
                    squares_N, advantage_N, tokens.group_N, leave_one_out=self._leave_one_out
                )
                self._add(advantage_N - baseline_N, loss_N)
                self._baselines += (baseline_N * (squares_N > 0)).sum()
            self._num_sequences += (squares_N > 0).double().sum()  # not a dummy's
        self._tape.clear()

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """With one baseline for the step: sets it, now that all norms are known."""
        if self._over_batch:
            mass, moment = self._ranks.sum(self._sums).tolist()
            baseline = moment / mass if mass > 0 else 0.0
            for name, scores in self._scores.items():
                add_gradient(self._params[name], scores.mul_(-baseline))
            self._loss -= baseline * self._loss_scores
            self._baselines = baseline * self._num_sequences
        return {"loss": (self._loss, 1.0), "baseline": (self._baselines, self._num_sequences)}

    def _add(self, coefficient_N: Tensor, loss_N: Tensor) -> None:
        self._loss += (coefficient_N * loss_N).sum()
        for name, whole in self._tape.combined(coefficient_N):
            add_gradient(self._params[name], reduced(self._params[name], whole))
