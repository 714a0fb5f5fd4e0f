"""The ranks that compute each micro-batch together (`trainer.context_parallel`): a context group.

Of M ranks, N neighbors are one context group: the ranks g N to g N + N - 1. Only the first of them, a data
rank, has samples of the step; it sends each of its micro-batches to the others. A rank computes its part of
the rows (`batching/context_part.py`), and in attention its part of the heads of all rows
(`attention/context.py`).

Gradients are exact without a factor. `gather` gives every rank all log-probs, but only the first rank has
losses of them: on the others they are multiplied by zero, as on a rank without work. The backward of `gather`
adds up these gradients over the group, so each rank gets those of its own part, and FSDP2's sum over all
ranks contains every token once. For the same reason sums, divisors and metrics over all ranks need no
weights.

Shape suffixes: N ranks of the group, R rows of a rank, X anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from areal_like.errors import ArealError

_MOST_BYTES = 1 << 30
"""Largest micro-batch that a rank accepts, in bytes: hundreds of times those of usual budgets."""


class ContextGroup:
    """Every method is collective in the group."""

    def __init__(self, size: int, *, timeout_s: float | None = None) -> None:
        """Collective over all ranks of the default process group, whose number `size` divides.

        `timeout_s`: time limit of a collective; None: torch's.
        """
        world_rank = dist.get_rank()
        self.size = size
        """Number of ranks of the group (N)."""
        self.rank = world_rank % size
        """0 is the rank that has samples."""
        self._first = world_rank - self.rank
        # torch would not take the limit of the default group.
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        groups = [
            dist.new_group(list(range(first, first + size)), timeout=timeout)
            for first in range(0, dist.get_world_size(), size)
        ]
        self._group = groups[world_rank // size]

    def spread(self, message: bytes | None) -> bytes:
        """Returns the first rank's message on every rank; the others pass None. Raises ArealError."""
        num_bytes = torch.tensor([-1 if message is None else len(message)])
        dist.broadcast(num_bytes, src=self._first, group=self._group)
        if not 0 <= int(num_bytes) <= _MOST_BYTES:
            raise ArealError(
                f"rank {self._first} sends a micro-batch of {int(num_bytes)} bytes: at most {_MOST_BYTES} "
                "expected. Lower trainer.tokens_per_microbatch"
            )
        if message is None:
            data = torch.empty(int(num_bytes), dtype=torch.uint8)
        else:  # a copy, because a tensor needs writable memory
            data = torch.from_numpy(np.frombuffer(message, dtype=np.uint8).copy())
        dist.broadcast(data, src=self._first, group=self._group)
        return data.numpy().tobytes() if message is None else message

    def all_to_all(self, part_NX: Tensor) -> Tensor:
        """[N, ...]: entry i is what rank i has for this rank; `part_NX`[i] goes to rank i.

        Differentiable: its backward is the same exchange.
        """
        out: Tensor = _AllToAll.apply(part_NX, self)  # type: ignore[no-untyped-call]
        return out

    def gather(self, own_X: Tensor) -> Tensor:
        """[N, ...]: the tensors of all ranks, of one shape, in the order of ranks.

        Differentiable: its backward returns the sum over ranks of their gradients of this rank's tensor.
        """
        out: Tensor = _Gather.apply(own_X, self)  # type: ignore[no-untyped-call]
        return out

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the ranks, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor, group=self._group)

    def _exchanged(self, part_NX: Tensor) -> Tensor:
        part_NX = part_NX.contiguous()
        received_NX = torch.empty_like(part_NX)
        dist.all_to_all_single(received_NX, part_NX, group=self._group)
        return received_NX


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_NX: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return group._exchanged(part_NX)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group._exchanged(grads[0]), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_X: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        gathered = own_X.new_empty(group.size * own_X.numel())
        dist.all_gather_into_tensor(gathered, own_X.contiguous().view(-1), group=group._group)
        return gathered.view(group.size, *own_X.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sum_NX = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(sum_NX, group=ctx.group._group)
        return sum_NX[ctx.group.rank], None
