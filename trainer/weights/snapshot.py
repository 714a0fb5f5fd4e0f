"""Copies the weights for a push between two optimizer steps, so that training can continue during the push.

    snapshotter.take_snapshot()   on every rank, between two steps; training waits for it
    snapshot.stage()              on rank 0, in any thread: every bucket and its sums are ready to be sent
    snapshot.read(i)              on rank 0, in any thread: bucket i

Two ways to bring the rows of all ranks together. `BackgroundGather` (background_gather.py), on CPUs: training
waits only for a copy of each rank's own rows, and rank 0 gathers them later, bucket by bucket, over a gloo
group of their own. `BoundaryGather` (boundary_gather.py), on GPUs: the ranks gather before training
continues, over the training's own NCCL group, because a second NCCL communicator must not run beside it
without an order between the two.

At most two snapshots are held: the one that is being pushed and the newest. A new snapshot reuses the memory
of the newest one unless that is being pushed, so memory use does not grow during a run.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import Bucket, checksum
from areal_like.weights.integrity import sha256
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.rank_parts import PushLayout

_NONE = -1
"""Broadcast by rank 0 instead of the acquired snapshot's number if no snapshot is acquired."""


class GatheredBucket:
    """One bucket with the rows of all ranks. Its sums are computed on first use, and once."""

    def __init__(self, data: Tensor, *, known_checksum: int | None = None) -> None:
        """`known_checksum`: of `data`, if it was computed where the rows came together."""
        self.data = data
        """uint8[num_bytes], on the CPU."""
        if known_checksum is not None:
            self.checksum = known_checksum

    @cached_property
    def checksum(self) -> int:
        """Checksum of `data`."""
        return checksum(self.data)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `data` in hexadecimal."""
        return sha256(self.data)

    def sums(self, *, integrity: str) -> tuple[int, str]:
        """(checksum, digest); the digest is empty unless `integrity` is `sha256`."""
        return self.checksum, self.digest if integrity == "sha256" else ""


class Snapshot(Protocol):
    """The weights at the end of one optimizer step, for the publisher.

    NEWEST -> acquire() -> being pushed -> release() -> NEWEST -> replaced by a newer one: acquire() is False
    """

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets in the order of sending, without checksums."""
        ...

    def acquire(self) -> bool:
        """Keeps the weights until `release`; returns False if a newer snapshot has replaced this one."""
        ...

    def release(self) -> None:
        """Ends the push."""
        ...

    def stage(self, *, integrity: str) -> None:
        """Makes every bucket and its sums ready, so that `read` returns at once: for engines that stand still
        during the broadcast. From any thread, while acquired, also twice. Raises WeightSyncError.

        `integrity`: `sha256` computes the digests too.
        """
        ...

    def read(self, index: int) -> GatheredBucket:
        """Returns one bucket. From any thread, while acquired. Raises WeightSyncError."""
        ...


class RankSnapshot:
    """One rank's share of a snapshot; on rank 0 it is also the `Snapshot`."""

    def __init__(self, snapshotter: WeightSnapshotter, number: int, buffers: list[Tensor]) -> None:
        self.number = number
        self.buffers = buffers
        """What this rank holds of each bucket, uint8; its meaning depends on the snapshotter."""
        self._snapshotter = snapshotter

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self._snapshotter.buckets

    def acquire(self) -> bool:
        return self._snapshotter.acquire(self)

    def release(self) -> None:
        self._snapshotter.release(self)

    def stage(self, *, integrity: str) -> None:
        self._snapshotter.stage(self, integrity=integrity)

    def read(self, index: int) -> GatheredBucket:
        return self._snapshotter.read(self, index)


class WeightSnapshotter(ABC):
    """Takes the snapshots of one rank. Create and `close` it on all ranks at the same time."""

    def __init__(self, policy: Policy, ranks: Ranks, *, bucket_bytes: int, dtype: str) -> None:
        """`dtype`: of floating-point weights on the wire. Collective."""
        self._ranks = ranks
        self._layout = PushLayout(
            policy.model,
            rank=ranks.rank,
            world_size=ranks.world_size,
            bucket_bytes=bucket_bytes,
            dtype=dtype,
        )
        self.buckets = tuple(parts.bucket for parts in self._layout.buckets)
        """The buckets of every snapshot, without checksums."""
        self._lock = threading.Condition()
        self._snapshots: list[RankSnapshot] = []
        """The newest snapshot, and the snapshot that is being pushed."""
        self._acquired: RankSnapshot | None = None
        self._free_buffers: list[list[Tensor]] = []
        self._num_taken = 0

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's snapshots, in bytes."""
        taken = (snapshot.buffers for snapshot in self._snapshots)
        return sum(buffer.numel() for buffers in (*self._free_buffers, *taken) for buffer in buffers)

    def take_snapshot(self) -> Snapshot | None:
        """Copies the present weights; returns the snapshot on rank 0. Collective; for the training thread."""
        self._free_superseded()
        buffers = self._free_buffers.pop() if self._free_buffers else self._new_buffers()
        self._copy_weights(buffers, number=self._num_taken + 1)
        with self._lock:
            self._num_taken += 1
            snapshot = RankSnapshot(self, self._num_taken, buffers)
            self._snapshots.append(snapshot)
            self._lock.notify_all()
        return snapshot if self._ranks.rank == 0 else None

    def acquire(self, snapshot: RankSnapshot) -> bool:
        """`Snapshot.acquire`; at most one is acquired at a time."""
        with self._lock:
            assert self._acquired is None
            self._acquired = snapshot if snapshot in self._snapshots else None
            return self._acquired is snapshot

    def release(self, snapshot: RankSnapshot) -> None:
        """`Snapshot.release`."""
        with self._lock:
            assert self._acquired is snapshot
            self._acquired = None

    def stage(self, snapshot: RankSnapshot, *, integrity: str) -> None:
        """`Snapshot.stage`."""
        for index in range(len(self.buckets)):
            self.read(snapshot, index).sums(integrity=integrity)

    def read(self, snapshot: RankSnapshot, index: int) -> GatheredBucket:
        """`Snapshot.read`."""
        if self._acquired is not snapshot:
            raise WeightSyncError("the push of these weights is over")
        return self._read(snapshot, index)

    @abstractmethod
    def close(self) -> None:
        """Ends this rank's threads. Collective. Call it after the last push has ended."""

    @abstractmethod
    def _new_buffers(self) -> list[Tensor]:
        """Memory for one more snapshot: pinned where the device is a GPU."""

    @abstractmethod
    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        """Fills the buffers of snapshot `number` with the present weights. Collective."""

    @abstractmethod
    def _read(self, snapshot: RankSnapshot, index: int) -> GatheredBucket: ...

    def _free_superseded(self) -> None:
        """Frees every snapshot but the acquired one. Collective: only rank 0 has acquired one."""
        with self._lock:
            kept = torch.tensor([_NONE if self._acquired is None else self._acquired.number])
            if self._ranks.rank == 0:
                self._free_all_but(int(kept))
        if self._ranks.world_size > 1:
            dist.broadcast(kept, src=0)
            with self._lock:
                self._free_all_but(int(kept))

    def _free_all_but(self, number: int) -> None:
        self._free_buffers += [each.buffers for each in self._snapshots if each.number != number]
        self._snapshots = [each for each in self._snapshots if each.number == number]


def empty_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """uint8[num_bytes] on the CPU, pinned if `device` is a GPU, so that copies run at the bus' full rate."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
