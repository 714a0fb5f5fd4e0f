"""Receiving buckets of a weight update, in place or through buffers, and after a broken broadcast."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

import pytest
import torch

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import Bucket, checksum, cut_buckets, flatten, spec_of
from areal_like.weights.deltas import encode, word_bytes
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup
from rollout_server.engine.models.base import CausalModel, Weights
from rollout_server.engine.models.loading import load
from rollout_server.engine.weights.bucket_receiver import AdapterFacts, BucketReceiver
from tests.support.engine_harness import save_model, weights_of
from tests.support.hybrid_models import write_family
from tests.support.waiting import HANG_LIMIT_S

BUCKET_BYTES = 1 << 14


def loaded(path: Path) -> CausalModel:
    model, _ = load(str(path), dtype=torch.float32, device=torch.device("cpu"), context_length=32)
    return model


def receive(
    receiver: BucketReceiver,
    buckets: tuple[Bucket, ...],
    flats: list[torch.Tensor],
    *,
    num_sent: int | None = None,
) -> BucketSums:
    """Pushes the buckets over gloo; `num_sent`: rank 0 leaves after this many buckets."""
    with WeightGroup.create(world_size=2, group_name="g", timeout_s=HANG_LIMIT_S) as sender:

        def send() -> None:
            sender.connect()
            with contextlib.suppress(WeightSyncError):  # the engine has left
                for flat in flats[:num_sent]:
                    sender.broadcast(flat)
            sender.close()

        sending = threading.Thread(target=send)
        sending.start()
        with (
            torch.inference_mode(),
            WeightGroup.join(
                master_address=sender.address, master_port=sender.port, rank=1, world_size=2, group_name="g",
                timeout_s=HANG_LIMIT_S,
            ) as group,
        ):  # fmt: skip
            try:
                return receiver.receive([group], buckets, timeout_s=HANG_LIMIT_S, integrity="sha256")
            finally:
                group.close()
                sending.join()


@pytest.mark.parametrize(
    ("kind", "dtype", "is_in_place"),
    [
        ("llama", "float32", True),
        ("qwen3", "float32", True),
        ("gpt2", "float32", True),
        ("qwen3_moe", "float32", True),
        ("qwen2", "float32", False),
        ("llama", "bfloat16", False),
    ],
)
def test_bucket_with_the_shadow_layout_is_received_in_place(
    kind: str, dtype: str, is_in_place: bool, tmp_path: Path
) -> None:
    path = save_model(tmp_path / kind, kind)
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets([spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES)
    assert len(buckets) > 2
    flats = [flatten(bucket, tensors) for bucket in buckets]
    weights = model.new_weights()
    receiver = BucketReceiver(weights, model.facts, [])
    for _ in range(2):
        sums = receive(receiver, buckets, flats)
        assert sums == BucketSums(
            checksums=list(map(checksum, flats)),
            digests=[hashlib.sha256(bytes(flat.tolist())).hexdigest() for flat in flats],
        )
        assert not receiver.error and not receiver.is_tainted
        assert all(
            torch.equal(weights.named[name], t.to(getattr(torch, dtype)).float())
            for name, t in tensors.items()
        )
        assert len(receiver.buffers) == 0 if is_in_place else 0 < len(receiver.buffers) <= 2
    assert [spec.name for spec in receiver.received] == 2 * [
        spec.name for bucket in buckets for spec in bucket.tensors
    ]


def changed_a_little(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every 20th number is another one, in the last tensor none."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in list(changed.values())[:-1]:
        tensor.view(-1)[::20] += 1.0
    return changed


def messages_of(bucket: Bucket, old: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    """What a sender broadcasts of a bucket after another push."""
    encoded = encode(old, new, word_bytes=word_bytes(bucket))
    return [encoded.header.to_bytes(), *([encoded.payload] if len(encoded.payload) else [])]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "float32"), ("qwen2", "float32"), ("llama", "bfloat16")]
)
def test_what_changed_is_applied_to_the_active_weights(kind: str, dtype: str, tmp_path: Path) -> None:
    """In place, in buffers, and in buffers of another dtype; and buckets that come whole."""
    path = save_model(tmp_path / kind, kind)
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets([spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES)
    flats = [flatten(bucket, tensors) for bucket in buckets]
    active = BucketReceiver(model.new_weights(), model.facts, [])
    receive(active, buckets, flats)
    assert active.can_be_base(buckets)
    before = {name: tensor.clone() for name, tensor in active.weights.named.items()}
    changed = changed_a_little(tensors)
    for new_tensors in (changed, {name: tensor + 1.0 for name, tensor in changed.items()}):
        new = [flatten(bucket, new_tensors) for bucket in buckets]
        messages = [
            message
            for bucket, old, whole in zip(buckets, flats, new, strict=True)
            for message in messages_of(bucket, old, whole)
        ]
        receiver = BucketReceiver(model.new_weights(), model.facts, [], base=active.weights)
        sums = receive(receiver, buckets, messages)
        assert not receiver.error and not receiver.is_tainted
        assert sums == BucketSums(
            checksums=list(map(checksum, new)),
            digests=[hashlib.sha256(bytes(flat.tolist())).hexdigest() for flat in new],
        ), "those of a push of all bytes"
        num_bytes = sum(bucket.num_bytes for bucket in buckets)
        num_sent = sum(len(message) for message in messages)
        assert num_sent < num_bytes / 5 if new_tensors is changed else num_sent > num_bytes
        for name, tensor in new_tensors.items():
            want = tensor.to(getattr(torch, dtype)).float()
            assert torch.equal(receiver.weights.named[name], want), name
        assert all(torch.equal(tensor, before[name]) for name, tensor in active.weights.named.items())


def test_an_engine_of_narrower_numbers_has_no_base(tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    model, _ = load(str(path), dtype=torch.bfloat16, device=torch.device("cpu"), context_length=32)
    tensors = weights_of(path)
    receiver = BucketReceiver(model.new_weights(), model.facts, [])
    for dtype, can_be in (("float32", False), ("bfloat16", True), ("float16", False)):
        buckets = cut_buckets([spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=1 << 20)
        assert receiver.can_be_base(buckets) is can_be


@pytest.mark.parametrize("what", ["header", "payload"])
def test_a_malformed_delta_is_named(what: str, tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES)
    old = [flatten(bucket, tensors) for bucket in buckets]
    new = [flatten(bucket, changed_a_little(tensors)) for bucket in buckets]
    active = BucketReceiver(model.new_weights(), model.facts, [])
    receive(active, buckets, old)
    pairs = [messages_of(*each) for each in zip(buckets, old, new, strict=True)]
    if what == "header":
        pairs[1][0].view(torch.int64)[1] = 1 << 40
    else:
        pairs[1][1].fill_(255)
    messages = [message for pair in pairs for message in pair]
    receiver = BucketReceiver(model.new_weights(), model.facts, [], base=active.weights)
    if what == "header":
        with pytest.raises(WeightSyncError, match=r"bucket 1: a delta has \d+ words of a bucket of"):
            receive(receiver, buckets, messages)
    else:
        receive(receiver, buckets, messages)
        assert receiver.error.startswith("bucket 1: a delta has positions above the last word")


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_tensors_get_the_dtypes_of_the_engine(family: str, tmp_path: Path) -> None:
    """Some parameters of a bfloat16 engine are float32; a push has them in float32 or in bfloat16."""
    path = write_family(family, tmp_path / family)
    model, _ = load(str(path), dtype=torch.bfloat16, device=torch.device("cpu"), context_length=32)
    tensors = weights_of(path)
    wide = {name for name in tensors if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight"))}
    assert len(wide) == 6
    for all_narrow in (False, True):
        sent = {
            name: tensor if name in wide and not all_narrow else tensor.bfloat16()
            for name, tensor in tensors.items()
        }
        buckets = cut_buckets([spec_of(n, t) for n, t in sent.items()], bucket_bytes=BUCKET_BYTES)
        receiver = BucketReceiver(model.new_weights(), model.facts, [])
        receive(receiver, buckets, [flatten(bucket, sent) for bucket in buckets])
        assert not receiver.error
        for name, tensor in receiver.weights.named.items():
            assert tensor.dtype == (torch.float32 if name in wide else torch.bfloat16)
            assert torch.equal(tensor, sent[name].to(tensor.dtype))
    broken = {name: torch.full_like(tensors[name], float("inf")) for name in wide}
    with pytest.raises(WeightSyncError, match=r"not finite in torch\.float32"):
        receiver.store(broken)


@pytest.mark.parametrize(("kind", "is_in_place"), [("llama", True), ("qwen2", False)])
def test_broken_broadcast_taints_weights_received_in_place(
    kind: str, is_in_place: bool, tmp_path: Path
) -> None:
    path = save_model(tmp_path / kind, kind)
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES)
    receiver = BucketReceiver(model.new_weights(), model.facts, [])
    with pytest.raises(WeightSyncError, match="broadcast failed"):
        receive(receiver, buckets, [flatten(bucket, tensors) for bucket in buckets], num_sent=1)
    assert receiver.is_tainted is is_in_place


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_float32_tensor_among_narrow_ones(held: torch.dtype) -> None:
    """As with A_log of linear attention: it is rounded only if the engine holds it so."""
    named = {
        "proj": torch.empty(6, 5, dtype=torch.bfloat16),
        "A_log": torch.empty(5, dtype=held),
        "out": torch.empty(7, dtype=torch.bfloat16),
    }
    sent = {name: torch.randn(tensor.shape) for name, tensor in named.items()}
    dtypes = {name: "float32" if name == "A_log" else "bfloat16" for name in named}
    buckets = cut_buckets(
        [spec_of(name, tensor, dtype=dtypes[name]) for name, tensor in sent.items()], bucket_bytes=1 << 10
    )
    assert [spec.name for spec in buckets[0].tensors] == ["A_log", "proj", "out"]
    facts = AdapterFacts.of(named, dtype=torch.bfloat16, device=torch.device("cpu"))
    receiver = BucketReceiver(Weights(named=named), facts, [])
    flats = [flatten(bucket, sent) for bucket in buckets]
    assert receive(receiver, buckets, flats).checksums == list(map(checksum, flats))
    assert not receiver.error
    for name, tensor in named.items():
        assert torch.equal(tensor, sent[name].to(tensor.dtype)), name


@pytest.mark.parametrize(("dtype", "is_in_place"), [("float32", True), ("bfloat16", False)])
def test_buckets_of_several_senders_arrive_whatever_their_pace(
    dtype: str, is_in_place: bool, tmp_path: Path
) -> None:
    """Bucket i comes over group i mod 3. The last sender begins after the others; buffers are bounded by the
    number of senders."""
    path = save_model(tmp_path / "llama", "llama")
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets(
        [spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES // 4
    )
    assert len(buckets) > 9
    flats = [flatten(bucket, tensors) for bucket in buckets]
    receiver = BucketReceiver(model.new_weights(), model.facts, [])
    sums = receive_from_senders(receiver, buckets, [flats[sender::3] for sender in range(3)])
    assert sums.checksums == [checksum(flat) for flat in flats]
    assert [spec for bucket in buckets for spec in bucket.tensors] == receiver.received
    assert not receiver.error and not receiver.is_tainted
    assert (len(receiver.buffers) == 0) == is_in_place and len(receiver.buffers) <= 4
    for name, tensor in tensors.items():
        want = tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(receiver.weights.named[name].float(), want)


def test_one_of_several_senders_that_leaves_fails_the_push(tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    model, tensors = loaded(path), weights_of(path)
    buckets = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES // 4)
    flats = [flatten(bucket, tensors) for bucket in buckets]
    receiver = BucketReceiver(model.new_weights(), model.facts, [])
    shares = [flats[sender::3] for sender in range(3)]
    with pytest.raises(WeightSyncError, match=r"weight group g1: broadcast failed"):
        receive_from_senders(receiver, buckets, [shares[0], shares[1][:1], shares[2]])
    assert receiver.is_tainted, "the shadow weights may still be written to"


def receive_from_senders(
    receiver: BucketReceiver, buckets: tuple[Bucket, ...], shares: list[list[torch.Tensor]]
) -> BucketSums:
    """Pushes each share over a group of its own; a sender leaves when it has sent its share."""
    senders = [
        WeightGroup.create(world_size=2, group_name=f"g{number}", timeout_s=HANG_LIMIT_S)
        for number in range(len(shares))
    ]

    def send(group: WeightGroup, share: list[torch.Tensor]) -> None:
        group.connect()
        if group is senders[-1]:
            first_is_sent.wait()
        with contextlib.suppress(WeightSyncError):  # the engine has left
            for flat in share:
                group.broadcast(flat)
                first_is_sent.set()
        group.close()

    first_is_sent = threading.Event()
    sending = [
        threading.Thread(target=send, args=(group, share))
        for group, share in zip(senders, shares, strict=True)
    ]
    for thread in sending:
        thread.start()
    groups = [
        WeightGroup.join(
            master_address=sender.address, master_port=sender.port, rank=1, world_size=2,
            group_name=sender.group_name, timeout_s=HANG_LIMIT_S,
        )
        for sender in senders
    ]  # fmt: skip
    try:
        with torch.inference_mode():
            return receiver.receive(groups, buckets, timeout_s=HANG_LIMIT_S)
    finally:
        for group in groups:
            group.close()
        for thread in sending:
            thread.join()
