"""The files with each rank's rows, and the index that says which rows of which tensor are in which file.

    rows/index.json                             step, world size, and for each model a `ModelRows`
    rows/policy-00000-of-00004.safetensors      rank 0's rows: `exp_avg.NAME`, `exp_avg_sq.NAME`, and
                                                `master.NAME` unless the weights' files hold them exactly
    rows/critic-00000-of-00004.safetensors      the same for the critic, if there is one
    rows/proximal-00000-of-00004.safetensors    `master.NAME` of the proximal policy, if there is one
    rows/random_state.safetensors               rank 0's random state

They are in a folder of their own because engines load every safetensors file of a checkpoint's directory.
The names are those of the transformers model's parameters. Any number of ranks can read the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from areal_like.paths import read_json
from trainer.checkpoints.host_copy import HostCopy
from trainer.checkpoints.safetensors_file import FileLayout, write_at
from trainer.models.packed_model import PackedModel
from trainer.models.sharded_weights import row_range, shards_of

FOLDER = "rows"
INDEX_FILE = "index.json"
RANDOM_STATE_FILE, RANDOM_STATE = "random_state.safetensors", "random_state.cpu"
_MAX_INDEX_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class TensorRows:
    """Where the rows of one parameter are."""

    shape: Sequence[int]
    """Of the whole parameter."""
    rows: Sequence[Sequence[int]]
    """[first, end) of the rows in each file of `ModelRows.files`; empty ranges are not in the file."""


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """The row files of one model."""

    num_updates: int
    """Of its optimizer, for Adam's bias correction."""
    dtype: str
    """Of masters and moments: `float32`."""
    masters: Sequence[str]
    """Files of weights, beside the folder, that hold the masters; empty: the row files hold them."""
    files: Sequence[str]
    """In the folder of the index."""
    tensors: Mapping[str, TensorRows]
    """By the name of the parameter."""


def rows_of(
    model: PackedModel, copy: HostCopy, *, name: str, world_size: int, masters: Sequence[str]
) -> ModelRows:
    """The index of the files that all ranks write of `model`."""
    tensors = {
        shard.name: TensorRows(
            shape=tuple(shard.shape),
            rows=[row_range(shard.shape, rank=rank, world_size=world_size) for rank in range(world_size)],
        )
        for shard in shards_of(model)
    }
    return ModelRows(
        num_updates=copy.num_updates,
        dtype=str(copy.dtype).removeprefix("torch."),
        masters=masters,
        files=[f"{name}-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)],
        tensors=tensors,
    )


def write_rows(folder: Path, rows: ModelRows, copy: HostCopy, *, rank: int) -> None:
    """Writes and syncs one rank's file. Raises OSError."""
    kinds = copy.kinds[1:] if rows.masters else copy.kinds
    shapes = {
        f"{kind}.{name}": tuple(value.shape)
        for kind in kinds
        for name, value in copy.values[kind].items()
        if value.numel()
    }
    layout = FileLayout.of(shapes, copy.dtype)
    path = folder / rows.files[rank]
    layout.create(path)
    file = os.open(path, os.O_WRONLY)
    try:
        write_at(file, copy.flat(kinds), dtype=copy.dtype, offset=len(layout.header))
        os.fsync(file)
    finally:
        os.close(file)


def write_index(
    folder: Path, models: Mapping[str, ModelRows], *, step: int, world_size: int, random_state: Tensor
) -> None:
    """Writes the index and the random state (uint8 [bytes]). On one rank."""
    index = {
        "step": step,
        "world_size": world_size,
        "models": {name: asdict(rows) for name, rows in models.items()},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index) + "\n")
    layout = FileLayout.of({RANDOM_STATE: tuple(random_state.shape)}, torch.uint8)
    (folder / RANDOM_STATE_FILE).write_bytes(layout.header + bytes(random_state.tolist()))


def read_index(folder: Path) -> dict[str, ModelRows]:
    """The rows of each model. Raises ConfigError if the index cannot be read or contradicts itself."""
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"more than {_MAX_INDEX_BYTES} bytes")
        return {name: _model_rows(fields) for name, fields in read_json(path)["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}): resume from another step") from None


def _model_rows(fields: dict[str, Any]) -> ModelRows:
    files, masters = list(map(str, fields["files"])), list(map(str, fields["masters"]))
    if any(Path(file).name != file for file in (*files, *masters)):
        raise ValueError("a file in another directory")
    tensors = {}
    for name, places in fields["tensors"].items():
        shape, rows = (
            tuple(map(int, places["shape"])),
            [(int(first), int(end)) for first, end in places["rows"]],
        )
        bounds = [0, *(end for _, end in rows)]
        if len(rows) != len(files) or bounds[-1] != shape[0] or [first for first, _ in rows] != bounds[:-1]:
            raise ValueError(f"the files do not have every row of {name} once")
        tensors[name] = TensorRows(shape=shape, rows=rows)
    return ModelRows(
        num_updates=int(fields["num_updates"]),
        dtype=str(fields["dtype"]),
        masters=masters,
        files=files,
        tensors=tensors,
    )
