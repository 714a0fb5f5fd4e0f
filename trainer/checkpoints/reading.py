"""Reads a checkpoint's state into a model and its optimizer, each rank only its rows.

It reads two formats: rows of each rank (see `writing`), and the format of the previous release with whole
tensors in one file for the weights and one for the moments. One file is open at a time.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from areal_like.paths import read_json
from trainer.checkpoints.writing import (
    CODES,
    FOLDER,
    MASTER,
    RANDOM_STATE,
    RANDOM_STATE_FILE,
    ROWS_INDEX,
    ModelRows,
    ModelState,
    TensorRows,
)
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, row_range, shards_of
from trainer.models.packed_model import PackedModel
from trainer.models.peft_folder import copy_adapter
from trainer.models.row_loading import read_rows
from trainer.models.safetensors_rows import SafetensorsRows

CRITIC, POLICY, PRM, PROXIMAL = "critic", "policy", "prm", "proximal"
OLD_FILES = {
    POLICY: ("model.safetensors", "optimizer.safetensors"),
    CRITIC: ("critic.safetensors", "critic_optimizer.safetensors"),
}
"""Files of weights and moments in a checkpoint of the previous release."""
_MAX_INDEX_BYTES = 256_000_000
_REMEDY = "resume from another step"
_OTHER_MODEL = "resume with the model that the run started with"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """Rows of one tensor in one file, and the memory to read them into."""

    name: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    """Shape of the whole tensor in the file."""
    first: int
    into: Tensor


class StateReader:
    """Reads one rank's part of one checkpoint. Every method raises ConfigError, which names the file."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path = path
        self._rank, self._world_size = ranks.shard_rank, ranks.num_shards

    def models(self) -> dict[str, ModelRows]:
        """Reads the index of a checkpoint with rows: kind of model -> its row files."""
        return read_index(self._path / FOLDER)

    def read(self, rows: ModelRows, model: PackedModel, optimizer: ModelState) -> None:
        """Reads masters and moments; the state is incomplete after an error."""
        self._check(rows, model, optimizer)
        reads: dict[str, list[_Read]] = defaultdict(list)
        for kind, name, into in self._wanted(model, optimizer, rows.num_updates):
            if kind == MASTER and rows.masters:
                continue
            first, end = self._range(rows.tensors[name].shape)
            for file, (from_row, to_row) in zip(rows.files, rows.tensors[name].rows, strict=True):
                begin, stop = max(first, from_row), min(end, to_row)
                if begin < stop:
                    read = _Read(
                        name=f"{kind}.{name}",
                        shape=(to_row - from_row, *rows.tensors[name].shape[1:]),
                        first=begin - from_row,
                        into=into[begin - first : stop - first],
                    )
                    reads[f"{FOLDER}/{file}"].append(read)
        self._read_files(reads)
        if rows.masters:
            source = SafetensorsRows([self._path / file for file in rows.masters], remedy=_REMEDY)
            if model.has_adapter:
                copy_adapter(model.model, source, rank=self._rank, world_size=self._world_size)
            else:
                read_rows(model.model, source, rank=self._rank, world_size=self._world_size, tied={})

    def read_old(self, kind: str, model: PackedModel, optimizer: ModelState, *, num_updates: int) -> None:
        """Like `read`, from the previous release's whole tensors. `kind`: a key of OLD_FILES."""
        weights, moments = OLD_FILES[kind]
        shapes = {shard.name: shard.shape for shard in shards_of(model)}
        reads: dict[str, list[_Read]] = defaultdict(list)
        for key, name, into in self._wanted(model, optimizer, num_updates):
            is_master = key == MASTER
            read = _Read(
                name=name if is_master else f"{key}.{name}",
                shape=tuple(shapes[name]),
                first=self._range(shapes[name])[0],
                into=into,
            )
            reads[weights if is_master else moments].append(read)
        self._read_files(reads)

    def random_state(self, *, is_old: bool) -> Tensor:
        """The random state, uint8 [bytes]."""
        path = self._path / (OLD_FILES[POLICY][1] if is_old else f"{FOLDER}/{RANDOM_STATE_FILE}")
        with contextlib.closing(SafetensorsRows([path], remedy=_REMEDY)) as file:
            if RANDOM_STATE not in file.names:
                raise ConfigError(f"{path} has no {RANDOM_STATE}: {_REMEDY}")
            state, present = file.tensor(RANDOM_STATE), torch.get_rng_state()
        if (state.dtype, state.shape) != (present.dtype, present.shape):
            raise ConfigError(f"{path}: {RANDOM_STATE} is not a random state of this torch: {_REMEDY}")
        return state

    def _check(self, rows: ModelRows, model: PackedModel, optimizer: ModelState) -> None:
        """Raises ConfigError if the index belongs to another model."""
        index = self._path / FOLDER / ROWS_INDEX
        shards = {shard.name: shard for shard in shards_of(model, optimizer.shards)}
        if others := rows.tensors.keys() ^ shards.keys():
            name = min(others)
            where = "not in this model" if name in rows.tensors else "not in it"
            raise ConfigError(f"{index}: {name} is {where}; {_OTHER_MODEL}")
        for name, shard in shards.items():
            there = rows.dtype, tuple(rows.tensors[name].shape)
            here = str(shard.rows.dtype).removeprefix("torch."), tuple(shard.shape)
            if there != here:
                raise ConfigError(
                    f"{index}: {name} is {there[0]} of shape {there[1]} there, and {here[0]} of shape "
                    f"{here[1]} in this model; {_OTHER_MODEL}"
                )

    def _wanted(
        self, model: PackedModel, optimizer: ModelState, num_updates: int
    ) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, Hugging Face name, this rank's rows to fill) of all masters and moments."""
        moments = optimizer.new_moments(num_updates=num_updates)
        for shard in shards_of(model, optimizer.shards):
            if shard.rows.numel():
                yield MASTER, shard.name, shard.rows
                for kind, into in moments.get(MODEL_PREFIX + shard.name, {}).items():
                    yield kind, shard.name, into

    def _read_files(self, reads: dict[str, list[_Read]]) -> None:
        for file_name, wanted in sorted(reads.items()):
            path = self._path / file_name
            with contextlib.closing(SafetensorsRows([path], remedy=_REMEDY)) as file:
                names = set(file.names)
                for read in wanted:
                    if read.name not in names:
                        raise ConfigError(f"{path} has no {read.name}: {_OTHER_MODEL}, or from another step")
                    if file.shape(read.name) != read.shape:
                        raise ConfigError(
                            f"{path}: {read.name} has shape {file.shape(read.name)} there and {read.shape} "
                            f"in this model; {_OTHER_MODEL}"
                        )
                    if file.dtype(read.name) != CODES[read.into.dtype]:
                        raise ConfigError(
                            f"{path}: {read.name} is {file.dtype(read.name)} there, and its index says "
                            f"{CODES[read.into.dtype]}: {_REMEDY}"
                        )
                    file.copy(read.name, read.into, first=read.first)

    def _range(self, shape: Sequence[int]) -> tuple[int, int]:
        return row_range(torch.Size(shape), rank=self._rank, world_size=self._world_size)


def read_index(folder: Path) -> dict[str, ModelRows]:
    """The rows of each model. Raises ConfigError if the index cannot be read or contradicts itself."""
    path = folder / ROWS_INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"more than {_MAX_INDEX_BYTES} bytes")
        return {name: _model_rows(fields) for name, fields in read_json(path)["models"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}): {_REMEDY}") from None


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
