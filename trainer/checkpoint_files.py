"""Writes and reads the files of one checkpoint, in a directory that is either complete or absent.

Tensors are saved whole (gathered to rank 0), so that any number of ranks can read them, each rank its rows.
The masters are saved in float32, whatever dtype the engines run.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from areal_like.errors import ConfigError, DiskFullError
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.sharded_weights import MODEL_PREFIX, gather, row_range, shards_of
from trainer.optimizer import MOMENTS, ShardedAdamW

log = logging.getLogger(__name__)

_NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
"""The system's messages: safetensors raises its own error class, with the message but not the number."""


def copy_state(model: PackedModel, optimizer: ShardedAdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, moments) on rank 0, by their names in the files; copies on the CPU.

    Both are empty on the other ranks. Collective.
    """
    weights = {name: _copy(tensor) for name, tensor in gather(shards_of(model))}
    moments: dict[str, Tensor] = {}
    for key in MOMENTS:
        values = {name: optimizer.moments(name)[key] for name in optimizer.shards}
        gathered = gather(shards_of(model, values))
        moments.update((f"{key}.{name}", _copy(tensor)) for name, tensor in gathered)
    return weights, moments


def read_state(
    weights_path: Path,
    moments_path: Path,
    model: PackedModel,
    optimizer: ShardedAdamW,
    ranks: Ranks,
    *,
    num_updates: int,
) -> None:
    """Reads this rank's rows of the tensors that `copy_state` returned into model and optimizer."""
    _read_rows(weights_path, model, optimizer.shards, ranks, prefix="")
    moments = {
        name: {key: torch.empty_like(shard) for key in MOMENTS} for name, shard in optimizer.shards.items()
    }
    for key in MOMENTS:
        values = {name: tensors[key] for name, tensors in moments.items()}
        _read_rows(moments_path, model, values, ranks, prefix=f"{key}.")
    optimizer.restore(moments, num_updates=num_updates)


def write_directory(final: Path, fill: Callable[[Path], None]) -> DiskFullError | None:
    """Makes directory `final` appear with the files that `fill` writes into a directory, whole or not at all.

    Returns the error if there was no space. It is returned and not raised because a raised error's traceback
    would keep the copies of the state alive.
    """
    remove_partials(final.parent)
    partial = final.with_name(f".{final.name}.partial")
    try:
        fill(partial)
        _commit(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # at once: the ledger may be waiting for this space
        if not any(message in str(error) for message in _NO_SPACE):
            raise
        full = DiskFullError(
            f"{final} was not written ({error}): free space there, or lower trainer.keep_checkpoints"
        )
        log.error("this checkpoint is skipped: %s", full)
        return full
    return None


def remove_partials(root: Path) -> None:
    """Removes checkpoints that a killed trainer left half written.

    On rank 0, while no other trainer of the run is alive.
    """
    for partial in root.glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _read_rows(
    file_path: Path, model: PackedModel, into: Mapping[str, Tensor], ranks: Ranks, *, prefix: str
) -> None:
    """Copies this rank's rows of every tensor of a file into `into` (by the model's own names)."""
    with safe_open(file_path, framework="pt") as file, torch.no_grad():
        for name, param in model.named_parameters():
            rows = file.get_slice(prefix + name.removeprefix(MODEL_PREFIX))
            if tuple(rows.get_shape()) != tuple(param.shape):
                raise ConfigError(
                    f"{file_path}: {name} has shape {tuple(rows.get_shape())} there and "
                    f"{tuple(param.shape)} in this model; resume with the model that the run began with"
                )
            first, end = row_range(param.shape, rank=ranks.rank, world_size=ranks.world_size)
            if end > first:
                into[name].copy_(rows[first:end])


def _commit(partial: Path, final: Path) -> None:
    """Syncs every file before the rename: a directory with the final name is complete even after a crash."""
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():  # the same step again, after a resume from an earlier step
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
