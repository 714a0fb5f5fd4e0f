"""Writes one rank's part of a checkpoint: its rows of the masters, the moments and the weights' files.

    rows/index.json                             step, world size, and for each model a `ModelRows`
    rows/policy-00000-of-00004.safetensors      rank 0's rows: `exp_avg.NAME`, `exp_avg_sq.NAME`, and
                                                `master.NAME` unless the weights' files hold them exactly
    rows/critic-00000-of-00004.safetensors      the same for the critic, if there is one
    rows/proximal-00000-of-00004.safetensors    `master.NAME` of the proximal policy, if there is one
    rows/random_state.safetensors               rank 0's random state
    adapter_model.safetensors                   the policy's adapter, of which it is the master, if there is
                                                one; the base is not written
    model.safetensors                           else the policy's weights for engines and users, if all fit
                                                into one file
    model-00001-of-00002.safetensors ...        else, with
    model.safetensors.index.json                the file of each tensor

The rows are in a folder of their own because engines load every safetensors file of a checkpoint's directory.
The names are those of the transformers model's parameters. Any number of ranks can read the files.

The weights' files are those that `save_pretrained` would write, but no tensor is gathered: rank 0 makes them
with headers and final sizes, and each rank writes its rows at their places. The rows of a tensor are
contiguous in a safetensors file: 8 bytes with the length of the header (little-endian), the header (JSON:
dtype, shape and position of each tensor), the data. The safetensors package writes whole files from one
process.
"""

from __future__ import annotations

import copy
import json
import math
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer

from areal_like.weights.hf_layout import HfTensor, adapter_tensors, hf_tensors
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, row_range, shards_of
from trainer.models.packed_model import PackedModel
from trainer.models.peft_folder import WEIGHTS_FILE
from trainer.models.safetensors_rows import INDEX_FILE, SINGLE_FILE

MASTER = "master"
FOLDER = "rows"
ROWS_INDEX = "index.json"
RANDOM_STATE_FILE, RANDOM_STATE = "random_state.safetensors", "random_state.cpu"


@dataclass(frozen=True, kw_only=True)
class TensorRows:
    """The location of the rows of one parameter."""

    shape: Sequence[int]
    """Shape of the whole parameter."""
    rows: Sequence[Sequence[int]]
    """[first, end) of the rows in each file of `ModelRows.files`; empty ranges are not in the file."""


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """The row files of one model."""

    num_updates: int
    """Updates of its optimizer, for Adam's bias correction."""
    dtype: str
    """Dtype of masters and moments: `float32`."""
    masters: Sequence[str]
    """Files of weights in the folder's parent that hold the masters; empty: the row files hold them."""
    files: Sequence[str]
    """Names of the row files, in the folder of the index."""
    tensors: Mapping[str, TensorRows]
    """Parameter's name -> place of its rows."""


