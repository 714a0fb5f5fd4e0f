"""Sharded weights made whole on rank 0, in two moves, so that training need not wait for the slow one.

    freeze(model)    copies this rank's shards: the weights may change afterwards
    gather(frozen)   brings them together, tensor by tensor, on any process group and any thread

FSDP2 shards rows: rank r holds rows r * ceil(rows / M) and up. Gathering plain padded tensors instead of DTensors lets it run on a
group other than the mesh's. Names and order are those of the Hugging Face model, tied weights once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.sharding import local
from trainer.models.packed_model import PackedModel

MODEL_PREFIX = "model."
"""What `PackedModel` puts before the Hugging Face name of a parameter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """This rank's rows of one tensor."""

    name: str
    rows: Tensor
    shape: torch.Size
    """Of the whole tensor."""


def shards_of(model: PackedModel, values: Mapping[str, Tensor] | None = None) -> list[Shard]:
    """This rank's shards under their Hugging Face names, sharing memory.

    `values`: tensors sharded like the parameters (moments), by the model's own names; the parameters themselves by default.
    """
    return [
        Shard(
            name=name.removeprefix(MODEL_PREFIX),
            rows=local(param.detach()) if values is None else values[name],
            shape=param.shape,
        )
        for name, param in model.named_parameters()
    ]


def freeze(model: PackedModel) -> list[Shard]:
    """A copy of this rank's shards of the weights."""
    return [Shard(name=s.name, rows=s.rows.clone(), shape=s.shape) for s in shards_of(model)]


def gather(shards: list[Shard], *, group: dist.ProcessGroup | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor on the CPU) on rank 0, one at a time; yields nothing elsewhere. Collective: exhaust it on all.

    Tensors of a lone rank share memory with the shards if these are on the CPU.
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


def gather_full_state(model: PackedModel) -> list[tuple[str, Tensor]]:
    """All weights as (Hugging Face name, CPU tensor in the masters' dtype) on rank 0, an empty list elsewhere. Collective.

    The order is the same at every call; nothing shares memory with the model.
    """
    return list(gather(freeze(model)))


def rows_per_rank(shape: torch.Size, world_size: int) -> int:
    """Rows of a full shard."""
    return -(-shape[0] // world_size)


def row_range(shape: torch.Size, *, rank: int, world_size: int) -> tuple[int, int]:
    """[first, last + 1) of the rows that a rank holds."""
    num_rows = rows_per_rank(shape, world_size)
    return min(rank * num_rows, shape[0]), min((rank + 1) * num_rows, shape[0])
