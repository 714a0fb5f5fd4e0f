"""Records of conversations: segments, turns, metrics, label and arrays; hostile ones are refused.

tests/areal_like/test_codec.py has the records of plain trajectories.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.records import DTYPES, PLAIN, Record

TOKENS = 12
"""Tokens of `conversation`: two segments of 7 and 5; turns end at 4, 7 and 12."""


def conversation(**changes: Any) -> Trajectory:
    mask = np.array([0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1], np.uint8)
    fields: dict[str, Any] = {
        "tokens": np.arange(TOKENS, dtype=np.int32),
        "loss_mask": mask,
        "logprobs": (-0.5 * mask).astype(np.float32),
        "versions": np.where(mask == 1, 7, -1).astype(np.int32),
        "reward": 1.25,
        "reward_components": {"exact": 1.0},
        "segments": (7, 5),
        "turns": ((4, 0.25), (7, 0.0), (12, -0.5)),
        "metrics": {"tool calls": 2.0},
        "label": "math",
        "arrays": {
            "token_rewards": np.linspace(-1, 1, TOKENS, dtype=np.float32),
            "experts": np.arange(TOKENS * 6, dtype=np.uint8).reshape(TOKENS, 2, 3),
            "one": np.array(3, np.int64),
            "step_ends": np.array([10, 12], np.int32),
            "step_rewards": np.array([0.5, -0.5], np.float32),
        },
        "finish_reason": FinishReason.TURNS,
    }
    return Trajectory(**fields | changes)


def assert_same(left: Trajectory, right: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        a, b = (a, b) if isinstance(a, dict) else ({"": a}, {"": b})
        assert list(a) == list(b), field.name
        for name, value in a.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == b[name].dtype and value.shape == b[name].shape
            assert np.array_equal(value, b[name]), (field.name, name)


def test_conversation_survives_a_round_trip() -> None:
    sent = conversation()
    record = Record.opened(Record.of(2, 1, sent).data)
    assert_same(record.trajectory(), sent)
    assert (record.longest_segment, record.num_sampled) == (7, 7)
    assert not any(array.flags.writeable for array in record.trajectory().arrays.values())


@given(
    st.lists(st.tuples(st.sampled_from([-1, 0, 1, 2, 2**31 - 1]), st.integers(1, 3)), min_size=1, max_size=40)
)
def test_plain_records_are_valid_trajectories(runs: list[tuple[int, int]]) -> None:
    versions = np.concatenate([np.full(length, version, np.int32) for version, length in runs])
    mask = (versions >= 0).astype(np.uint8)
    sent = Trajectory(
        tokens=np.arange(len(versions), dtype=np.int32),
        loss_mask=mask,
        logprobs=(-0.5 * mask).astype(np.float32),
        versions=versions,
        reward=0.5,
        finish_reason=FinishReason.STOP,
    )
    record = Record.opened(Record.of(1, 0, sent).data)
    read = record.trajectory()
    assert_same(read, sent)
    # With the checks that a plain record's trajectory does without, and with all its fields.
    assert_same(dataclasses.replace(read), sent)
    assert vars(read).keys() == vars(sent).keys()
    assert record.oldest_version == read.oldest_version == sent.oldest_version


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    """A conversation of up to four segments of up to six tokens, with any of the optional parts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    segments = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    num_tokens = sum(segments)
    mask = (rng.random(num_tokens) < 0.5).astype(np.uint8)
    mask[-1] = 1
    ends = [int(end) for end in np.flatnonzero(mask)[:-1] + 1 if rng.random() < 0.5] + [num_tokens]
    arrays = {}
    for name in draw(st.lists(st.sampled_from(["a", "B.c-d_1", "x" * 64]), unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        tail = draw(st.lists(st.integers(1, 3), max_size=3))
        shape = draw(st.sampled_from([(), (1,), (num_tokens, *tail), (*tail, 2)]))
        arrays[name] = (rng.random(shape) * 100).astype(dtype)
    return conversation(
        tokens=rng.integers(0, 2**31 - 1, num_tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=-rng.random(num_tokens, np.float32) * mask,
        versions=np.where(mask, rng.integers(0, 3, num_tokens), -1).astype(np.int32),
        segments=draw(st.sampled_from([(), segments])),
        turns=draw(st.sampled_from([(), tuple((end, float(rng.normal())) for end in ends)])),
        metrics=draw(st.dictionaries(st.text(max_size=5), st.floats(-1e300, 1e300), max_size=3)),
        label=draw(st.sampled_from(["", "a label", "é" * 64])),
        arrays=arrays,
        finish_reason=draw(st.sampled_from(FinishReason)),
    )


@given(trajectories())
def test_any_conversation_survives_a_round_trip(sent: Trajectory) -> None:
    record = Record.of(2, 1, sent)
    opened = Record.opened(record.data)
    assert_same(opened.trajectory(), sent)
    assert opened.structure == record.structure
    assert len(record.data) % 8 == 0


def test_plain_records_have_the_bytes_of_the_release_before() -> None:
    nothing: dict[str, Any] = {"segments": (), "turns": (), "metrics": {}, "label": "", "arrays": {}}
    plain = conversation(**nothing, finish_reason=FinishReason.LENGTH)
    record = Record.of(2, 1, plain)
    assert record.structure is PLAIN
    assert hashlib.sha256(record.data).hexdigest() == (
        "639a6129462f503ebd525ae8c18100ed28d2e029a96509ad1cdddbc5b82e8680"
    )


# --- hostile records ---


def record_of(meta: Any, *, arrays: bytes) -> bytes:
    """A record with this metadata and these bytes behind them, with a correct checksum."""
    packed = msgpack.packb(meta)
    body = packed + bytes(-len(packed) % 8) + arrays
    identity = struct.pack("<IQII", 1, 2, len(packed), 0)
    checksum = zlib.crc32(identity + body)
    return struct.pack("<4sII", b"ATR1", 32 + len(body), checksum) + identity + body


def forged(rest: int = 0, **changes: Any) -> bytes:
    """A valid record with changes in the map of its metadata, and `rest` more bytes behind its arrays."""
    data = Record.of(2, 1, conversation()).data
    (meta_bytes,) = struct.unpack_from("<I", data, 24)
    meta = msgpack.unpackb(data[32 : 32 + meta_bytes])
    meta[8] = {name: value for name, value in (meta[8] | changes).items() if value is not None}
    return record_of(meta, arrays=data[32 + meta_bytes + -meta_bytes % 8 :] + bytes(rest))


def test_the_forgery_without_changes_is_accepted() -> None:
    assert_same(Record.opened(forged()).trajectory(), conversation())


def arrays(*changed: Any) -> list[Any]:
    """The three arrays of `conversation`, with these in place of the first."""
    others = [["experts", "uint8", [TOKENS, 2, 3]], ["one", "int64", []]]
    return [*changed, *others]


TOKEN_REWARDS = ["token_rewards", "float32", [TOKENS]]


@pytest.mark.parametrize(
    "changes",
    [
        {"segments": []},
        {"segments": [7, 4]},
        {"segments": [7, 5, 0]},
        {"segments": [13, -1]},
        {"segments": [7.0, 5.0]},
        {"segments": [True] * TOKENS},
        {"segments": [12, 1 << 31]},
        {"segments": {"7": 5}},
        {"segments": [1] * 1025},
        {"turns": []},
        {"turns": [[4, 0.25], [4, 0.0], [12, 0.0]]},
        {"turns": [[7, 0.25], [4, 0.0], [12, 0.0]]},
        {"turns": [[4, 0.25], [13, 0.0]]},
        {"turns": [[5, 0.25], [12, 0.0]]},
        {"turns": [[4, 0.25], [7, 0.0]]},
        {"turns": [[0, 0.25], [12, 0.0]]},
        {"turns": [[-1, 0.25], [12, 0.0]]},
        {"turns": [[4, float("nan")], [12, 0.0]]},
        {"turns": [[4, float("inf")], [12, 0.0]]},
        {"turns": [[4, 1], [12, 0.0]]},
        {"turns": [[4], [12, 0.0]]},
        {"turns": [[4, 0.0, 0.0], [12, 0.0]]},
        {"turns": [[12, 0.0]] * 1025},
        {"metrics": {}},
        {"metrics": {"a": "b"}},
        {"metrics": {"a": float("nan")}},
        {"metrics": {"a": 1}},
        {"metrics": [["a", 1.0]]},
        {"label": ""},
        {"label": "x" * 65},
        {"label": "a\nb"},
        {"label": b"x"},
        {"arrays": []},
        {"arrays": arrays(TOKEN_REWARDS) * 6},
        {"arrays": arrays(["token_rewards", "float32", [TOKENS]], ["one", "int8", [1]])},
        {"arrays": arrays(["", "float32", [TOKENS]])},
        {"arrays": arrays(["x" * 65, "float32", [TOKENS]])},
        {"arrays": arrays(["../../x", "float32", [TOKENS]])},
        {"arrays": arrays(["token_rewards", "object", [TOKENS]])},
        {"arrays": arrays(["token_rewards", "<f4", [TOKENS]])},
        {"arrays": arrays(["token_rewards", "int32", [TOKENS]])},
        {"arrays": arrays(["token_rewards", ["float32"], [TOKENS]])},
        {"arrays": arrays(["token_rewards", "float32", [2, 6]])},
        {"arrays": arrays(["token_rewards", "float32", [TOKENS + 2]])},
        {"arrays": arrays(["token_rewards", "float32", [-TOKENS]])},
        {"arrays": arrays(["token_rewards", "float32", [-4, -3]])},
        {"arrays": arrays(["token_rewards", "float32", [TOKENS, 0]])},
        {"arrays": arrays(["token_rewards", "float32", [1 << 31, 1 << 31, 1 << 31, 1 << 31]])},
        {"arrays": arrays(["token_rewards", "float32", [(1 << 31) - 1] * 8])},
        {"arrays": arrays(["token_rewards", "float32", [1] * 9])},
        {"arrays": arrays(["token_rewards", "float32", TOKENS])},
        {"arrays": arrays(["token_rewards", "float32"])},
        {"arrays": None},
        {"rest": 8},
        {"more": [1]},
        {"segments": None, "turns": None, "metrics": None, "label": None, "arrays": None},
    ],
    ids=str,
)
def test_hostile_structure_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Record.opened(forged(**changes))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("ends", [[11, 10], [0, 12], [12, 13], [8, 12], [-(1 << 31), 12]])
def test_steps_at_wrong_places_are_refused(ends: list[int]) -> None:
    good = conversation()
    assert good.steps == [(10, 0.5), (12, -0.5)]
    data = bytearray(Record.of(2, 1, good).data)
    data[-16:-8] = np.array(ends, np.int32).tobytes()  # the steps' rewards follow
    struct.pack_into("<I", data, 8, zlib.crc32(memoryview(data)[12:]))
    with pytest.raises(ValueError, match=r"trajectory\.step_ends"):
        Record.opened(bytes(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["token_rewards", "half"])
def test_arrays_with_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    good = conversation(arrays={name: np.ones(TOKENS, np.float16 if name == "half" else np.float32)})
    data = bytearray(Record.of(2, 1, good).data)
    bad = np.full(TOKENS, value, good.arrays[name].dtype).tobytes()
    data[-len(bad) :] = bad
    struct.pack_into("<I", data, 8, zlib.crc32(memoryview(data)[12:]))
    with pytest.raises(ValueError, match="finite"):
        Record.opened(bytes(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": {"a": np.ones(2, dtype=object)}},
        {"arrays": {"a": np.ones(2, dtype=bool)}},
        {"arrays": {"a": np.ones(2, dtype="U3")}},
        {"arrays": {"a": np.ones((2, 0))}},
        {"arrays": {"a": np.array([float("nan")])}},
        {"arrays": {"a/b": np.ones(2)}},
        {"arrays": {f"a{index}": np.ones(1) for index in range(17)}},
        {"label": "x" * 65},
        {"metrics": {f"{index:0100}": 0.5 for index in range(1000)}},
        {"segments": (1,) * 2000, "turns": ()},
    ],
    ids=lambda changes: str(list(changes)),
)
def test_what_a_record_cannot_hold_is_refused_at_the_sender(changes: dict[str, Any]) -> None:
    if "segments" in changes:
        whole = np.ones(2000, np.uint8)
        changes |= {
            "tokens": np.zeros(2000, np.int32),
            "loss_mask": whole,
            "logprobs": -whole.astype(np.float32),
            "versions": np.zeros(2000, np.int32),
            "arrays": {},
        }
    with pytest.raises(ValueError, match=r"."):
        Record.of(2, 1, conversation(**changes))


def test_arrays_of_other_byte_order_and_strides_are_packed() -> None:
    table = np.arange(24, dtype=">i4").reshape(4, 6)
    sent = conversation(arrays={"t": table.T[::2]})
    received = Record.opened(Record.of(2, 1, sent).data).trajectory().arrays["t"]
    assert received.dtype == np.dtype("<i4") and np.array_equal(received, table.T[::2])
