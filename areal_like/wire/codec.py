"""Encodes messages as frames and decodes them: a msgpack header, and one frame of raw little-endian arrays.

    frame 0   msgpack [WIRE_VERSION, tag, rid, {field: value}]: numbers, strings, lists, maps; an array or
              record appears as its span [offset, length] in frame 1
    frame 1   the bytes of all arrays and records, each aligned to 8; absent if the message has none

The message's dataclass is the schema: types and dtypes come from its annotations and never from the wire, so
a peer supplies only offsets and lengths, and both are checked. Decoded arrays are read-only views of frame 1.
Records (records.py) are copied out of frame 1, so that a record that is kept does not keep the whole frame in
memory; each record verifies its own checksum. Anything malformed raises WireError. Encoders and decoders are
compiled once for each class, because every sample passes through them.

Left out: compression (float log-probs do not compress) and schema evolution within a wire version (`hello`
refuses a mismatch).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgpack
import numpy as np

from areal_like.errors import WireError, WireVersionError
from areal_like.wire.messages import MESSAGES, TAGS
from areal_like.wire.records import Record
from areal_like.wire.unpacking import unpack

WIRE_VERSION = 4
MAX_HEADER_BYTES = 4 << 20
_MIN_CONTAINER_BYTES = 6
"""Fewest bytes per list or map in a long header; it bounds how many of them a header can contain. The densest
message is `Group`, with a span (at least 5 bytes) and a step per record."""
_ALIGN = 8

Frame = bytes | memoryview


class _Writer:
    """Collects the bytes of one message's arrays and records, and returns their spans."""

    __slots__ = ("chunks", "size")

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.size = 0

    def add(self, array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> list[int]:
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"want a 1-D {dtype} array, got {array.dtype}{list(array.shape)}")
        span = [self.size, len(array)]
        self.put(np.ascontiguousarray(array).view(np.uint8).data if len(array) else b"")
        return span

    def put(self, data: Frame) -> None:
        self.chunks.append(data)
        self.size += len(data)
        if padding := -self.size % _ALIGN:
            self.chunks.append(bytes(padding))
            self.size += padding


class _Reader:
    """Frame 1 of one message."""

    __slots__ = ("data", "num_copied")

    def __init__(self, data: Frame) -> None:
        self.data = data
        self.num_copied = 0

    def span(self, raw: Any, *, itemsize: int) -> tuple[int, int]:
        """(offset, length), checked: they come from the peer's header and may be anything."""
        if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not int or type(raw[1]) is not int:
            raise TypeError("want [offset, length] of an array or record")
        offset, length = raw
        if offset < 0 or length < 0 or offset % _ALIGN or offset + length * itemsize > len(self.data):
            raise ValueError(f"[{offset}, {length}] is outside its frame of {len(self.data)} bytes")
        return offset, length

    def copy(self, offset: int, length: int) -> bytes:
        self.num_copied += length
        # Otherwise a small header could refer to the same bytes a hundred thousand times.
        if self.num_copied > len(self.data):
            raise ValueError("records overlap")
        return bytes(self.data[offset : offset + length])


_Encode = Callable[[Any, _Writer], Any]
_Decode = Callable[[Any, _Reader], Any]


def encode(message: Any, *, rid: int = 0) -> list[bytes]:
    """Frames of a message.

    `rid` matches a reply to its request; 0: one-way. Raises ValueError for an overlong header.
    """
    tag = TAGS[type(message)]
    writer = _Writer()
    body = _ENCODERS[tag](message, writer)
    header = msgpack.packb([WIRE_VERSION, tag, rid, body])
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{tag} needs a header of {len(header)} bytes; peers accept at most {MAX_HEADER_BYTES}"
        )
    return [header, b"".join(writer.chunks)] if writer.chunks else [header]


def decode(frames: Sequence[Frame]) -> tuple[Any, int]:
    """(message, rid) of the frames. Raises WireError for anything that `encode` would not write."""
    if not 1 <= len(frames) <= 2:
        raise WireError(f"want 1 or 2 frames, got {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(frames[0])} bytes is over the limit of {MAX_HEADER_BYTES}")
    try:
        header = unpack(frames[0], max_containers=len(frames[0]) // _MIN_CONTAINER_BYTES)
    except ValueError as error:
        raise WireError(f"header is not msgpack: {error}") from None
    if not isinstance(header, list) or len(header) != 4:
        raise WireError("header is not [wire version, tag, rid, body]")
    version, tag, rid, body = header
    if version != WIRE_VERSION or type(version) is not int:
        raise WireVersionError(
            f"the peer uses wire version {version!r} and this side {WIRE_VERSION}: "
            "run the same release on both"
        )
    if type(rid) is not int or not isinstance(tag, str) or tag not in _DECODERS:
        raise WireError(f"unknown message {str(tag)[:40]!r}")
    try:
        return _DECODERS[tag](body, _Reader(frames[1] if len(frames) == 2 else b"")), rid
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"{tag}: {error}") from None


