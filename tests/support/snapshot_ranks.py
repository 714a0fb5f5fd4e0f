"""Ranks that take snapshots of the weights and continue training; the processes of `test_snapshot.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from areal_like.config import LoraConfig
from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import checksum, unflatten
from tests.support.full_state import gather_full_state
from tests.support.lora_ranks import adapter_shards
from tests.support.trainer_ranks import main
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, local
from trainer.models.policy import Policy
from trainer.weights import snapshot as snapshot_module
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, Snapshot, WeightSnapshotter


def received(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """The tensors that an engine would receive."""
    tensors = {}
    for index, bucket in enumerate(snapshot.buckets):
        tensors |= {name: view.clone() for name, view in unflatten(bucket, snapshot.read(index).data).items()}
    return tensors


def snapshots(ranks: Ranks, out_dir: Path, path: str) -> None:
    """A snapshot keeps its weights while training continues, memory stays bounded, and both ways to gather
    give the same bytes."""
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    snapshotters: list[WeightSnapshotter] = [
        gathering(policy, ranks, bucket_bytes=5000, dtype="bfloat16")
        for gathering in (BackgroundGather, BoundaryGather)
    ]
    buckets = []
    for snapshotter in snapshotters:
        snapshot = snapshotter.take_snapshot()
        if snapshot is not None:
            assert snapshot.acquire()
            snapshot.stage(integrity="sha256")
            found = [snapshot.read(index) for index in range(len(snapshot.buckets))]
            buckets.append([(each.data.clone(), each.checksum, each.digest) for each in found])
            assert all(each is snapshot.read(index) for index, each in enumerate(found)), "staged: all kept"
            assert all(each.checksum == checksum(each.data) for each in found)
            snapshot.release()
    for one, other in zip(*buckets, strict=True) if buckets else ():
        assert torch.equal(one[0], other[0]) and one[1:] == other[1:]
    for snapshotter in snapshotters:
        check(snapshotter, policy, ranks)
    check_adapter(path, ranks)


def check_adapter(path: str, ranks: Ranks) -> None:
    """Both ways to gather send the whole matrices of an adapter, of which some ranks hold no row, and nothing
    else."""
    settings = LoraConfig(rank=4, alpha=8.0)
    policy = Policy.load(path, ranks, dtype="bfloat16", lora_settings=settings)
    with torch.no_grad():
        for shard in adapter_shards(policy.model):
            shard.rows.normal_()
    expected = {name: whole.to(torch.bfloat16) for name, whole in gather(adapter_shards(policy.model))}
    for gathering in (BackgroundGather, BoundaryGather):
        snapshotter = gathering(policy, ranks, bucket_bytes=1000, dtype="bfloat16", lora="adapter")
        snapshot = snapshotter.take_snapshot()
        if snapshot is not None:
            assert snapshot.acquire() and snapshot.adapter == policy.adapter_header
            found = received(snapshot)
            assert found.keys() == expected.keys() and len(snapshot.buckets) > 3
            assert all(torch.equal(found[name], expected[name]) for name in found)
            snapshot.release()
        snapshotter.close()


def check(snapshotter: WeightSnapshotter, policy: Policy, ranks: Ranks) -> None:
    """Takes snapshots beside training, and closes the snapshotter."""

    def take() -> tuple[Snapshot | None, dict[str, torch.Tensor]]:
        expected = {name: whole.to(torch.bfloat16) for name, whole in gather_full_state(policy)}
        return snapshotter.take_snapshot(), expected

    def train() -> None:
        with torch.no_grad():
            for param in policy.parameters():
                local(param).mul_(1.1).add_(0.01)
        dist.all_reduce(torch.ones(1000))

    first, expected_first = take()
    if first is not None:
        assert len(first.buckets) > 3 and all(
            spec.dtype == "bfloat16" for bucket in first.buckets for spec in bucket.tensors
        )
        assert "lm_head.weight" not in expected_first, "a tied head is sent once, as the embedding"
        assert first.acquire()
    seen: list[dict[str, torch.Tensor]] = []
    reading = threading.Thread(target=lambda: seen.append(received(first)) if first is not None else None)
    reading.start()
    for _ in range(20):  # while rows are gathered, on the training's own process group
        train()
    second, _ = take()
    train()
    third, expected_third = take()
    train()
    reading.join()
    if first is not None and second is not None and third is not None:
        for tensors in (seen[0], received(first)):
            assert tensors.keys() == expected_first.keys()
            assert all(torch.equal(tensors[name], expected_first[name]) for name in tensors)
        first.release()
        assert not second.acquire(), "the third snapshot replaced it"
        assert third.acquire()
        assert all(torch.equal(tensor, expected_third[name]) for name, tensor in received(third).items())
        third.release()
    dist.barrier()
    for _ in range(4):
        take()
    own_bytes = sum(2 * local(param).numel() for param in policy.parameters())
    padding = 8 * len(snapshotter.buckets)
    if isinstance(snapshotter, BoundaryGather):
        whole = sum(bucket.num_bytes for bucket in snapshotter.buckets)
        own_bytes, padding = (0, 1) if ranks.rank else (whole, 1)
    assert 0 <= snapshotter.num_bytes - 2 * own_bytes < 2 * padding, (
        "at most two copies may exist, however many snapshots were taken"
    )
    snapshotter.close()


class SlowOnRank1(BackgroundGather):
    """Rank 1 needs half a second to allocate new buffers."""

    def _new_buffers(self) -> list[torch.Tensor]:
        time.sleep(0.5 * self._ranks.rank)
        return super()._new_buffers()


def late_ranks(ranks: Ranks, _: Path, path: str) -> None:
    """Rank 0 requests rows of a snapshot that rank 1 has not taken yet, and of one that rank 1 has freed."""
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    snapshotter = SlowOnRank1(policy, ranks, bucket_bytes=5000, dtype="float32")
    expected = dict(gather_full_state(policy))
    first = snapshotter.take_snapshot()
    if first is not None:
        assert first.acquire()
        tensors = received(first)
        assert tensors.keys() == expected.keys() and all(
            torch.equal(tensors[name], expected[name]) for name in tensors
        )
    dist.barrier()
    # A push breaks while bucket 3 is being requested, so the request arrives after the snapshot's release.
    with snapshotter._gather_lock:
        reading = threading.Thread(target=lambda: first.read(3) if first is not None else None)
        reading.start()
        time.sleep(0.2)
        if first is not None:
            first.release()
        second = snapshotter.take_snapshot()
        dist.barrier()
    reading.join()
    if second is not None:
        assert second.acquire()
        tensors = received(second)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    snapshotter.close()
    if second is not None:  # a push that is interrupted at the end of a run may still be reading
        with pytest.raises(WeightSyncError, match="the push of these weights is over"):
            second.read(0)


def one_copy(ranks: Ranks, _: Path, path: str) -> None:
    """With memory for one copy the next snapshot is taken when the push has ended, and not before."""
    snapshot_module._RELEASE_WAIT_S = 0.02
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    for gathering in (BackgroundGather, BoundaryGather):
        snapshotter = gathering(policy, ranks, bucket_bytes=5000, dtype="float32")
        snapshotter.num_snapshots = 1
        waits = threading.Semaphore(0)
        wait = snapshotter._wait_for_release

        def counted(waits: threading.Semaphore = waits, wait: Callable[[], None] = wait) -> None:
            wait()
            waits.release()

        snapshotter._wait_for_release = counted  # type: ignore[method-assign]
        first, expected = snapshotter.take_snapshot(), dict(gather_full_state(policy))
        seen: list[dict[str, torch.Tensor]] = []

        def push(
            first: Snapshot, waits: threading.Semaphore = waits, seen: list[dict[str, torch.Tensor]] = seen
        ) -> None:
            for _ in range(3):
                waits.acquire()
            seen.append(received(first))
            first.release()

        pushing = threading.Thread(target=push, args=(first,))
        if first is not None:
            assert first.acquire()
            pushing.start()
        with torch.no_grad():
            for param in policy.parameters():
                local(param).mul_(1.1).add_(0.01)
        second, expected_second = snapshotter.take_snapshot(), dict(gather_full_state(policy))
        num_bytes = snapshotter.num_bytes
        third = snapshotter.take_snapshot()  # nothing is being pushed: it does not wait
        assert snapshotter.num_bytes == num_bytes
        if first is not None and second is not None and third is not None:
            pushing.join()
            assert all(torch.equal(seen[0][name], expected[name]) for name in seen[0])
            assert not first.acquire() and not second.acquire() and third.acquire()
            found = received(third)
            assert all(torch.equal(found[name], expected_second[name]) for name in found)
            third.release()
        snapshotter.close()


def bases(ranks: Ranks, _: Path, path: str) -> None:
    """The last push is kept while training goes on during the next one, in bounded memory."""
    policy = Policy.load(path, ranks, master_dtype=torch.float32)
    for gathering in (BackgroundGather, BoundaryGather):
        for num_snapshots in (1, 2):
            snapshotter = gathering(policy, ranks, bucket_bytes=5000, dtype="bfloat16", delta="auto")
            snapshotter.num_snapshots = num_snapshots
            pushed: list[torch.Tensor] = []
            sizes, last = [], -1
            for _ in range(5):
                with torch.no_grad():
                    for param in policy.parameters():
                        local(param).mul_(1.1).add_(0.01)
                snapshot = snapshotter.take_snapshot()
                if snapshot is not None:
                    assert snapshot.acquire() and snapshot.base_number == last
                    last = snapshot.number
                    num_buckets = len(snapshot.buckets)
                    half = [snapshot.read(index).data.clone() for index in range(num_buckets // 2)]
                if num_snapshots == 2:
                    snapshotter.take_snapshot()  # replaced by the next: never pushed
                if snapshot is not None:
                    rest = [snapshot.read(index).data for index in range(num_buckets // 2, num_buckets)]
                    for index, before in enumerate(pushed):
                        assert torch.equal(snapshot.base(snapshot.base_number, index), before)
                    pushed = [each.clone() for each in (*half, *rest)]
                    assert all(
                        torch.equal(snapshot.base(snapshot.number, index), each)
                        for index, each in enumerate(pushed)
                    ), "pushed once more, to a server that joins"
                    snapshot.release()
                    with pytest.raises(WeightSyncError, match="push of these weights is over"):
                        snapshot.base(snapshot.number + 99, 0)
                dist.barrier()
                sizes.append(snapshotter.num_bytes)
            keeps = isinstance(snapshotter, BoundaryGather) or ranks.world_size == 1
            copies = num_snapshots + keeps
            own_bytes = sum(2 * local(param).numel() for param in policy.parameters())
            if isinstance(snapshotter, BoundaryGather):
                own_bytes = 0 if ranks.rank else sum(bucket.num_bytes for bucket in snapshotter.buckets)
            assert sizes[-1] == sizes[-2] <= copies * (own_bytes + 8 * len(snapshotter.buckets))
            snapshotter.close()


if __name__ == "__main__":
    main(snapshots=snapshots, late_ranks=late_ranks, one_copy=one_copy, bases=bases)
