"""Routes: their block, their place beside a record, and their frames on the wire."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, WireError
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.codec import decode, encode
from areal_like.wire.fingerprint import shared_settings
from areal_like.wire.messages.consumer import Group
from areal_like.wire.messages.hello import Role
from areal_like.wire.messages.producer import BATCH_BYTES, SampleDone, Samples
from areal_like.wire.records import Record, count_whole_records
from areal_like.wire.routes import Routes, RoutesShape, RoutesSpec, dtype_of

GOLDEN_SAMPLES = (
    (
        "940ba753616d706c65730081a773616d706c65739183a86c656173655f696401a67265636f72649200cca0a7"
        "6661696c757265a0"
    ),
    (
        "41545231a0000000b8886f6c0000000002000000000000002b0000000000000098099292ff01920308cb3fe0"
        "00000000000080a473746f70cb0000000000000000cb0000000000000000c200000000000000000001000000"
        "020000000300000004000000050000000600000007000000080000000000000000000080000000bf000000bf"
        "000000bf000000bf000000bf000000bf000000bf000000bf00000000"
    ),
)
"""The frames of `message(sample(9))`, as the release before routes sent them."""


def experts(num_tokens: int, *, layers: int = 3, chosen: int = 2, num_experts: int = 8) -> NDArray[Any]:
    rng = np.random.default_rng([num_tokens, layers, chosen, num_experts])
    drawn = rng.integers(0, num_experts, (num_tokens, layers, chosen))
    return drawn.astype(dtype_of(num_experts))


def routes(num_tokens: int, **sizes: int) -> Routes:
    return Routes(experts(num_tokens, **sizes), sizes.get("num_experts", 8))


def sample(num_tokens: int, *, segments: tuple[int, ...] = (), routes: Routes | None = None) -> Trajectory:
    """Every token but the first was sampled."""
    mask = np.ones(num_tokens, np.uint8)
    mask[0] = 0
    return Trajectory(
        tokens=np.arange(num_tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=(-0.5 * mask).astype(np.float32),
        versions=np.where(mask == 1, 3, -1).astype(np.int32),
        reward=0.5,
        segments=segments,
        turns=((num_tokens, 0.0),) if segments else (),
        finish_reason=FinishReason.STOP,
        routes=routes,
    )


def message(*samples: Trajectory) -> Samples:
    return Samples(
        samples=[SampleDone(lease_id=1, record=Record.of(2, index, one)) for index, one in enumerate(samples)]
    )


@given(
    num_tokens=st.integers(0, 40),
    layers=st.integers(1, 5),
    chosen=st.integers(1, 9),
    num_experts=st.sampled_from([1, 8, 256, 257, 65536]),
)
def test_a_block_survives_a_round_trip(num_tokens: int, layers: int, chosen: int, num_experts: int) -> None:
    sent = routes(num_tokens, layers=layers, chosen=chosen, num_experts=num_experts)
    block = sent.to_bytes()
    received = Routes.from_bytes(block)
    assert np.array_equal(received.experts_TLK, sent.experts_TLK) and received.num_experts == num_experts
    assert received.experts_TLK.dtype == (np.uint8 if num_experts <= 256 else np.uint16)
    assert not received.experts_TLK.flags.writeable
    assert received.spec == sent.spec == RoutesSpec(sent.spec.crc32, len(block), (num_tokens, layers, chosen))
    sent.spec.check()
    shape = RoutesShape(layers, chosen, num_experts)
    assert len(block) == shape.block_bytes(num_tokens) and len(block) % 8 == 0


@given(data=st.data())
def test_a_changed_block_is_refused(data: st.DataObject) -> None:
    block = bytearray(routes(5).to_bytes())
    at = data.draw(st.integers(0, len(block) - 1))
    block[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="routes"):
        Routes.from_bytes(bytes(block))
    for cut in (bytes(block[:at]), bytes(block) + bytes(8)):
        with pytest.raises(ValueError, match="routes"):
            Routes.from_bytes(cut)


@given(content=st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="routes"):
        Routes.from_bytes(content)


def test_an_expert_that_does_not_exist_is_refused() -> None:
    wrong = experts(4)
    wrong[2, 1, 0] = 8
    for make in (lambda: Routes(wrong, 8), lambda: Routes.of(wrong.astype(np.int32), num_experts=8)):
        with pytest.raises(ValueError, match="expert"):
            make()
    for number in (-1, 8, 256 + 3, 1 << 31):  # the conversion to uint8 would make 3 of the third
        with pytest.raises(ValueError, match="experts"):
            Routes.of(np.full((1, 1, 2), number, np.int64), num_experts=8)
    forged = bytearray(routes(4).to_bytes())
    forged[32] = 8
    forged[8:12] = zlib.crc32(bytes(forged[12:])).to_bytes(4, "little")
    with pytest.raises(ValueError, match="expert 8 of 8"):
        Routes.from_bytes(bytes(forged))


@pytest.mark.parametrize(
    ("array", "num_experts"),
    [
        (np.zeros((3, 2), np.uint8), 8),
        (np.zeros((3, 2, 2), np.uint16), 8),
        (np.zeros((3, 2, 2), np.uint8), 257),
        (np.zeros((3, 0, 2), np.uint8), 8),
        (np.zeros((3, 2, 0), np.uint8), 8),
        (np.zeros((3, 2, 2), np.uint8), 0),
        (np.zeros((3, 2, 2), np.uint16), (1 << 16) + 1),
    ],
)
def test_arrays_of_another_kind_are_refused(array: NDArray[Any], num_experts: int) -> None:
    with pytest.raises(ValueError, match="routes"):
        Routes(array, num_experts)


def test_routes_of_another_length_are_refused() -> None:
    sample(9, routes=routes(8))
    sample(9, segments=(4, 5), routes=routes(7))
    for segments, num_tokens in (((), 9), ((), 7), ((4, 5), 8)):
        with pytest.raises(ValueError, match="all but the last"):
            sample(9, segments=segments, routes=routes(num_tokens))


def test_each_segment_has_its_routes() -> None:
    whole = experts(7)
    one, two = sample(9, segments=(4, 5), routes=Routes(whole, 8)).segment_routes or []
    assert np.array_equal(one.experts_TLK, whole[:3]) and np.array_equal(two.experts_TLK, whole[3:])
    assert sample(9).segment_routes is None


def test_runs_of_tokens_are_joined() -> None:
    parts = [routes(3), routes(1), routes(4)]
    joined = Routes.joined(parts)
    assert np.array_equal(joined.experts_TLK, np.concatenate([part.experts_TLK for part in parts]))
    with pytest.raises(ValueError, match="different models"):
        Routes.joined([routes(3), routes(3, layers=2)])


def test_a_record_names_its_routes() -> None:
    made = routes(8)
    record = Record.of(5, 1, sample(9, routes=made))
    assert record.structure.routes == made.spec and record.routes is made
    opened = Record.opened(record.data)
    assert opened.lacks_routes and opened.trajectory().routes is None
    assert opened.num_bytes == len(record.data) == record.num_bytes - len(made.to_bytes())
    whole = opened.with_routes(made.to_bytes())
    found = whole.trajectory().routes
    assert found is not None and np.array_equal(found.experts_TLK, made.experts_TLK)
    assert whole.without_routes().lacks_routes and not whole.lacks_routes
    other = Routes((made.experts_TLK + 1) % 8, 8)
    with pytest.raises(ValueError, match="not those that the record names"):
        opened.with_routes(other.to_bytes())


@pytest.mark.parametrize("num_tokens", [7, 9])
def test_a_record_with_other_routes_is_refused(num_tokens: int) -> None:
    trajectory = sample(9)
    object.__setattr__(trajectory, "routes", routes(num_tokens))  # as no server makes it
    with pytest.raises(ValueError, match=f"routes of {num_tokens} tokens"):
        Record.of(5, 1, trajectory)


def test_whole_records_are_counted_with_their_routes() -> None:
    made = routes(8)
    record = Record.of(5, 1, sample(9, routes=made)).data
    content = record + made.to_bytes()
    assert count_whole_records(content + content) == (2, 2 * len(content))
    assert count_whole_records(content + content[:-1]) == (2, len(content) + len(record))
    assert count_whole_records(content + record[:-1]) == (1, len(content))


def test_routes_travel_in_frames_of_their_own() -> None:
    both = message(sample(9, routes=routes(8)), sample(4), sample(6, routes=routes(5)))
    plain = message(sample(9), sample(4), sample(6))
    header, frame, *more = encode(both)
    assert more == [routes(8).to_bytes(), routes(5).to_bytes()]
    # A record grows by the name of its block, and by nothing for each token.
    assert 0 < len(frame) - len(encode(plain)[1]) < 2 * 64
    received, _ = decode([header, frame, *more])
    for sent, found in zip(both.samples, received.samples, strict=True):
        ours, theirs = sent.record.trajectory().routes, found.record.trajectory().routes
        assert (ours is None) is (theirs is None)
        assert ours is None or theirs is None or np.array_equal(ours.experts_TLK, theirs.experts_TLK)
    group = Group(
        step=1,
        position=0,
        ticket_id=2,
        prompt_index=9,
        records=[each.record for each in received.samples],
        version_steps=[1, 1, 1],
    )
    assert encode(group)[2:] == more


def test_missing_or_foreign_frames_are_refused() -> None:
    first, second = routes(8), routes(5)
    frames = encode(message(sample(9, routes=first), sample(6, routes=second)))
    blocks = [first.to_bytes(), second.to_bytes()]
    assert frames[2:] == blocks
    other = Routes((first.experts_TLK + 1) % 8, 8).to_bytes()
    for wrong in ([], blocks[:1], blocks[::-1], [*blocks, blocks[0]], [other, blocks[1]], [b"", blocks[1]]):
        with pytest.raises(WireError, match="routes"):
            decode([*frames[:2], *wrong])
    with pytest.raises(WireError, match="more frames of routes"):
        decode([*encode(message(sample(9))), blocks[0]])
    lacking = message(sample(9, routes=first))
    lacking.samples[0].record.routes = None
    with pytest.raises(ValueError, match="routes of sample 0 of ticket 2 are missing"):
        encode(lacking)


def test_routes_count_towards_the_size_of_a_message() -> None:
    """Four samples whose records alone would share a message."""
    large = routes(1000, layers=12, chosen=8)
    assert 2 * len(large.to_bytes()) < BATCH_BYTES < 3 * len(large.to_bytes())
    samples = message(*(sample(1001, routes=large) for _ in range(4))).samples
    batches = [len(batch.samples) for batch in Samples.batches(samples)]
    assert batches == [2, 2]


def test_without_routes_every_byte_is_as_before() -> None:
    frames = encode(message(sample(9)))
    assert tuple(frame.hex() for frame in frames) == GOLDEN_SAMPLES
    off = shared_settings(from_mapping({}), Role.ROLLOUT)
    assert "routes" not in off and "router_replay" not in off
    on = shared_settings(from_mapping({"model": {"router_replay": True}}), Role.ROLLOUT)
    assert "model.router_replay=True" in on and "buffer.on_failure.routes=retry" in on


def test_sglang_needs_an_update_mode_that_keeps_routes() -> None:
    job: dict[str, Any] = {"model": {"router_replay": True}, "rollout": {"engine": "sglang"}}
    assert from_mapping(job).update_mode == "keep"
    on_cpu = {"engine": "sglang", "engine_device": "cpu"}
    adapter = {"model": {"router_replay": True, "lora": {"rank": 4}}, "weights": {"lora": "adapter"}}
    assert from_mapping(job | {"rollout": on_cpu}).update_mode == "keep"
    assert from_mapping(adapter | {"rollout": on_cpu}).update_mode == "drain", "SGLang cannot keep the KV"
    with pytest.raises(ConfigError, match="update_mode=recompute with model"):
        from_mapping(job | {"weights": {"update_mode": "recompute"}})
    assert from_mapping({"model": {"router_replay": True}}).update_mode == "recompute"
