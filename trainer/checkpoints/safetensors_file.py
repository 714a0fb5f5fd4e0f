"""Safetensors files that are written and read by byte ranges.

The rows of a tensor are contiguous in a file, so each rank writes its own rows of a file that all ranks
share, and reads only the rows it needs, directly into the tensor they are for. The safetensors package writes
whole files from one process, and reads through a memory map whose pages count as the process's memory.

The format: 8 bytes with the length of the header (little-endian), the header (JSON: dtype, shape and position
of each tensor), the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from areal_like.errors import ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Codes in the header; `U8` only for the random state."""
_CODES = {dtype: code for code, dtype in DTYPES.items()} | {torch.uint8: "U8"}
_MAX_HEADER_BYTES = 100_000_000
"""The package's own limit."""
_CHUNK_ELEMENTS = 4 << 20
"""Elements that are cast, or read into other memory, at a time."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Place of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """Where each tensor of a file is."""

    header: bytes
    """With its length in front."""
    entries: Mapping[str, Entry]
    num_bytes: int
    """Of the whole file."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Self:
        """The tensors in the given order, without gaps. In order of their names: what `save_file` writes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        entries = {
            name: Entry(dtype=dtype, shape=shape, offset=data + header[name]["data_offsets"][0])
            for name, shape in shapes.items()
        }
        return cls(header=len(text).to_bytes(8, "little") + text, entries=entries, num_bytes=data + end)

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


class SafetensorsReader:
    """An open file. Close it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is missing, truncated or no safetensors file."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): resume from another step") from None
        try:
            self.entries: Mapping[str, Entry] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def entry(self, name: str, *, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Entry:
        """Raises ConfigError if the file has no tensor of that name, shape and (if given) dtype."""
        entry = self.entries.get(name)
        if entry is None:
            raise ConfigError(
                f"{self._path} has no {name}: resume with the model that the run began with, or from "
                "another step"
            )
        if entry.shape != shape:
            raise ConfigError(
                f"{self._path}: {name} has shape {entry.shape} there and {shape} in this model; "
                "resume with the model that the run began with"
            )
        if dtype is not None and entry.dtype != dtype:
            raise ConfigError(
                f"{self._path}: {name} is {entry.dtype} there and {dtype} in its index: "
                "resume from another step"
            )
        return entry

    def read(self, entry: Entry, into: Tensor, *, first: int) -> None:
        """Reads len(into) rows from row `first` on into a tensor of any dtype and device.

        A contiguous CPU tensor of the file's dtype is read without a copy.
        """
        into, offset = into.detach(), entry.offset + first * entry.row_bytes
        if into.device.type == "cpu" and into.dtype == entry.dtype and into.is_contiguous():
            self._read_bytes(_bytes_of(into.reshape(-1)), offset)
            return
        rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, math.prod(entry.shape[1:])))
        for chunk in torch.split(into, rows_at_once):
            staged = torch.empty(chunk.shape, dtype=entry.dtype)
            self._read_bytes(_bytes_of(staged.reshape(-1)), offset)
            chunk.copy_(staged)
            offset += len(chunk) * entry.row_bytes

    def _read_bytes(self, data: memoryview, offset: int) -> None:
        while data:
            num_read = os.preadv(self._file, [data], offset)
            if not num_read:
                raise ConfigError(f"{self._path} is truncated: resume from another step")
            data, offset = data[num_read:], offset + num_read

    def _read_header(self) -> dict[str, Entry]:
        try:
            length = int.from_bytes(os.pread(self._file, 8, 0), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(os.pread(self._file, length, 8))
            header.pop("__metadata__", None)
            entries = {name: _entry(fields, data=8 + length) for name, fields in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self._path} cannot be read (no safetensors file: {error!r}): resume from another step"
            ) from None
        end = max((entry.offset + entry.num_bytes for entry in entries.values()), default=8 + length)
        if (num_bytes := os.fstat(self._file).st_size) != end:
            raise ConfigError(
                f"{self._path} cannot be read (it has {num_bytes} bytes, and {end} in its header): "
                "resume from another step"
            )
        return entries


def _entry(fields: dict[str, Any], *, data: int) -> Entry:
    begin, end = map(int, fields["data_offsets"])
    dtype = torch.uint8 if fields["dtype"] == "U8" else DTYPES[fields["dtype"]]
    entry = Entry(dtype=dtype, shape=tuple(map(int, fields["shape"])), offset=data + begin)
    if begin < 0 or min(entry.shape, default=0) < 0 or entry.num_bytes != end - begin:
        raise ValueError(f"offsets {begin} to {end} of a tensor of shape {list(entry.shape)}")
    return entry


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of one dimension, sharing memory."""
    return flat.view(torch.uint8).numpy().data
