"""Encodes messages as frames and decodes them: a msgpack header, and one frame of raw little-endian arrays.

    frame 0   msgpack [WIRE_VERSION, tag, rid, {field: value}]: numbers, strings, lists, maps; an array or
              record appears as its span [offset, length] in frame 1
    frame 1   the bytes of all arrays and records, each aligned to 8; absent if the message has none
    frame 2.. the routes (routes.py) of the records that have some, a frame for each, in the same order; only
              with `model.router_replay`

The message's dataclass is the schema: types and dtypes come from its annotations and never from the wire, so
a peer supplies only offsets and lengths, and both are checked. Decoded arrays are read-only views of frame 1.
Records (records.py) are copied out of frame 1, so that a record that is kept does not keep the whole frame in
memory; each record verifies its own checksum. A frame of routes belongs to one record and is kept as it is.
Anything malformed raises WireError. Encoders and decoders are compiled once for each class, because every
sample passes through them.

Nothing is unpacked for a peer that may not send it. `read_prefix` takes version, tag and rid from the first
bytes, refuses an unknown tag, and refuses a header over the limit of its message type: MAX_HEADER_BYTES, or
the class's own `max_header_bytes` with the reason next to it. `unpacking.py` bounds the remaining work, so
that no accepted header takes 50 ms. `encode` refuses messages that the other side would not accept.

Left out: compression (float log-probs do not compress) and schema evolution within a wire version (`hello`
refuses a mismatch).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgpack
import numpy as np

from areal_like.errors import WireError, WireVersionError
from areal_like.wire.limits import shortened
from areal_like.wire.messages import MESSAGES, TAGS
from areal_like.wire.records import Record
from areal_like.wire.unpacking import unpack

WIRE_VERSION = 11
MAX_HEADER_BYTES = 64 << 10
"""Limit of a header whose class states no `max_header_bytes` of its own."""
MAX_TEXT = 8192
"""Characters of a text on the wire. `encode` cuts longer ones: they are errors of engines and rewards, which
may have any length and must not prevent a message from being sent."""
MAX_ROUTES = 1 << 14
"""Frames of routes in one message: more than the records of any group."""
_ALIGN = 8
_ARRAY_OF_4 = 0x94
_UINT_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
"""msgpack's type byte of an unsigned integer -> size of the integer that follows it, in bytes."""

Frame = bytes | memoryview


class _Writer:
    """Collects the bytes of one message's arrays and records, and returns their spans."""

    __slots__ = ("chunks", "routes", "size")

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.routes: list[bytes] = []
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
    """Frame 1 of one message, and the frames of routes after it."""

    __slots__ = ("data", "num_copied", "routes")

    def __init__(self, data: Frame, routes: Iterable[Frame] = ()) -> None:
        self.data = data
        self.routes = iter(routes)
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


class HeaderPrefix(NamedTuple):
    """The first three fields of a header, read without unpacking the fourth."""

    tag: str
    kind: type
    """Class of the message."""
    rid: int
    body_at: int
    """Offset of the body."""


def encode(message: Any, *, rid: int = 0) -> list[bytes]:
    """Frames of a message.

    `rid` matches a reply to its request; 0: one-way. Raises ValueError for a header that peers would refuse.
    """
    tag = TAGS[type(message)]
    writer = _Writer()
    body = _ENCODERS[tag](message, writer)
    header = msgpack.packb([WIRE_VERSION, tag, rid, body])
    if len(header) > HEADER_LIMITS[tag]:
        raise ValueError(
            f"{tag} needs a header of {len(header)} bytes; peers accept at most {HEADER_LIMITS[tag]}"
        )
    if len(header) > MAX_HEADER_BYTES:
        unpack(header)  # raises ValueError for more lists than a peer accepts
    return [header, b"".join(writer.chunks), *writer.routes] if writer.chunks else [header]


