"""Reads a checkpoint's state into a model and its optimizer, each rank only its rows.

Two formats: rows of each rank (see `row_files`), and whole tensors in one file for the weights and one for
the moments, which the release before wrote. Bytes go from the files into the tensors they are for; with
another dtype or device in pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from trainer.checkpoints.hf_files import SINGLE_FILE, files_of_tensors
from trainer.checkpoints.host_copy import MASTER
from trainer.checkpoints.row_files import (
    FOLDER,
    INDEX_FILE,
    RANDOM_STATE,
    RANDOM_STATE_FILE,
    ModelRows,
    TensorRows,
    read_index,
)
from trainer.checkpoints.safetensors_file import SafetensorsReader
from trainer.distributed.ranks import Ranks
from trainer.models.hf_layout import hf_tensors
from trainer.models.packed_model import PackedModel
from trainer.models.sharded_weights import MODEL_PREFIX, row_range, shards_of
from trainer.optimizer import ShardedAdamW

CRITIC, POLICY = "critic", "policy"
OLD_FILES = {
    POLICY: ("model.safetensors", "optimizer.safetensors"),
    CRITIC: ("critic.safetensors", "critic_optimizer.safetensors"),
}
"""Weights and moments in a checkpoint of the release before."""


class StateReader:
    """The files of one checkpoint. `close` it."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        """`path`: the directory."""
        self._path = path
        self._ranks = ranks
        self._open: dict[str, SafetensorsReader] = {}
        self._exit = contextlib.ExitStack()

    def close(self) -> None:
        """Closes the files."""
        self._exit.close()

    def models(self) -> dict[str, ModelRows]:
        """The index of a checkpoint with rows. Raises ConfigError."""
        return read_index(self._path / FOLDER)

    def read(self, rows: ModelRows, model: PackedModel, optimizer: ShardedAdamW) -> None:
        """Reads masters and moments. Raises ConfigError, and leaves the state incomplete then."""
        shards = {shard.name: shard for shard in shards_of(model)}
        if rows.tensors.keys() != shards.keys():
            name = min(rows.tensors.keys() ^ shards.keys())
            where = "not in this model" if name in rows.tensors else "not in it"
            raise ConfigError(
                f"{self._path / FOLDER / INDEX_FILE}: {name} is {where}; "
                "resume with the model that the run began with"
            )
        dtype = getattr(torch, rows.dtype, None)
        for name, shard in shards.items():
            if shard.rows.dtype != dtype or tuple(shard.shape) != tuple(rows.tensors[name].shape):
                raise ConfigError(
                    f"{self._path / FOLDER / INDEX_FILE}: {name} is {rows.dtype} of shape "
                    f"{tuple(rows.tensors[name].shape)} there and {shard.rows.dtype} of shape "
                    f"{tuple(shard.shape)} in this model; resume with the model that the run began with"
                )
        for name, moments in self._new_moments(model, optimizer, rows.num_updates):
            for kind, into in moments.items():
                self._read_rows(rows, kind, name, into)
        if not rows.has_masters:
            self._read_weights(model)
            return
        for name, shard in shards.items():
            self._read_rows(rows, MASTER, name, shard.rows)

    def read_old(self, kind: str, model: PackedModel, optimizer: ShardedAdamW, *, num_updates: int) -> None:
        """`read` from whole tensors, which the release before wrote. `kind`: a key of OLD_FILES."""
        weights, moments_file = OLD_FILES[kind]
        for shard in shards_of(model):
            self._read_part(weights, shard.name, shard.rows, shape=shard.shape)
        shapes = {shard.name: shard.shape for shard in shards_of(model)}
        for name, moments in self._new_moments(model, optimizer, num_updates):
            for key, into in moments.items():
                self._read_part(moments_file, f"{key}.{name}", into, shape=shapes[name])

    def random_state(self, *, is_old: bool) -> Tensor:
        """The random state, uint8 [bytes]. Raises ConfigError."""
        file = self._file(OLD_FILES[POLICY][1] if is_old else f"{FOLDER}/{RANDOM_STATE_FILE}")
        state = torch.empty(torch.get_rng_state().shape, dtype=torch.uint8)
        file.read(file.entry(RANDOM_STATE, shape=tuple(state.shape), dtype=torch.uint8), state, first=0)
        return state

    def _new_moments(
        self, model: PackedModel, optimizer: ShardedAdamW, num_updates: int
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(Hugging Face name, this rank's moments to fill) of each parameter that this rank has rows of."""
        moments = optimizer.new_moments(num_updates=num_updates)
        for shard in shards_of(model):
            if moments and shard.rows.numel():
                yield shard.name, moments[MODEL_PREFIX + shard.name]

    def _read_rows(self, rows: ModelRows, kind: str, name: str, into: Tensor) -> None:
        """Reads this rank's rows of one tensor from the files that have some of them."""
        places: TensorRows = rows.tensors[name]
        first, end = self._range(places.shape)
        for file_name, (from_row, to_row) in zip(rows.files, places.rows, strict=True):
            begin, stop = max(first, from_row), min(end, to_row)
            if begin < stop:
                file = self._file(f"{FOLDER}/{file_name}")
                shape = (to_row - from_row, *places.shape[1:])
                entry = file.entry(f"{kind}.{name}", shape=shape, dtype=into.dtype)
                file.read(entry, into[begin - first : stop - first], first=begin - from_row)

    def _read_weights(self, model: PackedModel) -> None:
        """Reads the masters from the weights' files, by the names and shapes of the Hugging Face model."""
        rows = {shard.name: shard for shard in shards_of(model)}
        files = files_of_tensors(self._path)
        for tensor in hf_tensors(model.model):
            shard = rows[tensor.param]
            first_row, _ = self._range(shard.shape)
            part = tensor.part_in(shard.rows, first_row=first_row)
            if part is not None:
                file = self._file(SINGLE_FILE if files is None else files.get(tensor.name, SINGLE_FILE))
                entry = file.entry(tensor.name, shape=tensor.shape, dtype=shard.rows.dtype)
                file.read(entry, part[0], first=part[1])

    def _read_part(self, file_name: str, name: str, into: Tensor, *, shape: Sequence[int]) -> None:
        """Reads this rank's rows of a tensor that is whole in one file."""
        file = self._file(file_name)
        entry = file.entry(name, shape=tuple(shape))
        if into.numel():
            file.read(entry, into, first=self._range(shape)[0])

    def _range(self, shape: Sequence[int]) -> tuple[int, int]:
        return row_range(torch.Size(shape), rank=self._ranks.rank, world_size=self._ranks.world_size)

    def _file(self, name: str) -> SafetensorsReader:
        if name not in self._open:
            self._open[name] = SafetensorsReader(self._path / name)
            self._exit.callback(self._open[name].close)
        return self._open[name]
