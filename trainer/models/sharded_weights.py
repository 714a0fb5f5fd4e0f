"""Gathers sharded weights into whole tensors on rank 0.

FSDP2 shards rows: of M ranks, rank r holds ceil(rows / M) rows from r * ceil(rows / M) on. Plain padded
tensors are gathered, not DTensors: that works on any process group, not only the mesh's, and for tensors
that are sharded like the parameters but are not parameters (the optimizer's moments). Names and order are
those of the Hugging Face model; tied weights appear once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.sharding import local

MODEL_PREFIX = "model."
"""Prefix that `PackedModel` adds to the Hugging Face name of a parameter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowShard:
    """This rank's rows of one tensor."""

    name: str
    rows: Tensor
    shape: torch.Size
    """Shape of the whole tensor."""


def shards_of(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> list[RowShard]:
    """This rank's shards of a `PackedModel` under their Hugging Face names, sharing memory.

    `values`: tensors sharded like the parameters (moments), by the model's own names; the parameters
    themselves by default.
    """
    return [
        RowShard(
            name=name.removeprefix(MODEL_PREFIX),
            rows=local(param.detach()) if values is None else values[name],
            shape=param.shape,
        )
        for name, param in model.named_parameters()
    ]


def gather(shards: list[RowShard], *, group: dist.ProcessGroup | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor on the CPU) on rank 0, one at a time, and nothing on other ranks.

    Collective: every rank has to exhaust the iterator. With one rank the tensors share memory with shards on
    the CPU.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    for shard in shards:
        if world_size == 1:
            yield shard.name, shard.rows.cpu()
            continue
        num_rows = rows_per_rank(shard.shape, world_size)
        padded = shard.rows.new_zeros((num_rows, *shard.shape[1:]))
        padded[: len(shard.rows)] = shard.rows
        parts = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
        dist.gather(padded, parts, group=group, group_dst=0)
        if parts is not None:
            yield shard.name, torch.cat(parts)[: shard.shape[0]].cpu()


def rows_per_rank(shape: torch.Size, world_size: int) -> int:
    """Number of rows in each rank's shard; the last ranks may hold fewer or none."""
    return -(-shape[0] // world_size)


def row_range(shape: torch.Size, *, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end): the rank holds the rows from `first` up to, but not including, `end`."""
    num_rows = rows_per_rank(shape, world_size)
    return min(rank * num_rows, shape[0]), min((rank + 1) * num_rows, shape[0])
