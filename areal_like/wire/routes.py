"""Routes: the experts that a mixture of experts chose for each token, from the engine to the trainer.

With `model.router_replay` the trainer repeats the engine's choice of experts (R3, arXiv 2510.11370, section
4) instead of making its own, which differs where the scores of two experts are close. The routes of a token
are those of its first forward pass, whose logits gave the log-prob of the next token. Later passes over the
same token, which rebuild its KV (after a push, or for the next turn of a conversation), do not change them.
So every token of a sequence has routes but its last one, which was sampled and never went through the model.

Routes are many times larger than the rest of a sample (384 bytes a token for 48 layers of 8 experts, where a
record takes 8). So they travel beside the record: in a frame of their own on the wire, and in a block of
their own in a segment file, right after the record. The record names the block's checksum, length and shape.

     0 magic "ATX1" | num_bytes u32 | crc32 u32 | tokens u32 | experts u32 | layers u16 | chosen u16 | 0 u64
    32 chosen experts uint8[tokens, layers, chosen] (uint16 if there are more than 256), padded to 8 bytes

Little-endian. As in a record, the checksum covers everything after it. The order of a token's experts has no
meaning.

Shape suffixes: T tokens, L layers with experts, K experts per token.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

MAGIC = b"ATX1"
_HEADER = struct.Struct("<4sIIIIHHQ")
_CHECKED_FROM = 12
_ALIGN = 8
MAX_EXPERTS = 1 << 16
"""Largest number of experts in a layer."""
MAX_LAYERS = 1 << 12
MAX_EXPERTS_PER_TOKEN = 1 << 10
_MAX_BYTES = (1 << 32) - 1


class RoutesSpec(NamedTuple):
    """What a record says about its routes."""

    crc32: int
    """Checksum of the block."""
    num_bytes: int
    """Bytes of the block, header and padding included."""
    shape: tuple[int, int, int]
    """(T, L, K)"""

    def check(self) -> None:
        """Raises ValueError unless a block can have this length and shape."""
        num_tokens, num_layers, num_chosen = self.shape
        if not (
            0 <= self.crc32 < 1 << 32
            and 0 <= num_tokens < 1 << 32
            and 0 < num_layers <= MAX_LAYERS
            and 0 < num_chosen <= MAX_EXPERTS_PER_TOKEN
        ):
            raise ValueError(f"{self} is not a checksum, a length and a shape of routes")
        size = num_tokens * num_layers * num_chosen
        if self.num_bytes > _MAX_BYTES or self.num_bytes not in (_padded(size), _padded(2 * size)):
            raise ValueError(f"routes of {self.num_bytes} bytes cannot have the shape {list(self.shape)}")


class RoutesShape(NamedTuple):
    """What the routes of all tokens of a model have in common."""

    num_layers: int
    """Layers with experts (L)."""
    num_chosen: int
    """Experts per token (K)."""
    num_experts: int
    """Experts in each layer."""

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_chosen * dtype_of(self.num_experts).itemsize

    def block_bytes(self, num_tokens: int) -> int:
        """Bytes of the block of so many tokens."""
        return _padded(self.bytes_per_token * num_tokens)

    def check(self) -> None:
        """Raises ValueError for numbers that no routes can have."""
        limits = (MAX_LAYERS, MAX_EXPERTS_PER_TOKEN, MAX_EXPERTS)
        if not all(0 < number <= limit for number, limit in zip(self, limits, strict=True)):
            raise ValueError(f"{self}: want 1 to {limits}")


@dataclass(frozen=True, eq=False)
class Routes:
    """The chosen experts of T adjacent tokens.

    Raises ValueError for another shape or dtype, and for an expert that does not exist.
    """

    experts_TLK: NDArray[np.uint8] | NDArray[np.uint16]
    """Indices of the chosen experts: uint8 if there are at most 256 experts, else uint16."""
    num_experts: int
    """Experts in each layer."""

    def __post_init__(self) -> None:
        if not 0 < self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"routes: want 1 to {MAX_EXPERTS} experts, got {self.num_experts}")
        experts, dtype = self.experts_TLK, dtype_of(self.num_experts)
        if experts.dtype != dtype or experts.ndim != 3:
            raise ValueError(f"routes: want {dtype.name}[T, L, K], got {experts.dtype}{list(experts.shape)}")
        _, num_layers, num_chosen = experts.shape
        if not 0 < num_layers <= MAX_LAYERS or not 0 < num_chosen <= MAX_EXPERTS_PER_TOKEN:
            raise ValueError(f"routes: {num_layers} layers with {num_chosen} experts per token")
        if experts.size and int(experts.max()) >= self.num_experts:
            raise ValueError(f"routes: expert {experts.max()} of {self.num_experts}")

    @classmethod
    def of(cls, experts_TLK: NDArray[Any], *, num_experts: int) -> Self:
        """Routes of integers of any dtype. Raises ValueError for an expert that does not exist."""
        # Before the conversion, which would wrap them around.
        if experts_TLK.size and not 0 <= int(experts_TLK.min()) <= int(experts_TLK.max()) < num_experts:
            low, high = experts_TLK.min(), experts_TLK.max()
            raise ValueError(f"routes: experts {low} to {high}, and there are {num_experts}")
        return cls(experts_TLK.astype(dtype_of(num_experts), copy=False), num_experts)

    @classmethod
    def joined(cls, parts: Sequence[Routes]) -> Self:
        """The routes of several runs of tokens, one after another; at least one.

        Raises ValueError if they are not of the same model.
        """
        if len({(part.num_experts, part.experts_TLK.shape[1:]) for part in parts}) != 1:
            raise ValueError("routes of different models cannot be joined")
        return cls(np.concatenate([part.experts_TLK for part in parts]), parts[0].num_experts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decodes and checks a block; its array is a read-only view of the bytes.

        Raises ValueError for bytes that `to_bytes` would not return.
        """
        if len(data) < _HEADER.size:
            raise ValueError(f"the routes are cut off after {len(data)} bytes")
        magic, num_bytes, crc32, num_tokens, num_experts, num_layers, num_chosen, reserved = (
            _HEADER.unpack_from(data)
        )
        if magic != MAGIC or num_bytes != len(data) or reserved or not 0 < num_experts <= MAX_EXPERTS:
            raise ValueError(f"{len(data)} bytes are not routes: wrong magic, length or number of experts")
        dtype, size = dtype_of(num_experts), num_tokens * num_layers * num_chosen
        if _padded(size * dtype.itemsize) != len(data):
            raise ValueError(f"{num_tokens} tokens do not make routes of {len(data)} bytes")
        if zlib.crc32(memoryview(data)[_CHECKED_FROM:]) != crc32:
            raise ValueError("the routes do not match their checksum")
        experts = np.frombuffer(data, dtype, size, _HEADER.size)
        routes = cls(experts.reshape(num_tokens, num_layers, num_chosen), num_experts)
        routes.__dict__["_data"] = data
        return routes

    def to_bytes(self) -> bytes:
        """The block of these routes. Raises ValueError if it is 4 GiB or longer."""
        return self._data

    @cached_property
    def _data(self) -> bytes:
        experts = self.experts_TLK
        num_tokens, num_layers, num_chosen = experts.shape
        num_bytes = _padded(experts.nbytes)
        if num_bytes > _MAX_BYTES:
            raise ValueError(f"routes of {num_bytes} bytes are too long for a block")
        shape = struct.pack("<IIHHQ", num_tokens, self.num_experts, num_layers, num_chosen, 0)
        array = np.ascontiguousarray(experts, dtype=experts.dtype.newbyteorder("<")).tobytes()
        padding = bytes(num_bytes - _HEADER.size - len(array))
        crc32 = zlib.crc32(padding, zlib.crc32(array, zlib.crc32(shape)))
        data = b"".join((struct.pack("<4sII", MAGIC, num_bytes, crc32), shape, array, padding))
        # From now on a view of the block, so that the experts are in memory only once.
        view = np.frombuffer(data, experts.dtype, experts.size, _HEADER.size).reshape(experts.shape)
        object.__setattr__(self, "experts_TLK", view)
        return data

    @property
    def spec(self) -> RoutesSpec:
        """What the record of these routes says about them. Raises ValueError as `to_bytes`."""
        data, (num_tokens, num_layers, num_chosen) = self.to_bytes(), self.experts_TLK.shape
        return RoutesSpec(
            crc32=_HEADER.unpack_from(data)[2],
            num_bytes=len(data),
            shape=(num_tokens, num_layers, num_chosen),
        )

    @property
    def shape(self) -> RoutesShape:
        """What these routes say about their model."""
        _, num_layers, num_chosen = self.experts_TLK.shape
        return RoutesShape(num_layers=num_layers, num_chosen=num_chosen, num_experts=self.num_experts)

    @property
    def num_tokens(self) -> int:
        return len(self.experts_TLK)

    def rows(self, start: int, end: int) -> Routes:
        """The routes of tokens `start` to `end` - 1."""
        if (start, end) == (0, self.num_tokens):
            return self
        return Routes(self.experts_TLK[start:end], self.num_experts)


def dtype_of(num_experts: int) -> np.dtype[Any]:
    """The dtype of the indices of so many experts."""
    return np.dtype("u1" if num_experts <= 256 else "<u2")


def _padded(num_bytes: int) -> int:
    """Bytes of a block with an array of so many bytes."""
    return _HEADER.size + num_bytes + -num_bytes % _ALIGN