def read_prefix(frames: Sequence[Frame]) -> HeaderPrefix:
    """Tag and rid of a message, from a few bytes.

    Raises WireVersionError for another wire version, and WireError for an unknown tag, a header over the
    limit of its message type, and anything else that `encode` would not begin with.
    """
    if not 1 <= len(frames) <= 2 + MAX_ROUTES:
        raise WireError(f"want 1 to {2 + MAX_ROUTES} frames, got {len(frames)}")
    header = frames[0]
    try:
        if header[0] != _ARRAY_OF_4:
            raise WireError("header is not [wire version, tag, rid, body]")
        if header[1] != WIRE_VERSION:
            theirs = header[1] if header[1] < 0x80 else "128 or more"  # such a number takes more bytes
            raise WireVersionError(
                f"the peer uses wire version {theirs} and this side {WIRE_VERSION}: "
                "run the same release on both"
            )
        rid_at = 3 + (header[2] & 0x1F)
        name = bytes(header[2:rid_at])
        if (kind := _PACKED_TAGS.get(name)) is None:
            raise WireError(f"unknown message {name[1:]!r}")
        rid, body_at = header[rid_at], rid_at + 1
        if rid >= 0x80:
            body_at += _UINT_BYTES.get(rid, -1)
            rid = int.from_bytes(header[rid_at + 1 : body_at])
            if body_at == rid_at:
                raise WireError("the request id is not a number")
    except IndexError:
        raise WireError(f"header of {len(header)} bytes is cut off") from None
    tag = TAGS[kind]
    if len(header) > (limit := HEADER_LIMITS[tag]):
        raise WireError(f"{tag}: header of {len(header)} bytes is over the limit of {limit}")
    return HeaderPrefix(tag=tag, kind=kind, rid=rid, body_at=body_at)


def decode(frames: Sequence[Frame], prefix: HeaderPrefix | None = None) -> tuple[Any, int]:
    """(message, rid) of the frames. Raises WireError for anything that `encode` would not write.

    `prefix`: the prefix of these frames, if it was already read.
    """
    prefix = prefix or read_prefix(frames)
    try:
        body = unpack(memoryview(frames[0])[prefix.body_at :])
        reader = _Reader(frames[1] if len(frames) > 1 else b"", frames[2:])
        message = _DECODERS[prefix.tag](body, reader)
        if next(reader.routes, None) is not None:
            raise ValueError("there are more frames of routes than records with routes")
        return message, prefix.rid
    except (ValueError, TypeError, OverflowError) as error:
        raise WireError(f"{prefix.tag}: {str(error)[:200]}") from None


