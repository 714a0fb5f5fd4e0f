"""The whole weights of a sharded model, for tests and benchmarks.

The trainer itself never holds all weights: it gathers one bucket at a time.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trainer.distributed.sharding import RowShard, gather, shards_of
from trainer.models.packed_model import PackedModel


def copy_shards(model: PackedModel) -> list[RowShard]:
    """A copy of this rank's shards of the weights; the model may change afterwards."""
    return [replace(shard, rows=shard.rows.clone()) for shard in shards_of(model)]


def gather_full_state(model: PackedModel) -> list[tuple[str, Tensor]]:
    """All weights as (Hugging Face name, CPU tensor in the masters' dtype) on rank 0; empty on other ranks.

    Collective. The order is the same at every call; nothing shares memory with the model.
    """
    return list(gather(copy_shards(model)))