def _compile(hint: Any) -> tuple[_Encode, _Decode]:
    """Encoder and decoder for one annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return (lambda value, _: value), (lambda raw, _: raw)
    if origin is np.ndarray:
        return _compile_array(np.dtype(typing.get_args(args[1])[0]).newbyteorder("<"))
    if origin is list:
        return _compile_list(*_compile(args[0]))
    if origin is dict:
        return _compile_dict(*_compile(args[1]))
    if origin in (types.UnionType, typing.Union):
        return _compile_union(args)
    if hint is Record:
        return _write_record, _read_record
    if dataclasses.is_dataclass(hint):
        return _compile_dataclass(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return (lambda value, _: value.value), (lambda raw, _: hint(raw))
    if hint in (int, float, str, bool):
        return _compile_scalar(hint)
    raise TypeError(f"no wire form for {hint!r}")


def _compile_scalar(hint: type) -> tuple[_Encode, _Decode]:
    def read(raw: Any, _: _Reader) -> Any:
        if type(raw) is not hint:
            if hint is float and type(raw) is int:
                return float(raw)
            raise TypeError(f"want {hint.__name__}, got {type(raw).__name__}")
        if type(raw) is int and not -1 << 63 <= raw < 1 << 63:
            raise ValueError(f"{raw} does not fit into 64 bits with a sign")
        # NaN and infinity would break the receiver's timers, sums and JSON documents.
        if isinstance(raw, float) and not math.isfinite(raw):
            raise ValueError(f"{raw} is not finite")
        return raw

    return (lambda value, _: value), read


def _compile_union(args: tuple[Any, ...]) -> tuple[_Encode, _Decode]:
    """A union of types that msgpack distinguishes (`int | list[int]`)."""
    kinds = {typing.get_origin(arg) or arg: _compile(arg) for arg in args}

    def read(raw: Any, reader: _Reader) -> Any:
        if type(raw) not in kinds:
            raise TypeError(f"want one of {[kind.__name__ for kind in kinds]}, got {type(raw).__name__}")
        return kinds[type(raw)][1](raw, reader)

    return (lambda value, writer: kinds[type(value)][0](value, writer)), read


def _compile_array(dtype: np.dtype[Any]) -> tuple[_Encode, _Decode]:
    def write(value: Any, writer: _Writer) -> Any:
        return writer.add(value, dtype)

    def read(raw: Any, reader: _Reader) -> Any:
        offset, length = reader.span(raw, itemsize=dtype.itemsize)
        if not length:
            return np.empty(0, dtype)
        return np.frombuffer(reader.data, dtype=dtype, count=length, offset=offset)

    return write, read


def _write_record(record: Record, writer: _Writer) -> list[int]:
    span = [writer.size, len(record.data)]
    writer.put(record.data)
    return span


def _read_record(raw: Any, reader: _Reader) -> Record:
    return Record.opened(reader.copy(*reader.span(raw, itemsize=1)))


def _compile_list(encode_item: _Encode, decode_item: _Decode) -> tuple[_Encode, _Decode]:
    def read(raw: Any, reader: _Reader) -> Any:
        if type(raw) is not list:
            raise TypeError(f"want a list, got {type(raw).__name__}")
        return [decode_item(item, reader) for item in raw]

    return (lambda value, writer: [encode_item(item, writer) for item in value]), read


def _compile_dict(encode_item: _Encode, decode_item: _Decode) -> tuple[_Encode, _Decode]:
    def read(raw: Any, reader: _Reader) -> Any:
        if type(raw) is not dict or not all(type(key) is str for key in raw):
            raise TypeError("want a map with string keys")
        return {key: decode_item(item, reader) for key, item in raw.items()}

    return (lambda value, writer: {key: encode_item(item, writer) for key, item in value.items()}), read


def _compile_dataclass(cls: type) -> tuple[_Encode, _Decode]:
    hints = typing.get_type_hints(cls)
    parts = [(field.name, *_compile(hints[field.name])) for field in dataclasses.fields(cls)]
    names = [name for name, _, _ in parts]

    def write(value: Any, writer: _Writer) -> Any:
        return {name: encode_field(getattr(value, name), writer) for name, encode_field, _ in parts}

    def read(raw: Any, reader: _Reader) -> Any:
        if type(raw) is not dict or len(raw) != len(parts):
            raise TypeError(f"{cls.__name__} needs exactly the fields {names}")
        try:
            return cls(**{name: decode_field(raw[name], reader) for name, _, decode_field in parts})
        except KeyError as missing:
            raise TypeError(f"{cls.__name__} lacks {missing}") from None

    return write, read


_COMPILED = {tag: _compile(cls) for tag, cls in MESSAGES.items()}
_ENCODERS = {tag: pair[0] for tag, pair in _COMPILED.items()}
_DECODERS = {tag: pair[1] for tag, pair in _COMPILED.items()}