def _compile(hint: Any) -> tuple[_Encode, _Decode]:
    """Encoder and decoder for one annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    aliased = getattr(origin, "__value__", None)  # of a type statement, which is what NDArray is in numpy 2.5
    if aliased is not None:
        return _compile(aliased[args])
    if hint is Any:
        return _same, (lambda raw, _: raw)
    if origin is np.ndarray:
        return _compile_array(np.dtype(typing.get_args(args[1])[0]).newbyteorder("<"))
    if origin is list:
        whole = {int: _compile_integers, float: _compile_floats}.get(args[0])
        return whole() if whole else _compile_list(*_compile(args[0]))
    if origin is dict:
        return _compile_dict(*_compile(args[1]))
    if origin in (types.UnionType, typing.Union):
        return _compile_union(args)
    if hint is Record:
        return _write_record, _read_record
    if dataclasses.is_dataclass(hint):
        return _compile_dataclass(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _compile_enum(hint)
    if hint in (int, float, str, bool):
        return _compile_scalar(hint)
    raise TypeError(f"no wire form for {hint!r}")


def _same(value: Any, _: _Writer) -> Any:
    return value  # msgpack writes it unchanged


def _compile_scalar(hint: type) -> tuple[_Encode, _Decode]:
    def read_int(raw: Any, _: _Reader) -> Any:
        if type(raw) is not int:
            raise TypeError(f"want int, got {type(raw).__name__}")
        if not -1 << 63 <= raw < 1 << 63:
            raise ValueError(f"{raw} does not fit into 64 bits with a sign")
        return raw

    def read_float(raw: Any, _: _Reader) -> Any:
        if type(raw) is int:
            return float(raw)
        if type(raw) is not float:
            raise TypeError(f"want float, got {type(raw).__name__}")
        # NaN and infinity would break the receiver's timers, sums and JSON documents.
        if not math.isfinite(raw):
            raise ValueError(f"{raw} is not finite")
        return raw

    def read(raw: Any, _: _Reader) -> Any:
        if type(raw) is not hint:
            raise TypeError(f"want {hint.__name__}, got {type(raw).__name__}")
        return raw

    if hint is str:
        return (lambda value, _: shortened(value, max_chars=MAX_TEXT)), read
    return _same, {int: read_int, float: read_float}.get(hint, read)


def _compile_enum(hint: type[Enum]) -> tuple[_Encode, _Decode]:
    members = {member.value: member for member in hint}

    def read(raw: Any, _: _Reader) -> Any:
        if type(raw) is not str or raw not in members:
            raise TypeError(f"want one of {list(members)}")
        return members[raw]

    return (lambda value, _: value.value), read


def _compile_integers() -> tuple[_Encode, _Decode]:
    """`list[int]`, checked as a whole: the longest ones have a few hundred thousand integers."""

    def read(raw: Any, _: _Reader) -> Any:
        if type(raw) is not list or set(map(type, raw)) - {int}:
            raise TypeError("want a list of integers")
        if raw and max(raw) >= 1 << 63:
            raise ValueError(f"{max(raw)} does not fit into 64 bits with a sign")
        return raw

    return _same, read


def _compile_floats() -> tuple[_Encode, _Decode]:
    """`list[float]`, in which an integer is refused: it may take one byte where its number takes nine, so
    what was read from a header within its limit could not be written again."""

    def read(raw: Any, _: _Reader) -> Any:
        if type(raw) is not list or set(map(type, raw)) - {float}:
            raise TypeError("want a list of floats")
        if not all(map(math.isfinite, raw)):
            raise ValueError("a number of a list is not finite")
        return raw

    return (lambda value, _: [float(number) for number in value]), read


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
    if record.routes is not None:
        writer.routes.append(record.routes.to_bytes())
    elif record.lacks_routes:
        raise ValueError(
            f"the routes of sample {record.sample_index} of ticket {record.ticket_id} are missing"
        )
    return span


def _read_record(raw: Any, reader: _Reader) -> Record:
    record = Record.opened(reader.copy(*reader.span(raw, itemsize=1)))
    if not record.lacks_routes:
        return record
    routes = next(reader.routes, None)
    if routes is None:
        raise ValueError("the routes of a record are missing")
    return record.with_routes(bytes(routes))


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
    plain = [name for name, encode_field, _ in parts if encode_field is _same]
    others = [(name, encode_field) for name, encode_field, _ in parts if encode_field is not _same]

    def write(value: Any, writer: _Writer) -> Any:
        raw = {name: getattr(value, name) for name in plain}
        for name, encode_field in others:
            raw[name] = encode_field(getattr(value, name), writer)
        return raw

    def read(raw: Any, reader: _Reader) -> Any:
        if type(raw) is not dict or len(raw) != len(parts):
            raise TypeError(f"{cls.__name__} needs exactly the fields {[name for name, *_ in parts]}")
        try:
            return cls(**{name: decode_field(raw[name], reader) for name, _, decode_field in parts})
        except KeyError as missing:
            raise TypeError(f"{cls.__name__} lacks {missing}") from None

    return write, read


_COMPILED = {tag: _compile(cls) for tag, cls in MESSAGES.items()}
HEADER_LIMITS = {tag: getattr(cls, "max_header_bytes", MAX_HEADER_BYTES) for tag, cls in MESSAGES.items()}
"""Tag -> longest header, in bytes."""
_ENCODERS = {tag: pair[0] for tag, pair in _COMPILED.items()}
_DECODERS = {tag: pair[1] for tag, pair in _COMPILED.items()}
_PACKED_TAGS = {msgpack.packb(tag): cls for tag, cls in MESSAGES.items()}
"""msgpack's bytes of a tag -> class."""
