"""Encoded messages of every type, and mutations of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import struct
import types
import typing
import zlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import msgpack
import numpy as np

from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.codec import WIRE_VERSION, encode
from areal_like.wire.messages import MESSAGES
from areal_like.wire.records import Record

Frames = list[bytes]
_RECORD = struct.Struct("<IIIQII")
"""A record's header behind the magic."""
_NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**63,
    2**64 - 1,
    float("nan"),
    float("-inf"),
    1e308,
    "",
    "x" * 5000,
    "\x00/../../etc/passwd",
    b"\x00" * 9,
    [],
    [[]] * 500,
    [0] * 2000,
    [1, "a", None],
    [0, 1 << 40],
    {},
    {"": 0},
    {str(index): index for index in range(300)},
)


def record(rng: random.Random) -> Record:
    """A valid record of a few tokens; every second one is of a conversation."""
    num_tokens = rng.randrange(1, 20)
    mask = np.arange(num_tokens) >= num_tokens // 2
    trajectory = Trajectory(
        tokens=np.arange(num_tokens, dtype=np.int32),
        loss_mask=mask.astype(np.uint8),
        logprobs=(-0.5 * mask).astype(np.float32),
        versions=np.where(mask, 3, -1).astype(np.int32),
        reward=0.5,
        reward_components={"part": 0.5},
        finish_reason=FinishReason.STOP,
    )
    if rng.random() < 0.5:
        trajectory = dataclasses.replace(
            trajectory,
            segments=(num_tokens // 2, num_tokens - num_tokens // 2) if num_tokens > 1 else (1,),
            turns=((num_tokens, 0.25),),
            metrics={"calls": 2.0},
            label="task",
            arrays={"token_rewards": np.zeros(num_tokens, np.float32), "ids": np.zeros((2, 3), np.int16)},
            finish_reason=FinishReason.CONTEXT,
        )
    return Record.of(rng.randrange(1 << 40), rng.randrange(8), trajectory)


def example(hint: Any, rng: random.Random) -> Any:
    """A value of an annotation of a message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    aliased = getattr(origin, "__value__", None)  # of a type statement
    if aliased is not None:
        return example(aliased[args], rng)
    if origin is list:
        return [example(args[0], rng) for _ in range(rng.randrange(4))]
    if origin is np.ndarray:
        dtype = typing.get_args(args[1])[0]
        return np.array([rng.randrange(8) for _ in range(rng.choice([0, 7]))], dtype)
    if origin is dict:
        return {f"key {index}": example(args[1], rng) for index in range(rng.randrange(4))}
    if origin in (types.UnionType, typing.Union):
        return example(rng.choice(args), rng)
    if hint is Any:
        return rng.choice([1, "text", ["a"], [[1, 2]]])
    if hint is Record:
        return record(rng)
    if dataclasses.is_dataclass(hint):
        hints = _hints_of(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        while True:  # a message may refuse values that its annotations allow
            with contextlib.suppress(ValueError):
                return typing.cast(type, hint)(**{name: example(hints[name], rng) for name in names})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return rng.choice(list(hint))
    choices: dict[Any, list[Any]] = {
        int: [0, 1, 7, 300, 1 << 31, (1 << 63) - 1],
        float: [0.0, 0.5, -1.0, 1e9],
        str: ["", "rollout-0", "tcp://127.0.0.1:1", "x" * 100],
        bool: [False, True],
    }
    return rng.choice(choices[hint])


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def encoded(rng: random.Random, *, kinds: typing.Collection[type] | None = None) -> Frames:
    """The frames of a message of a random type (of `kinds`)."""
    return encode(example(rng.choice(list(kinds or MESSAGES.values())), rng), rid=rng.choice([0, 1, 1 << 40]))


def mutated(
    rng: random.Random, *, kinds: typing.Collection[type] | None = None, valid: float = 0.0
) -> Iterator[Frames]:
    """Endless: a message with one to three mutations; unchanged with probability `valid`."""
    while True:
        frames = encoded(rng, kinds=kinds)
        if rng.random() >= valid:
            for _ in range(rng.randrange(1, 4)):
                frames = rng.choice(_MUTATIONS)(frames, rng)
        yield frames


def _flip(frames: Frames, rng: random.Random) -> Frames:
    at, changed = _one(frames, rng)
    for _ in range(rng.randrange(1, 9)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return _with(frames, at, bytes(changed))


def _replace_metadata(frames: Frames, rng: random.Random) -> Frames:
    """Puts a value of the wrong type or size into the metadata of a record, whose checksum is mended."""
    if len(frames) < 2 or (start := frames[1].find(b"ATR1")) < 0 or len(frames[1]) < start + 32:
        return frames
    num_bytes, _, sample_index, ticket_id, meta_bytes, _ = _RECORD.unpack_from(frames[1], start + 4)
    body = frames[1][start + 32 : start + num_bytes]
    try:
        meta = msgpack.unpackb(body[:meta_bytes], strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return frames
    if not isinstance(meta, (list, dict)) or not meta:
        return frames
    _put_anywhere(meta, rng)
    packed = msgpack.packb(meta)
    body = packed + bytes(-len(packed) % 8) + body[meta_bytes + -meta_bytes % 8 :]
    identity = struct.pack("<IQII", sample_index, ticket_id, len(packed), 0)
    crc32 = zlib.crc32(body, zlib.crc32(identity))
    changed = struct.pack("<4sII", b"ATR1", 32 + len(body), crc32) + identity + body
    # The header's span is wrong now if the length has changed; a message of this one record has a right one.
    done = {"lease_id": 1, "record": [0, len(changed)], "failure": ""}
    return [msgpack.packb([WIRE_VERSION, "Samples", 0, {"samples": [done]}]), changed]


def _cut(frames: Frames, rng: random.Random) -> Frames:
    at, changed = _one(frames, rng)
    return _with(frames, at, bytes(changed[: rng.randrange(len(changed) + 1)]))


def _insert(frames: Frames, rng: random.Random) -> Frames:
    at, changed = _one(frames, rng)
    place = rng.randrange(len(changed) + 1)
    changed[place:place] = rng.choice(
        [rng.randbytes(5), changed[:20], b"\xdd\xff\xff\xff\xff", b"\x91" * 2000]
    )
    return _with(frames, at, bytes(changed))


def _replace_value(frames: Frames, rng: random.Random) -> Frames:
    """Puts a value of the wrong type or size anywhere into the body, or into the header."""
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=False) if frames else None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return frames
    holder = {"": header}
    _put_anywhere(holder, rng)
    return [msgpack.packb(holder[""]), *frames[1:]]


def _put_anywhere(root: Any, rng: random.Random) -> None:
    """Replaces a value at a random depth of a list or map."""
    holder, key = root, rng.choice(_keys(root))
    for _ in range(rng.randrange(5)):
        value = holder[key]
        if not isinstance(value, (list, dict)) or not value:
            break
        holder, key = value, rng.choice(_keys(value))
    holder[key] = rng.choice(_NASTY)


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _change_number_of_frames(frames: Frames, rng: random.Random) -> Frames:
    return rng.choice(
        [frames[:1], frames[1:], frames * 2, [*frames, b""], [*frames, rng.randbytes(50)], [b""]]
    )


def _one(frames: Frames, rng: random.Random) -> tuple[int, bytearray]:
    at = rng.randrange(len(frames)) if frames else 0
    return at, bytearray(frames[at] if frames else b"")


def _with(frames: Frames, at: int, changed: bytes) -> Frames:
    return [*frames[:at], changed, *frames[at + 1 :]]


_MUTATIONS: list[Callable[[Frames, random.Random], Frames]] = [
    _flip,
    _cut,
    _insert,
    _replace_value,
    _replace_value,
    _replace_metadata,
    _change_number_of_frames,
]
