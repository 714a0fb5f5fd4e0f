"""This rank's rows of a model's parameters, and their exchange with whole tensors and gradients.

FSDP2 shards rows: of the M ranks of a replica, rank r holds ceil(rows / M) rows from r * ceil(rows / M) on.
Gathering uses plain padded tensors instead of DTensors, so that it also works for copies of the shards. Names
and order are those of the Hugging Face model; tied weights appear once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient, sharing memory; an unsharded tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Reshards every module: a forward without a backward leaves the parameters unsharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduced(param: nn.Parameter, whole: Tensor) -> Tensor:
    """Sums the ranks' parts of a parameter's full gradient; returns this rank's shard of the sum.

    `whole`: this rank's part. The result has the parameter's dtype. Collective.
    """
    whole = whole.to(param.dtype)
    if not isinstance(param, DTensor) or param.device_mesh.size() == 1:
        return whole
    partial = DTensor.from_local(whole, param.device_mesh, [Partial("sum")], run_check=False)
    return partial.redistribute(placements=param.placements).to_local()


def add_gradient(param: nn.Parameter, shard: Tensor) -> None:
    """Adds `shard`, as `reduced` returned it, to `param.grad`."""
    if param.grad is not None:
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        grad.add_(shard)
    elif isinstance(param, DTensor):
        param.grad = DTensor.from_local(
            shard,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    else:
        param.grad = shard


MODEL_PREFIX = "model."
"""Prefix that `PackedModel` adds to the Hugging Face name of a parameter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowShard:
    """This rank's rows of one tensor."""

    name: str
    rows: Tensor
    shape: torch.Size
    """Shape of the whole tensor."""
    group: Any
    """The ranks that hold the rows together (a replica); None: this rank alone."""

    @classmethod
    def of(cls, name: str, param: Tensor, rows: Tensor | None = None) -> Self:
        """This rank's rows of a parameter, sharing memory, or `rows` in their place."""
        return cls(
            name=name,
            rows=local(param.detach()) if rows is None else rows,
            shape=param.shape,
            group=param.device_mesh.get_group() if isinstance(param, DTensor) else None,
        )

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def padded(self) -> Tensor:
        """The rows, and zeros up to the number of rows of the first rank."""
        padded = self.rows.new_zeros((rows_per_rank(self.shape, self.num_ranks), *self.shape[1:]))
        padded[: len(self.rows)] = self.rows
        return padded


def shards_of(model: nn.Module, shards: Mapping[str, Tensor] | None = None) -> list[RowShard]:
    """This rank's shards of a `PackedModel` under their Hugging Face names, sharing memory.

    `shards`: by the model's own names, only these, which may be copies; None: the model's parameters.
    """
    return [
        RowShard.of(name.removeprefix(MODEL_PREFIX), param, None if shards is None else shards[name].detach())
        for name, param in model.named_parameters()
        if shards is None or name in shards
    ]


def gather(shards: list[RowShard]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor on the CPU) on the first rank of each replica, one at a time, and nothing on
    other ranks.

    Collective: every rank has to exhaust the iterator. With one rank the tensors share memory with shards on
    the CPU.
    """
    for shard in shards:
        if shard.num_ranks == 1:
            yield shard.name, shard.rows.cpu()
            continue
        padded = shard.padded()
        is_first = dist.get_rank(shard.group) == 0
        parts = [torch.empty_like(padded) for _ in range(shard.num_ranks)] if is_first else None
        dist.gather(padded, parts, group=shard.group, group_dst=0)
        if parts is not None:
            yield shard.name, torch.cat(parts)[: shard.shape[0]].cpu()


def gather_everywhere(shards: list[RowShard]) -> dict[str, Tensor]:
    """Name -> whole tensor, on every rank's device. All of one dtype. Collective: one exchange.

    With one rank the tensors share memory with the shards.
    """
    num_ranks = shards[0].num_ranks if shards else 1
    if num_ranks == 1:
        return {shard.name: shard.rows for shard in shards}
    padded = [shard.padded() for shard in shards]
    own = torch.cat([rows.flatten() for rows in padded])
    gathered = own.new_empty(num_ranks * len(own))
    dist.all_gather_into_tensor(gathered, own, group=shards[0].group)
    sizes = [rows.numel() for rows in padded]
    of_ranks = [torch.split(part, sizes) for part in torch.split(gathered, len(own))]
    return {
        shard.name: torch.cat([parts[at].view(padded[at].shape) for parts in of_ranks])[: shard.shape[0]]
        for at, shard in enumerate(shards)
    }


def rows_per_rank(shape: torch.Size, world_size: int) -> int:
    """Number of rows in each rank's shard; the last ranks may hold fewer or none."""
    return -(-shape[0] // world_size)


def row_range(shape: torch.Size, *, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end): the rank holds the rows from `first` up to, but not including, `end`."""
    num_rows = rows_per_rank(shape, world_size)
    return min(rank * num_rows, shape[0]), min((rank + 1) * num_rows, shape[0])
