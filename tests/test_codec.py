"""The wire: what is encoded comes back equal, and whatever else arrives is a WireError and nothing worse."""

import dataclasses
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.codec import MAX_HEADER_BYTES, WIRE_VERSION, decode, encode
from areal_like.errors import WireError
from areal_like.messages.consumer import Books, Group, StartTraining
from areal_like.messages.hello import Refused
from areal_like.messages.producer import Lease, Leases, Purpose, SampleDone
from areal_like.trajectory import FinishReason, Trajectory


def trajectory(num_prompt: int = 3, num_sampled: int = 5, *, version: int = 7) -> Trajectory:
    num_tokens = num_prompt + num_sampled
    mask = np.r_[np.zeros(num_prompt), np.ones(num_sampled)].astype(np.uint8)
    return Trajectory(
        tokens=np.arange(num_tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=(-0.5 * mask).astype(np.float32),
        versions=np.where(mask == 1, version, -1).astype(np.int32),
        reward=0.25,
        reward_components={"exact": 0.25},
        finish_reason=FinishReason.STOP,
    )


def sample(**changes: object) -> SampleDone:
    return dataclasses.replace(SampleDone(lease_id=1, ticket_id=2, sample_index=0, trajectory=trajectory()), **changes)


def same(left: Trajectory, right: Trajectory) -> bool:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b:
            return False
    return True


@given(num_prompt=st.integers(0, 40), num_sampled=st.integers(1, 40), rid=st.integers(0, 2**40))
def test_trajectories_come_back_equal(num_prompt: int, num_sampled: int, rid: int) -> None:
    sent = sample(trajectory=trajectory(num_prompt, num_sampled))
    received, received_rid = decode(encode(sent, rid=rid))
    assert received_rid == rid
    assert same(received.trajectory, sent.trajectory)
    assert not received.trajectory.tokens.flags.writeable


def test_nested_lists_enums_unions_and_maps_come_back_equal() -> None:
    lease = Lease(lease_id=1, ticket_id=2, prompt_index=3, purpose=Purpose.EVAL, sample_indices=[0, 2], seed=9)
    for message in (
        Leases(leases=[lease]),
        StartTraining(step=3, stream={"cursor": 4, "pending": [1, 2]}),
        Books(tickets={"queued": 1}, drops={}, counters={"lag": 0.5}),
        Refused(field="model", reason="differs"),
    ):
        assert decode(encode(message)) == (message, 0)
    group = Group(step=1, position=0, ticket_id=5, prompt_index=9, trajectories=[trajectory(), trajectory(1, 2)], version_steps=[1, 1])
    received, _ = decode(encode(group))
    assert [same(a, b) for a, b in zip(received.trajectories, group.trajectories, strict=True)] == [True, True]


def header(**changes: object) -> list[bytes]:
    """A good sample's frames with some header parts replaced."""
    frames = encode(sample())
    parts = dict(zip(("version", "tag", "rid", "body"), msgpack.unpackb(frames[0]), strict=True)) | changes
    return [msgpack.packb(list(parts.values())), frames[1]]


def body(**changes: object) -> list[bytes]:
    good = msgpack.unpackb(encode(sample())[0])[3]
    return header(body=good | changes)


def inner(**changes: object) -> list[bytes]:
    good = msgpack.unpackb(encode(sample())[0])[3]
    return body(trajectory=good["trajectory"] | changes)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"garbage"],
        [b"\xc1"],
        [pickle.dumps({"a": 1})],
        [msgpack.packb([1, 2, 3])],
        [msgpack.packb({1: 2})],
        [msgpack.packb(msgpack.ExtType(1, b"x"))],
        [b"\x91" * 5000],
        [bytes(MAX_HEADER_BYTES + 1)],
        [b"a", b"b", b"c"],
        header(version=WIRE_VERSION + 1),
        header(version=True),
        header(tag="os.system"),
        header(tag=3),
        header(rid="x"),
        header(body=None),
        body(lease_id="1"),
        body(lease_id=1 << 63),
        body(lease_id=1.5),
        body(extra=1),
        body(trajectory=None),
        inner(tokens=[0, 1 << 40]),
        inner(tokens=[-8, 2]),
        inner(tokens=[4, 2]),
        inner(tokens=[0, -1]),
        inner(tokens=[0, 3]),
        inner(tokens="x"),
        inner(finish_reason="because"),
        inner(reward=float("nan")),
        inner(reward_components={"a": "b"}),
        inner(generation_s=float("inf")),
        encode(sample())[:1],
    ],
)
def test_bad_frames_are_wire_errors(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_random_frames_are_wire_errors(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


@given(st.data())
def test_a_flipped_byte_never_escapes(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(sample())]
    frame = frames[data.draw(st.integers(0, 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message, _ = decode([bytes(frame) for frame in frames])
    except WireError:
        return
    assert type(message).__name__ in ("SampleDone",)


def test_trajectories_check_themselves() -> None:
    good = trajectory()
    for change in (
        {"versions": np.full_like(good.versions, -1)},
        {"logprobs": good.logprobs + 1},
        {"logprobs": good.logprobs[:-1]},
        {"tokens": good.tokens - 1},
        {"tokens": good.tokens.astype(np.int64)},
        {"reward": float("inf")},
    ):
        with pytest.raises(ValueError, match=r"trajectory\."):
            dataclasses.replace(good, **change)
