"""Wire encoding: messages survive a round trip, and malformed frames raise WireError and nothing else."""

import contextlib
import dataclasses
import pickle
import struct
import tracemalloc
import zlib
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypeAliasType

from areal_like.config.buffer import MAX_PEERS
from areal_like.errors import WireError
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire import codec
from areal_like.wire.codec import (
    HEADER_LIMITS,
    MAX_HEADER_BYTES,
    MAX_TEXT,
    WIRE_VERSION,
    decode,
    encode,
    read_prefix,
)
from areal_like.wire.limits import MAX_ADDRESS_CHARS
from areal_like.wire.messages import MESSAGES
from areal_like.wire.messages.consumer import (
    CommitStep,
    Directory,
    Group,
    RunCounters,
    ServerEntry,
    StartTraining,
)
from areal_like.wire.messages.hello import Refused
from areal_like.wire.messages.producer import (
    BATCH_BYTES,
    AbortLeases,
    Lease,
    Leases,
    Purpose,
    ReturnLeases,
    SampleAck,
    SampleAcks,
    SampleDone,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.messages.weights import PushChecksums, PushWeights, TokenScores
from areal_like.wire.records import Record
from tests.support.cpu_time import cpu_units
from tests.support.quick import others_in_chaos


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


def sample(sampled: Trajectory | None = None) -> Samples:
    return Samples(samples=[SampleDone(lease_id=1, record=Record.of(2, 0, sampled or trajectory()))])


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
def test_trajectories_survive_a_round_trip(num_prompt: int, num_sampled: int, rid: int) -> None:
    sent = trajectory(num_prompt, num_sampled)
    received, received_rid = decode(encode(sample(sent), rid=rid))
    assert received_rid == rid
    (done,) = received.samples
    assert (done.lease_id, done.ticket_id, done.sample_index) == (1, 2, 0)
    assert same(done.record.trajectory(), sent) and done.record.num_sampled == num_sampled
    assert not done.record.trajectory().tokens.flags.writeable


def test_arrays_may_be_declared_by_a_type_statement() -> None:
    """As numpy 2.5 declares NDArray; a statement of its own needs Python 3.12."""
    item = TypeVar("item", bound=np.generic)
    alias = TypeAliasType("alias", np.ndarray[Any, np.dtype[item]], type_params=(item,))
    _, read = codec._compile(alias[np.float32])
    _, expected = codec._compile(np.ndarray[Any, np.dtype[np.float32]])
    assert read.__code__ is expected.__code__


def test_nested_messages_survive_a_round_trip() -> None:
    lease = Lease(
        lease_id=1,
        ticket_id=2,
        prompt_index=3,
        purpose=Purpose.EVAL,
        sample_indices=[0, 2],
        seed=9,
        eval_set="hard",
    )
    for message in (
        Leases(leases=[lease]),
        StartTraining(step=3, stream={"cursor": 4, "pending": [1, 2]}),
        RunCounters(tickets={"queued": 1}, drops={}, counters={"lag": 0.5}),
        Refused(field="model", reason="differs"),
    ):
        assert decode(encode(message)) == (message, 0)
    group = Group(
        step=1,
        position=0,
        ticket_id=5,
        prompt_index=9,
        records=[Record.of(5, 0, trajectory()), Record.of(5, 1, trajectory(1, 2))],
        version_steps=[1, 1],
    )
    received, _ = decode(encode(group))
    assert [same(a, b) for a, b in zip(received.trajectories, group.trajectories, strict=True)] == [
        True,
        True,
    ]


def header(**changes: object) -> list[bytes]:
    """The frames of a valid message with some header parts replaced."""
    frames = encode(sample())
    parts = dict(zip(("version", "tag", "rid", "body"), msgpack.unpackb(frames[0]), strict=True)) | changes
    return [msgpack.packb(list(parts.values())), frames[1]]


def body(**changes: object) -> list[bytes]:
    good = msgpack.unpackb(encode(sample())[0])[3]
    return header(body=good | changes)


def inner(**changes: object) -> list[bytes]:
    (good,) = msgpack.unpackb(encode(sample())[0])[3]["samples"]
    return body(samples=[good | changes])


def record(
    at: int = -1, value: object = None, *, tokens: object = None, logprobs: object = None, cut: int = 0
) -> list[bytes]:
    """The frames of a valid message whose record is changed as given, with a correct checksum."""
    good = trajectory()
    data = Record.of(2, 0, good).data
    meta_bytes = struct.unpack_from("<I", data, 24)[0]
    meta = msgpack.unpackb(data[32 : 32 + meta_bytes])
    if at >= 0:
        meta[at] = value
    packed = msgpack.packb(meta)
    arrays = [
        np.asarray(tokens if tokens is not None else good.tokens, "<i4"),
        np.asarray(good.logprobs if logprobs is None else logprobs, "<f4"),
    ]
    parts = [packed, bytes(-len(packed) % 8)] + [
        part for array in arrays for part in (array.tobytes(), bytes(-array.nbytes % 8))
    ]
    joined = b"".join(parts)
    identity = struct.pack("<IQII", 0, 2, len(packed), 0)
    checked = (
        struct.pack("<4sII", b"ATR1", 32 + len(joined), zlib.crc32(identity + joined)) + identity + joined
    )
    checked = checked[: len(checked) - cut]
    header = msgpack.packb(
        [
            WIRE_VERSION,
            "Samples",
            0,
            {"samples": [{"lease_id": 1, "record": [0, len(checked)], "failure": ""}]},
        ]
    )
    return [header, checked]


def test_record_built_by_hand_is_accepted() -> None:
    received, _ = decode(record())
    assert same(received.samples[0].record.trajectory(), trajectory())


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
        body(extra=1),
        body(samples=None),
        inner(lease_id="1"),
        inner(lease_id=1 << 63),
        inner(lease_id=1.5),
        inner(record=None),
        inner(record=[0, 1 << 40]),
        inner(record=[-8, 2]),
        inner(record=[4, 2]),
        inner(record=[0, -1]),
        inner(record=[0, 3]),
        inner(record=[0, 40]),
        inner(record="x"),
        record(0, 7),
        record(0, 0),
        record(0, 8.0),
        record(1, [[-1, 3], [7, 4]]),
        record(1, [[-1, 8], [7, 0]]),
        record(1, [[-2, 3], [7, 5]]),
        record(1, [[-1, 3], [1 << 31, 5]]),
        record(1, [[-1, 3], [7.0, 5]]),
        record(1, [[-1, 3], [7]]),
        record(1, 8),
        record(1, [[-1, 3], [7, 2], [7, 3]]),
        record(2, float("nan")),
        record(2, "0.25"),
        record(3, {"a": "b"}),
        record(3, {"a": float("inf")}),
        record(3, {1: 0.5}),
        record(4, "because"),
        record(4, ["stop"]),
        record(5, float("inf")),
        record(7, 1),
        record(tokens=[0, 1, 2, 3, -4, 5, 6, 7]),
        record(tokens=[0, 1, 2]),
        record(logprobs=[0, 0, 0, -1, -1, -1, -1, float("nan")]),
        record(logprobs=[0, 0, 0, -1, -1, -1, -1, -float("nan")]),
        record(logprobs=[0, 0, 0, -1, -1, -1, -1, -float("inf")]),
        record(logprobs=[0, 0, 0, -1, -1, -1, -1, float("inf")]),
        record(logprobs=[0, 0, 0, -1, -1, -1, -1, 0.001]),
        record(cut=8),
        encode(sample())[:1],
    ],
)
def test_malformed_frames_raise_wire_error(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


def test_integers_in_a_list_of_floats_are_refused() -> None:
    """Such a list would be up to nine times as long if it were written again."""
    (frame,) = encode(TokenScores(version=1, logprobs=[-0.5, -1]))
    message, _ = decode([frame])
    assert message.logprobs == [-0.5, -1.0]
    header = msgpack.unpackb(frame)
    for wrong in ([0] * 2000, [-0.5, -1], [float("nan")]):
        with pytest.raises(WireError, match="list"):
            decode([msgpack.packb([*header[:3], header[3] | {"logprobs": wrong}])])


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_random_frames_raise_wire_error(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


@given(st.data())
def test_flipped_byte_never_changes_a_sample(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(sample())]
    frame = frames[data.draw(st.integers(0, 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message, _ = decode([bytes(frame) for frame in frames])
    except WireError:
        return
    assert type(message).__name__ == "Samples"
    assert all(same(done.record.trajectory(), trajectory()) for done in message.samples), (
        "a flipped byte passed the checksum"
    )


def test_overlapping_records_are_refused() -> None:
    """Otherwise a small message could expand to a large one in memory."""
    record = Record.of(2, 0, trajectory(100, 5_000)).data
    for count, is_good in ((1, True), (2, False), (2_000, False)):
        samples = [{"lease_id": 1, "record": [0, len(record)], "failure": ""}] * count
        frames = [msgpack.packb([WIRE_VERSION, "Samples", 0, {"samples": samples}]), record]
        if is_good:
            decode(frames)
        else:
            with pytest.raises(WireError, match="overlap"):
                decode(frames)


def peak_bytes_refusing(frames: list[bytes], *, match: str) -> int:
    """Peak memory while these frames are refused."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=match):
            decode(frames)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def packed_list(item: bytes, num_items: int) -> bytes:
    return b"\xdd" + struct.pack(">I", num_items) + item * num_items


@pytest.mark.parametrize("item", [b"\x90", b"\x80", b"\x81\xa0\x90"], ids=["lists", "maps", "lists in maps"])
@pytest.mark.parametrize("array_bytes", [0, 1 << 20], ids=["alone", "with arrays"])
def test_record_of_lists_does_not_expand_in_memory(item: bytes, array_bytes: int) -> None:
    meta = packed_list(item, (1 << 20) // len(item))
    identity = struct.pack("<IQII", 0, 1, len(meta), 0)
    rest = identity + meta + bytes(array_bytes)
    data = struct.pack("<4sII", b"ATR1", 12 + len(rest), zlib.crc32(rest)) + rest
    frames = [
        msgpack.packb(
            [
                WIRE_VERSION,
                "Samples",
                0,
                {"samples": [{"lease_id": 1, "record": [0, len(data)], "failure": ""}]},
            ]
        ),
        data,
    ]
    peak = peak_bytes_refusing(
        frames, match="lists, maps|max_array_len" if array_bytes else "record metadata takes"
    )
    assert peak < 12 * len(data)


def long_header(kind: str, field: str, value: bytes) -> list[bytes]:
    """The frames of a message of this kind: one field has this packed value, the others are 0."""
    names = [name.name for name in dataclasses.fields(MESSAGES[kind])]
    fields = b"".join(msgpack.packb(name) + (value if name == field else b"\x00") for name in names)
    return [
        msgpack.packb([WIRE_VERSION, kind, 1, None])[:-1] + b"\xde" + struct.pack(">H", len(names)) + fields
    ]


def packed_map(num_entries: int) -> bytes:
    keys = (msgpack.packb(f"{index:06x}") for index in range(num_entries))
    return b"\xdf" + struct.pack(">I", num_entries) + b"".join(key + b"\x01" for key in keys)


CONTENTS = {
    "integers": lambda size: packed_list(b"\x01", size),
    "large integers": lambda size: packed_list(b"\xcf" + b"\x7f" * 8, size // 9),
    "texts": lambda size: packed_list(b"\xa0", size),
    "lists": lambda size: packed_list(b"\x90", size),
    "nested lists": lambda size: packed_list(b"\x91" * 500 + b"\xc0", size // 501),
    "lists of integers": lambda size: packed_list(packed_list(b"\x01", 1000), size // 1005),
    "maps": lambda size: packed_list(b"\x81\xa0\x80", size // 3),
    "a map": lambda size: packed_map(size // 8),
}


FIELDS = (
    ("Hello", "role"),
    ("Samples", "samples"),
    ("ServerHeartbeat", "leases"),
    ("ServerHeartbeat", "state"),
    ("ServerHeartbeat", "stats"),
    ("StartTraining", "stream"),
    ("PushWeights", "manifest"),
    ("PushChecksums", "checksums"),
)


@pytest.mark.parametrize(
    ("kind", "field", "content"),
    others_in_chaos(
        [(*field, content) for content in CONTENTS for field in FIELDS],
        # Every field once at least, and every content.
        quick=[(*FIELDS[number % len(FIELDS)], content) for number, content in enumerate(CONTENTS)],
    ),
)
def test_any_header_is_decoded_or_refused_at_once(kind: str, field: str, content: str) -> None:
    frames = long_header(kind, field, CONTENTS[content](HEADER_LIMITS[kind] - 1000))
    assert HEADER_LIMITS[kind] - 2000 < len(frames[0]) <= HEADER_LIMITS[kind]

    def decode_or_refuse() -> None:
        with contextlib.suppress(WireError):
            decode(frames)

    assert cpu_units(decode_or_refuse) < 8


@pytest.mark.parametrize("kind", MESSAGES)
def test_header_over_the_limit_of_its_message_is_refused(kind: str) -> None:
    header = msgpack.packb([WIRE_VERSION, kind, 1, "x" * HEADER_LIMITS[kind]])
    with pytest.raises(WireError, match="over the limit"):
        decode([header])


def test_prefix_is_read_without_the_body() -> None:
    (header,) = encode(CommitStep(step=7), rid=300)
    prefix = read_prefix([header])
    assert (prefix.kind, prefix.rid, prefix.tag) == (CommitStep, 300, "CommitStep")
    assert read_prefix([header[: prefix.body_at]]) == prefix
    for length in range(prefix.body_at):
        with pytest.raises(WireError):
            read_prefix([header[:length]]) and decode([header[:length]])


def test_long_texts_are_cut() -> None:
    received, _ = decode(encode(Refused(field="x", reason="y" * 1_000_000)))
    assert len(received.reason) <= MAX_TEXT and received.reason.endswith("(1000000 characters)")


@pytest.mark.parametrize("num_tokens", [1, 50_000])
@pytest.mark.parametrize("first_version", [0, (1 << 31) - 50_000])
def test_record_with_a_version_per_token_and_1000_components(num_tokens: int, first_version: int) -> None:
    sent = dataclasses.replace(
        trajectory(0, num_tokens),
        versions=np.arange(first_version, first_version + num_tokens, dtype=np.int32),
        reward_components={
            f"a part of the reward that has a long name: {index}": 0.5 for index in range(1000)
        },
    )
    received, _ = decode(encode(sample(sent)))
    assert same(received.samples[0].record.trajectory(), sent)


def test_record_of_many_short_version_runs() -> None:
    sent = dataclasses.replace(trajectory(0, 50_000), versions=np.arange(50_000, dtype=np.int32) % 2)
    assert same(Record.opened(Record.of(2, 0, sent).data).trajectory(), sent)


def test_too_many_reward_components_are_refused() -> None:
    components = {f"{index:099d}": 0.5 for index in range(1000)}
    with pytest.raises(ValueError, match="use fewer reward components"):
        Record.of(2, 0, dataclasses.replace(trajectory(), reward_components=components))


def test_largest_messages_of_a_job_are_accepted() -> None:
    record = Record.of(5, 0, trajectory(1, 1))
    tensors = {
        "names": [f"model.layers.10.mlp.experts.{index}.down_proj.weight" for index in range(36_000)],
        "dtypes": ["bfloat16"] * 36_000,
        "shapes": [[4096, 1536]] * 36_000,
    }
    lease_ids = list(range(1 << 52, (1 << 52) + 20_000))
    server = ServerEntry(
        name="n" * 64,
        incarnation=1 << 40,
        weights_address="a" * MAX_ADDRESS_CHARS,
        device="d" * 64,
        state="quarantined",
        weights_version=1 << 40,
        public_key="k" * 40,
    )
    for message in (
        Directory(servers=[server] * MAX_PEERS),
        Group(
            step=1 << 20,
            position=0,
            ticket_id=5,
            prompt_index=9,
            records=[record] * 10_000,
            version_steps=[1 << 20] * 10_000,
        ),
        ServerHeartbeat(
            state=ServerState.SERVING, free_samples=1, holding_samples=1, weights_version=1, leases=lease_ids
        ),
        ReturnLeases(leases=lease_ids, reason="draining"),
        StartTraining(step=3, stream={"curriculum": list(range(1 << 24, (1 << 24) + 400_000))}),
        PushWeights(
            epoch=1,
            group_name="g",
            version=1,
            step=1,
            update_mode="keep",
            manifest={"buckets": [tensors]},
            integrity="none",
            timeout_s=1.0,
        ),
        PushChecksums(version=1, checksums=[(1 << 32) - 1] * 40_000, digests=["f" * 64] * 40_000),
    ):
        frames = encode(message)
        assert len(frames[0]) > 1 << 16
        decode(frames)


def test_leases_and_acknowledgements_are_sent_in_batches() -> None:
    leases = [
        Lease(
            lease_id=1 << 52,
            ticket_id=1 << 40,
            prompt_index=1 << 40,
            purpose=Purpose.TRAIN,
            sample_indices=list(range(size)),
            greedy_indices=list(range(size)),
            seed=1 << 62,
        )
        for size in [0, 8, 1000, 5000] * 200
    ]
    acks = [
        SampleAck(lease_id=1 << 52, sample_indices=list(range(size)), refused="unknown version")
        for size in [0, 8, 1000, 10_000] * 200
    ]
    lease_ids = [1 << 52] * 20_000
    for batches, items in (
        (Leases.batches(leases), leases),
        (SampleAcks.batches(acks), acks),
        (AbortLeases.batches(lease_ids, reason="over"), lease_ids),
    ):
        received = [next(iter(vars(decode(encode(batch))[0]).values())) for batch in batches]
        assert [item for batch in received for item in batch] == items
        assert 1 < len(received) < len(items)


def test_many_small_samples_are_sent_in_batches() -> None:
    samples = [SampleDone(lease_id=1 << 52, record=Record.of(2, 0, trajectory(0, 1)))] * 5_000
    received = [decode(encode(batch))[0] for batch in Samples.batches(samples)]
    assert sum(len(batch.samples) for batch in received) == 5_000


def test_overlong_header_is_not_sent() -> None:
    for message in (
        SampleAcks(acks=[SampleAck(lease_id=0, sample_indices=list(range(100_000)))]),
        PushWeights(
            epoch=1,
            group_name="g",
            version=1,
            step=1,
            update_mode="keep",
            manifest={"lists": [[]] * 100_000},
            integrity="none",
            timeout_s=1.0,
        ),
    ):
        with pytest.raises(ValueError, match=r"header|too many lists"):
            encode(message)


def test_backlog_is_sent_in_batches() -> None:
    record_of = [Record.of(2, index, trajectory(100, 5_000)) for index in range(40)]
    batches = list(Samples.batches(SampleDone(lease_id=1, record=each) for each in record_of))
    assert [sample.sample_index for batch in batches for sample in batch.samples] == list(range(40))
    assert len(batches) > 2 and all(
        sum(len(sample.record.data) for sample in batch.samples) <= BATCH_BYTES for batch in batches
    )
    one_by_one = list(
        Samples.batches((sample for batch in batches for sample in batch.samples), max_bytes=1000)
    )
    assert [len(batch.samples) for batch in one_by_one] == [1] * 40, "a record above the limit is sent alone"


def test_invalid_trajectories_are_refused() -> None:
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
