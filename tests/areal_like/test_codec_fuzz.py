"""The codec under mutated messages of every type: WireError and nothing else, at once, and without growth."""

from __future__ import annotations

import random
import time
from functools import partial
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.errors import WireError
from areal_like.runtime.freed_memory import resident_bytes
from areal_like.wire.codec import MESSAGES, decode, encode
from tests.support.cpu_time import cpu_units
from tests.support.wire_mutation import encoded, mutated

MOST_UNITS = 8
"""Of `cpu_units`: one message takes no longer."""


def decode_all(seed: int, *, num_frames: int) -> int:
    """Number of refused messages; each is decoded or refused at once."""
    num_refused = 0
    for frames in islice(mutated(random.Random(seed)), num_frames):
        started_s = time.process_time()
        num_refused += is_refused(frames)
        # One measurement may hold a collection of garbage, or a busy machine's other work.
        if time.process_time() - started_s > 0.01:
            assert cpu_units(partial(is_refused, frames)) < MOST_UNITS
    return num_refused


def is_refused(frames: list[bytes]) -> bool:
    """False if it can be decoded and encoded again."""
    try:
        message, rid = decode(frames)
    except WireError as error:
        assert len(str(error)) < 500
        return True
    encode(message, rid=rid)
    return False


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_survives_a_round_trip(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(20):
        frames = encoded(rng, kinds=[MESSAGES[kind]])
        message, rid = decode(frames)
        assert type(message) is MESSAGES[kind] and encode(message, rid=rid) == frames


@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 32))
def test_mutated_messages_are_refused_or_decoded(seed: int) -> None:
    assert decode_all(seed, num_frames=100) > 50


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_million_mutated_messages_are_decoded_or_refused() -> None:
    decode_all(0, num_frames=100_000)
    before_bytes = resident_bytes()
    num_refused = decode_all(1, num_frames=1_000_000)
    grown_bytes = resident_bytes() - before_bytes
    print(f"{num_refused} refused, grown by {grown_bytes} bytes")
    assert grown_bytes < 8 << 20