class ModelFiles:
    """Writes one rank's part of one model: rows of its state, and for the policy its weights.

    It keeps the memory of its copy from checkpoint to checkpoint:

    take() on the training thread -> create() on rank 0 -> write() on every rank, in a thread
    """

    def __init__(
        self,
        name: str,
        model: PackedModel,
        optimizer: ModelState,
        ranks: Ranks,
        *,
        dtype: torch.dtype | None,
        max_file_bytes: int,
    ) -> None:
        """`name`: beginning of the row files' names. `dtype`: dtype of the weights' files; None: there are
        none."""
        self._optimizer = optimizer
        self._rank, world_size = ranks.rank, ranks.world_size
        self._copy = HostCopy(optimizer)
        self._weights: HfFiles | None = None
        if dtype is not None and model.has_adapter:
            tensors = adapter_tensors(model.model)
            self._weights = HfFiles(tensors, self._copy.dtype, single_file=WEIGHTS_FILE, max_file_bytes=None)
        elif dtype is not None:
            self._weights = HfFiles(
                hf_tensors(model.model),
                dtype,
                float32_names=model.float32_names,
                max_file_bytes=max_file_bytes,
            )
        masters: Sequence[str] = ()
        if self._weights is not None and self._weights.dtype == self._copy.dtype:
            masters = self._weights.names
        ranges = {
            shard.name: [
                row_range(shard.shape, rank=rank, world_size=world_size) for rank in range(world_size)
            ]
            for shard in shards_of(model, optimizer.shards)
        }
        self._first_rows = {name: of_ranks[self._rank][0] for name, of_ranks in ranges.items()}
        self.rows = ModelRows(
            num_updates=0,
            dtype=str(self._copy.dtype).removeprefix("torch."),
            masters=masters,
            files=[f"{name}-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)],
            tensors={
                shard.name: TensorRows(shape=tuple(shard.shape), rows=ranges[shard.name])
                for shard in shards_of(model, optimizer.shards)
            },
        )
        """Index of the row files that all ranks write."""

    def is_of(self, optimizer: ModelState) -> bool:
        """True if `take` copies the state of this optimizer and its model."""
        return self._optimizer is optimizer

    def take(self) -> None:
        """Copies the current state; not to be called while a checkpoint is being written."""
        self._copy.take()
        self.rows = replace(self.rows, num_updates=self._optimizer.num_updates)

    def create(self, directory: Path) -> None:
        if self._weights is not None:
            self._weights.create(directory)

    def write(self, directory: Path) -> None:
        """Writes and syncs this rank's rows. Raises OSError."""
        kinds = self._copy.kinds[1:] if self.rows.masters else self._copy.kinds
        shapes = {
            f"{kind}.{name}": tuple(value.shape)
            for kind in kinds
            for name, value in self._copy.values[kind].items()
            if value.numel()
        }
        layout = FileLayout.of(shapes, dict.fromkeys(shapes, self._copy.dtype))
        path = directory / FOLDER / self.rows.files[self._rank]
        layout.create(path)
        with _synced(path) as file:
            write_at(file, self._copy.flat(kinds), dtype=self._copy.dtype, offset=len(layout.header))
        if self._weights is not None:
            self._weights.write_rows(directory, self._copy.values[MASTER], self._first_rows)


class ModelState(Protocol):
    """The state of a model in a checkpoint: an optimizer, or a copy of a policy, which has no moments."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the moments."""

    @property
    def shards(self) -> Mapping[str, Tensor]:
        """This rank's part of each parameter that is trained, by the model's own names."""

    @property
    def num_updates(self) -> int:
        """Updates so far."""

    def moments(self, shard_name: str) -> Mapping[str, Tensor]:
        """Kind -> moment, for one shard."""

    def new_moments(self, *, num_updates: int) -> Mapping[str, Mapping[str, Tensor]]:
        """Moments after `num_updates` updates for the caller to fill, by shard and kind."""


class HostCopy:
    """A copy of one rank's masters and moments in host memory, written by a thread while training continues.

        take() on the training thread -> the thread writes `values` -> take() again, into the same memory

    The memory is allocated once and lies in the order of the rank's row file, so a row file is written in one
    piece. It is 12 bytes for each parameter of this rank (4 without moments), and pinned if the shards are on
    a GPU.
    """

    def __init__(self, optimizer: ModelState) -> None:
        self._optimizer = optimizer
        self.kinds = (MASTER, *optimizer.kinds)
        """The kinds of values that are kept for each parameter."""
        self._names = {name.removeprefix(MODEL_PREFIX): name for name in optimizer.shards}
        shards = {name: optimizer.shards[own] for name, own in self._names.items()}
        dtypes = {shard.dtype for shard in shards.values()}
        assert len(dtypes) == 1, f"masters of several dtypes: {dtypes}"
        (self.dtype,) = dtypes
        """Dtype of masters and moments."""
        places = [(kind, name, shard.shape) for kind in self.kinds for name, shard in shards.items()]
        sizes = [math.prod(shape) for _, _, shape in places]
        self._flat = torch.empty(sum(sizes), dtype=self.dtype)
        self._is_cuda = any(shard.is_cuda for shard in shards.values())
        if self._is_cuda:
            _pin(self._flat)
        self.values: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        """Kind -> parameter's Hugging Face name -> this rank's rows; views of one tensor, in this order."""
        for (kind, name, shape), part in zip(places, torch.split(self._flat, sizes), strict=True):
            self.values[kind][name] = part.view(shape)

    def take(self) -> None:
        """Replaces the copy by the current state. To be called in the training thread, not during a write."""
        for name, own in self._names.items():
            state = {MASTER: self._optimizer.shards[own].detach(), **self._optimizer.moments(own)}
            for kind in self.kinds:
                self.values[kind][name].copy_(state[kind], non_blocking=self._is_cuda)
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()

    def flat(self, kinds: tuple[str, ...]) -> Tensor:
        """The values of `kinds`, the last of `self.kinds`, in one tensor of one dimension, sharing memory."""
        assert kinds == self.kinds[-len(kinds) :]
        num_others = sum(v.numel() for kind in self.kinds[: -len(kinds)] for v in self.values[kind].values())
        return self._flat[num_others:]


def _pin(tensor: Tensor) -> None:
    """Pins memory in place: torch's own pinned allocations are rounded up to a power of two."""
    cudart, pointer = torch.cuda.cudart(), tensor.data_ptr()  # type: ignore[no-untyped-call]
    portable = 1
    torch.cuda.check_error(int(cudart.cudaHostRegister(pointer, tensor.numel() * tensor.itemsize, portable)))
    # Called before the memory is freed; otherwise the driver would keep pages that are reused for other
    # memory.
    weakref.finalize(tensor, cudart.cudaHostUnregister, pointer)


def write_index(
    folder: Path, models: Mapping[str, ModelRows], *, step: int, world_size: int, random_state: Tensor
) -> None:
    """Writes the index and the random state (uint8 [bytes]). On one rank."""
    index = {
        "step": step,
        "world_size": world_size,
        "models": {name: asdict(rows) for name, rows in models.items()},
    }
    (folder / ROWS_INDEX).write_text(json.dumps(index) + "\n")
    layout = FileLayout.of({RANDOM_STATE: tuple(random_state.shape)}, {RANDOM_STATE: torch.uint8})
    (folder / RANDOM_STATE_FILE).write_bytes(layout.header + bytes(random_state.tolist()))


def write_model_files(model: Any, directory: Path, *, dtype: torch.dtype) -> None:
    """Writes config.json and generation_config.json. `dtype`: dtype of the weights' files."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def write_tokenizer(directory: Path, path: str) -> None:
    """Writes the files of the tokenizer in `path`, a directory or hub name."""
    AutoTokenizer.from_pretrained(path, trust_remote_code=False).save_pretrained(directory)


MAX_FILE_BYTES = 5_000_000_000
"""Largest file; a tensor that is larger than this gets a file of its own."""


class HfFiles:
    """The files of one model's weights."""

    def __init__(
        self,
        tensors: Sequence[HfTensor],
        dtype: torch.dtype,
        *,
        float32_names: Collection[str] = (),
        single_file: str = SINGLE_FILE,
        max_file_bytes: int | None = MAX_FILE_BYTES,
    ) -> None:
        """`tensors`: all tensors of the checkpoint. `dtype`: their dtype in the files; `float32_names`:
        parameters whose tensors are float32 there all the same. `single_file`: name of the file if there is
        one; `max_file_bytes`: size from which on there are several, None: never."""
        self.dtype = dtype
        self._layouts: dict[str, FileLayout] = {}
        self._tensors: dict[str, list[HfTensor]] = {}
        """File name -> its tensors."""
        dtypes = {
            tensor.name: torch.float32 if tensor.param in float32_names else dtype for tensor in tensors
        }
        groups = [list(tensors)] if max_file_bytes is None else _cut(tensors, dtypes, max_file_bytes)
        for number, group in enumerate(groups, 1):
            name = single_file if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            # Wide numbers first: then every tensor begins at a multiple of its item size.
            ordered = sorted(group, key=lambda tensor: (-dtypes[tensor.name].itemsize, tensor.name))
            self._layouts[name] = FileLayout.of({tensor.name: tensor.shape for tensor in ordered}, dtypes)
            self._tensors[name] = group

    @property
    def names(self) -> list[str]:
        return list(self._layouts)

    def create(self, directory: Path) -> None:
        """Makes the files and their index. On one rank, before any rank writes."""
        for name, layout in self._layouts.items():
            layout.create(directory / name)
        if len(self._layouts) > 1:
            file_of = {tensor.name: name for name, group in self._tensors.items() for tensor in group}
            num_bytes = sum(
                place.num_bytes for layout in self._layouts.values() for place in layout.places.values()
            )
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write_rows(self, directory: Path, rows: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> None:
        """Writes this rank's rows of every parameter, and syncs the files.

        `rows`: parameter's name -> rows, on the CPU; `first_rows`: name -> index of the first of them.
        """
        for name, layout in self._layouts.items():
            with _synced(directory / name) as file:
                for tensor in self._tensors[name]:
                    part = tensor.part_in(rows[tensor.param], first_row=first_rows[tensor.param])
                    if part is not None:
                        place = layout.places[tensor.name]
                        offset = place.offset + part[1] * place.row_bytes
                        write_at(file, part[0], dtype=place.dtype, offset=offset)


def _cut(
    tensors: Sequence[HfTensor], dtypes: Mapping[str, torch.dtype], max_file_bytes: int
) -> list[list[HfTensor]]:
    """Cuts the tensors, in order, into groups of at most `max_file_bytes`."""
    groups: list[list[HfTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtypes[tensor.name].itemsize
        if groups[-1] and num_bytes + size > max_file_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(tensor)
        num_bytes += size
    return groups


CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
"""Dtypes in headers."""
_CHUNK_ELEMENTS = 4 << 20
"""Number of elements that are cast at once."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Place of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Place of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """The places of all tensors in a file."""

    header: bytes
    """The header, preceded by its length."""
    places: Mapping[str, TensorPlace]
    num_bytes: int
    """Size of the whole file."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> Self:
        """The tensors in the given order, without gaps. Ordered by decreasing item size and then by name, it
        is the layout that `save_file` writes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
            header[name] = {"dtype": CODES[dtypes[name]], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        places = {
            name: TensorPlace(dtype=dtypes[name], shape=shape, offset=data + header[name]["data_offsets"][0])
            for name, shape in shapes.items()
        }
        return cls(header=len(text).to_bytes(8, "little") + text, places=places, num_bytes=data + end)

    def create(self, path: Path) -> None:
        """Makes the file, with its header and its final size."""
        with path.open("wb") as file:
            file.write(self.header)
            file.truncate(self.num_bytes)


def write_at(file: int, tensor: Tensor, *, dtype: torch.dtype, offset: int) -> None:
    """Writes a CPU tensor, cast to `dtype`, at a byte offset of an open file. Raises OSError."""
    flat = tensor.detach().reshape(-1)
    for chunk in torch.split(flat, _CHUNK_ELEMENTS):
        data = _bytes_of(chunk.to(dtype))
        while data:
            num_written = os.pwrite(file, data, offset)
            data, offset = data[num_written:], offset + num_written


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of one dimension, sharing memory."""
    return flat.view(torch.uint8).numpy().data


@contextmanager
def _synced(path: Path) -> Iterator[int]:
    """An existing file, open for writing, which is synced at the end of the block."""
    file = os.open(path, os.O_WRONLY)
    try:
        yield file
        os.fsync(file)
    finally:
        os.close(file)
