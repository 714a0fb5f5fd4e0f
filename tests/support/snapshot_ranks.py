"""Ranks that freeze weights while they go on changing them; see `test_snapshot.py`."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from areal_like.weights.buckets import unflatten
from tests.support.full_state import gather_full_state
from tests.support.trainer_ranks import main
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.weight_sync.snapshot import Snapshot, WeightSnapshotter


def received(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """What an engine would get."""
    tensors = {}
    for index, bucket in enumerate(snapshot.buckets):
        tensors |= {name: view.clone() for name, view in unflatten(bucket, snapshot.read(index).data).items()}
    return tensors


def frozen(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Snapshots equal what the weights were, whatever happens meanwhile, in bounded memory."""
    policy = Policy.load(path, master_dtype=torch.float32).shard(ranks)
    freezer = WeightSnapshotter(policy, ranks, bucket_bytes=5000, dtype="bfloat16")

    def freeze() -> tuple[Snapshot | None, dict[str, torch.Tensor]]:
        expected = {name: whole.to(torch.bfloat16) for name, whole in gather_full_state(policy)}
        return freezer.take_snapshot(), expected

    def train() -> None:
        with torch.no_grad():
            for param in policy.parameters():
                local(param).mul_(1.1).add_(0.01)
        dist.all_reduce(torch.ones(1000))

    first, expected_first = freeze()
    if first is not None:
        assert len(first.buckets) > 3 and all(
            spec.dtype == "bfloat16" for bucket in first.buckets for spec in bucket.tensors
        )
        assert "lm_head.weight" not in expected_first, "a tied head travels once, as the embedding"
        assert first.acquire()
    seen: list[dict[str, torch.Tensor]] = []
    reading = threading.Thread(target=lambda: seen.append(received(first)) if first is not None else None)
    reading.start()
    for _ in range(20):  # beside the gathering, on the training's own group
        train()
    second, _ = freeze()
    train()
    third, expected_third = freeze()
    train()
    reading.join()
    if first is not None and second is not None and third is not None:
        for tensors in (seen[0], received(first)):
            assert tensors.keys() == expected_first.keys()
            assert all(torch.equal(tensors[name], expected_first[name]) for name in tensors)
        first.release()
        assert not second.acquire(), "the third took its place"
        assert third.acquire()
        assert all(torch.equal(tensor, expected_third[name]) for name, tensor in received(third).items())
        third.release()
    dist.barrier()
    for _ in range(4):
        freeze()
    shard_bytes = sum(
        2 * -(-param.shape[0] // ranks.world_size) * param.shape[1:].numel() for param in policy.parameters()
    )
    assert freezer.num_bytes == 2 * shard_bytes, "two frozen copies, however many were made"
    freezer.close()


class Tardy(WeightSnapshotter):
    """Rank 1 is slow to copy its rows when its buffers are new."""

    def _new_buffers(self) -> list[torch.Tensor]:
        time.sleep(0.5 * self._ranks.rank)
        return super()._new_buffers()


def late(ranks: Ranks, _: Path, path: str) -> None:
    """Rank 0 asks for rows that rank 1 has not frozen yet, and for some that it has given up already."""
    policy = Policy.load(path, master_dtype=torch.float32).shard(ranks)
    freezer = Tardy(policy, ranks, bucket_bytes=5000, dtype="float32")
    expected = dict(gather_full_state(policy))
    first = freezer.take_snapshot()
    if first is not None:
        assert first.acquire()
        tensors = received(first)
        assert tensors.keys() == expected.keys() and all(
            torch.equal(tensors[name], expected[name]) for name in tensors
        )
    dist.barrier()
    # A push breaks while the bucket after the next is asked for: the question overtakes the end of that snapshot.
    with freezer._gather_lock:
        reading = threading.Thread(target=lambda: first.read(3) if first is not None else None)
        reading.start()
        time.sleep(0.2)
        if first is not None:
            first.release()
        second = freezer.take_snapshot()
        dist.barrier()
    reading.join()
    if second is not None:
        assert second.acquire()
        tensors = received(second)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        second.release()
    freezer.close()


if __name__ == "__main__":
    main(frozen=frozen, late=late)
