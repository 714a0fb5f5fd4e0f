"""An endless, reproducible stream of malformed frames."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import msgpack

from areal_like.errors import WireError
from areal_like.wire.codec import WIRE_VERSION, decode, encode
from areal_like.wire.messages.consumer import Fetch, StartTraining
from areal_like.wire.messages.producer import (
    SampleAck,
    SampleAcks,
    SampleDone,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.records import Record
from tests.support.ledger_simulation import trajectory


class _Bomb:
    """Ends the process if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was opened')",)


def malformed(seed: int) -> Iterator[list[bytes]]:
    """Yields messages that `decode` refuses; the same ones for the same seed."""
    rng = random.Random(seed)
    good = [
        encode(Samples(samples=[SampleDone(lease_id=1, record=Record.of(1, 0, trajectory([0, 0, 0])))])),
        encode(SampleAcks(acks=[SampleAck(lease_id=1, sample_indices=[0])])),
        encode(Fetch(step=0, position=0), rid=1),
        encode(StartTraining(step=0, stream={"cursor": 1, "pending": [1, 2]}), rid=2),
        encode(
            ServerHeartbeat(
                state=ServerState.SERVING, free_samples=1, holding_samples=0, weights_version=0, leases=[1]
            )
        ),
    ]
    kinds = [_truncated, _flipped, _extended, _of_wrong_types, _nested, _pickled, _random]
    for number in count():
        frames = kinds[number % len(kinds)](list(rng.choice(good)), rng)
        if _is_refused(frames):
            yield frames


def _is_refused(frames: list[bytes]) -> bool:
    try:
        decode(frames)
    except WireError:
        return True
    return False


def _truncated(frames: list[bytes], rng: random.Random) -> list[bytes]:
    at = rng.randrange(len(frames))
    frames[at] = frames[at][: rng.randrange(len(frames[at]))]
    return frames


def _flipped(frames: list[bytes], rng: random.Random) -> list[bytes]:
    header = bytearray(frames[0])
    for _ in range(rng.randrange(1, 9)):
        header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
    return [bytes(header), *frames[1:]]


def _extended(frames: list[bytes], rng: random.Random) -> list[bytes]:
    return [*frames, *(rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 4)))]


def _of_wrong_types(frames: list[bytes], rng: random.Random) -> list[bytes]:
    version, tag, rid, body = msgpack.unpackb(frames[0])
    wrong: Any = rng.choice(
        [
            None,
            -1,
            2**64 - 1,
            float("nan"),
            "x" * rng.randrange(1000),
            [1] * rng.randrange(100),
            {},
            b"\0" * 9,
            True,
        ]
    )
    body[rng.choice(list(body))] = wrong
    return [msgpack.packb([version, tag, rid, body]), *frames[1:]]


def _nested(frames: list[bytes], rng: random.Random) -> list[bytes]:
    depth = rng.randrange(1, 5000)
    return [msgpack.packb([WIRE_VERSION, "Fetch", 1])[:-1] + b"\x91" * depth + b"\xc0", *frames[1:]]


def _pickled(frames: list[bytes], rng: random.Random) -> list[bytes]:
    return [pickle.dumps(_Bomb(), protocol=rng.randrange(6)), *frames[1:]]


def _random(frames: list[bytes], rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 4))]
