"""Reads the header of a safetensors file: the places of its tensors, without their data.

The safetensors package gives no places, which are needed to copy the bytes of tensors of any dtype.

This module does not import torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, as in the library of the format."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The place of one tensor in a file."""

    name: str
    path: Path
    dtype: str
    """As in the file: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """Place of its first byte in the file."""
    num_bytes: int


def tensors_in(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of its header. Raises OSError, or ValueError for another format."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= _MAX_HEADER_BYTES else b""
        start = file.tell()
    found = []
    try:
        for name, facts in json.loads(text).items():
            if name == "__metadata__":
                continue
            begin, end = map(int, facts["data_offsets"])
            if not 0 <= begin <= end:
                raise ValueError(f"{name} is at {begin} to {end}")
            found.append(
                StoredTensor(
                    name=name,
                    path=path,
                    dtype=str(facts["dtype"]),
                    shape=tuple(map(int, facts["shape"])),
                    offset=start + begin,
                    num_bytes=end - begin,
                )
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error!r}") from None
    return found
