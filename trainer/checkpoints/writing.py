"""Writes one rank's part of a checkpoint: its rows of the masters, the moments and the weights' files.

    rows/index.json                             step, world size, and for each model a `ModelRows`
    rows/policy-00000-of-00004.safetensors      rank 0's rows: `exp_avg.NAME`, `exp_avg_sq.NAME`, and
                                                `master.NAME` unless the weights' files hold them exactly
    rows/critic-00000-of-00004.safetensors      the same for the critic, if there is one
    rows/prm-00000-of-00004.safetensors         and for the reward model of `advantage=prime`
    rows/proximal-00000-of-00004.safetensors    `master.NAME` of the proximal policy, if there is one
    rows/random_state.safetensors               rank 0's random state
    adapter_model.safetensors                   the policy's adapter, of which it is the master, if there is
                                                one; the base is not written
    model.safetensors                           else the policy's weights for engines and users, if all fit
                                                into one file
    model-00001-of-00002.safetensors ...        else, with
    model.safetensors.index.json                the file of each tensor

The last of these files hold the tensors of the initial model that training leaves as they are
(`areal_like/weights/untrained.py`): encoders of other inputs, correction biases of routers, layers for
speculative decoding. Their bytes are copied from its files, piece by piece, and the ranks share the work.

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
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import (
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from areal_like.errors import ConfigError, first_line
from areal_like.weights.hf_layout import HfTensor, adapter_tensors, hf_tensors
from areal_like.weights.safetensors_header import StoredTensor, tensors_in
from areal_like.weights.untrained import is_wrapped, text_config
from trainer.distributed.pinning import host_empty
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, row_range, shards_of
from trainer.models.packed_model import PackedModel
from trainer.models.peft_folder import WEIGHTS_FILE
from trainer.models.safetensors_rows import INDEX_FILE, SINGLE_FILE, find_file

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
        self._rank, self._world_size = ranks.shard_rank, ranks.num_shards
        world_size = self._world_size
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
                untouched=model.untouched(),
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
            self._weights.copy_untouched(directory, rank=self._rank, world_size=self._world_size)


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
        self._is_cuda = any(shard.is_cuda for shard in shards.values())
        self._flat = host_empty((sum(sizes),), self.dtype, pinned=self._is_cuda)
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


_PROCESSOR_FILES = (
    PROCESSOR_NAME,
    FEATURE_EXTRACTOR_NAME,
    VIDEO_PROCESSOR_NAME,
    CHAT_TEMPLATE_FILE,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)
"""Files of a model with other inputs than text, for those who use it with them."""


def write_model_files(model: Any, directory: Path, *, base: str, dtype: torch.dtype) -> None:
    """Writes config.json, generation_config.json and the files of processors.

    `base`: directory or name of the initial model; its other inputs keep their configuration. `dtype`: dtype
    of the weights' files. Raises ConfigError if a file of `base` cannot be read, and OSError.
    """
    config = copy.deepcopy(model.config)
    if is_wrapped(config):
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{base}: its config.json cannot be read ({first_line(error)})") from error
        config.architectures = [type(model).__name__]
        text_config(config).dtype = dtype
    config.dtype = dtype
    config.save_pretrained(directory)
    if model.generation_config is not None:
        # Not `save_pretrained`: it refuses what it has read, such as a temperature without `do_sample`.
        model.generation_config.to_json_file(
            directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"]
        )
    for name in _PROCESSOR_FILES if is_wrapped(config) else ():
        if (file := find_file(base, name)) is not None:
            shutil.copyfile(file, directory / name)


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
        untouched: Sequence[StoredTensor] = (),
        single_file: str = SINGLE_FILE,
        max_file_bytes: int | None = MAX_FILE_BYTES,
    ) -> None:
        """`tensors`: all tensors of the checkpoint that are trained. `dtype`: their dtype in the files;
        `float32_names`: parameters whose tensors are float32 there all the same. `untouched`: tensors of
        other files that are copied. `single_file`: name of the file if there is one; `max_file_bytes`: size
        from which on there are several, None: never."""
        self.dtype = dtype
        self._layouts: dict[str, FileLayout] = {}
        self._tensors: dict[str, list[HfTensor]] = {}
        """File name -> its tensors."""
        self._copies: dict[str, list[StoredTensor]] = {}
        """File name -> the tensors that are copied into it."""
        self._dtypes = {
            tensor.name: torch.float32 if tensor.param in float32_names else dtype for tensor in tensors
        }
        groups = _cut(
            tensors,
            lambda tensor: math.prod(tensor.shape) * self._dtypes[tensor.name].itemsize,
            max_file_bytes,
        )
        # In this order every tensor begins at a multiple of the size of its numbers, as in `save_file`.
        by_size = sorted(untouched, key=lambda stored: (-_item_bytes(stored), stored.name))
        copies = _cut(by_size, lambda stored: stored.num_bytes, max_file_bytes) if untouched else []
        total = len(groups) + len(copies)
        names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        if total == 1:
            names = [single_file]
        for name, group in zip(names, groups, strict=False):
            ordered = sorted(group, key=lambda tensor: (-self._dtypes[tensor.name].itemsize, tensor.name))
            shapes = {tensor.name: tensor.shape for tensor in ordered}
            self._layouts[name] = FileLayout.of(shapes, self._dtypes)
            self._tensors[name] = group
        for name, copied in zip(names[len(groups) :], copies, strict=True):
            self._layouts[name] = FileLayout.of_stored(copied)
            self._copies[name] = copied

    @property
    def names(self) -> list[str]:
        """The files with tensors that are trained."""
        return list(self._tensors)

    def create(self, directory: Path) -> None:
        """Makes the files and their index. On one rank, before any rank writes."""
        for name, layout in self._layouts.items():
            layout.create(directory / name)
        if len(self._layouts) > 1:
            file_of = {tensor: name for name, layout in self._layouts.items() for tensor in layout.places}
            num_bytes = sum(
                place.num_bytes for layout in self._layouts.values() for place in layout.places.values()
            )
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write_rows(self, directory: Path, rows: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> None:
        """Writes this rank's rows of every parameter, and syncs the files.

        `rows`: parameter's name -> rows, on the CPU; `first_rows`: name -> index of the first of them.
        """
        for name, tensors in self._tensors.items():
            places = self._layouts[name].places
            with _synced(directory / name) as file:
                for tensor in tensors:
                    part = tensor.part_in(rows[tensor.param], first_row=first_rows[tensor.param])
                    if part is not None:
                        place = places[tensor.name]
                        offset = place.offset + part[1] * place.row_bytes
                        write_at(file, part[0], dtype=self._dtypes[tensor.name], offset=offset)

    def copy_untouched(self, directory: Path, *, rank: int = 0, world_size: int = 1) -> None:
        """Copies this rank's share of the files that are copies, and syncs them.

        Raises ConfigError if a file that is copied is gone or has changed, and OSError.
        """
        for number, (name, copied) in enumerate(self._copies.items()):
            if number % world_size != rank:
                continue
            places = self._layouts[name].places
            with _synced(directory / name) as file:
                for path in sorted({stored.path for stored in copied}):
                    of_path = {places[each.name].offset: each for each in copied if each.path == path}
                    _copy(path, of_path, into=file)


_Item = TypeVar("_Item")


def _cut(
    items: Sequence[_Item], num_bytes_of: Callable[[_Item], int], max_file_bytes: int | None
) -> list[list[_Item]]:
    """Cuts tensors, in order, into groups of at most `max_file_bytes`; None: one group."""
    groups: list[list[_Item]] = [[]]
    num_bytes = 0
    for item in items:
        size = num_bytes_of(item)
        if max_file_bytes is not None and groups[-1] and num_bytes + size > max_file_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(item)
        num_bytes += size
    return groups


_COPIED_BYTES = 8 << 20
"""Bytes that are copied at once."""


def _copy(path: Path, tensors: Mapping[int, StoredTensor], *, into: int) -> None:
    """Copies tensors of a file into an open file. `tensors`: their places there -> tensors."""
    try:
        # Read again: if the file was replaced during the run, its tensors are at other places.
        there = set(tensors_in(path))
        with path.open("rb") as source:
            for offset, stored in tensors.items():
                if stored not in there:
                    raise ConfigError(f"{path}: {stored.name} is no longer there: {_KEEP_IT}")
                source.seek(stored.offset)
                left, to = stored.num_bytes, offset
                while left:
                    piece = memoryview(source.read(min(left, _COPIED_BYTES)))
                    if not piece:
                        raise ConfigError(f"{path} ends before {stored.name} does: {_KEEP_IT}")
                    left -= len(piece)
                    while piece:
                        num_written = os.pwrite(into, piece, to)
                        piece, to = piece[num_written:], to + num_written
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {_KEEP_IT}") from None


_KEEP_IT = "every checkpoint copies a part of the initial model: keep its files until the run has ended"


def _item_bytes(stored: StoredTensor) -> int:
    return stored.num_bytes // max(1, math.prod(stored.shape))


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

    offset: int
    """Place of its first byte in the file."""
    num_bytes: int
    row_bytes: int
    """Bytes of one index of dimension 0."""


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
        sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        return cls._of({name: (CODES[dtypes[name]], shape, sizes[name]) for name, shape in shapes.items()})

    @classmethod
    def of_stored(cls, tensors: Sequence[StoredTensor]) -> Self:
        """The tensors of other files in the given order, without gaps."""
        return cls._of({each.name: (each.dtype, each.shape, each.num_bytes) for each in tensors})

    @classmethod
    def _of(cls, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> Self:
        """`tensors`: name -> (dtype as in a header, shape, number of bytes)."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (code, shape, num_bytes) in tensors.items():
            begin, end = end, end + num_bytes
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        places = {
            name: TensorPlace(
                offset=data + header[name]["data_offsets"][0],
                num_bytes=num_bytes,
                row_bytes=num_bytes // max(1, shape[0] if shape else 1),
            )
            for name, (_, shape, num_bytes) in tensors.items()
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
