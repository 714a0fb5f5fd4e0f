"""Safetensors files that are written by byte ranges.

The rows of a tensor are contiguous in a file, so each rank can write its own rows of a file that all ranks
share. The safetensors package writes whole files from one process.

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

CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""Dtypes in headers."""
_CHUNK_ELEMENTS = 4 << 20
"""Elements that are cast at a time."""


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
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
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


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of one dimension, sharing memory."""
    return flat.view(torch.uint8).numpy().data
