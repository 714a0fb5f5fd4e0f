"""Copies the weights for a push between two optimizer steps, so that training can continue during the push.

    snapshotter.take_snapshot()   on every rank: copies and casts this rank's rows of every bucket. Training
                                  waits only for this copy.
    snapshot.read(i)              on rank 0, in any thread: gathers bucket i from all ranks over a separate
                                  process group.

Rank 0 reads one bucket at a time, so it never holds the whole model: at most `_MAX_GATHERED` buckets, and the
parts of one more. Every rank holds at most two copies of its rows: the copy that is being pushed and the
newest copy. A new snapshot reuses the memory of the newest copy unless that is being pushed, so memory use
does not grow during a run.

With one rank the rows are the whole tensors: its copies are the buckets, and nothing is gathered. The other
ranks gather in a thread that waits for rank 0's requests without a time limit: a run may push nothing for
hours, and if a rank dies the group breaks at once.

Left out: gathering over NCCL, which must not run beside the training's own collectives without an order
between them. Rows go through host memory and gloo.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from datetime import timedelta
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
from trainer.weight_sync.rank_parts import PushLayout

log = logging.getLogger(__name__)

_MAX_GATHERED = 2
"""Gathered buckets that rank 0 keeps, so that groups of engines that are pushed to at the same time share
them."""
_GROUP_TIMEOUT = timedelta(days=30)
"""Timeout of the gathering group: longest time between two pushes."""
_GATHER_TIMEOUT = timedelta(seconds=120)
"""Longest time that rank 0 waits for all ranks' rows of one bucket. Rows that arrive later are discarded."""
_CLOSE = -1
"""Broadcast by rank 0 instead of a snapshot's number to end the other ranks' threads."""
_NONE = -1
"""Broadcast by rank 0 instead of the acquired snapshot's number if no snapshot is acquired."""


class GatheredBucket:
    """One bucket with the rows of all ranks."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        """uint8[num_bytes], on the CPU."""

    @cached_property
    def checksum(self) -> int:
        """Checksum of `data`. Computed on first use, so that this can overlap sending `data`."""
        return checksum(self.data)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `data` in hexadecimal; computed on first use, like the checksum."""
        return sha256(self.data)


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

    def read(self, index: int) -> GatheredBucket:
        """Returns one bucket. From any thread, while acquired. Raises WeightSyncError."""
        ...


class _RankSnapshot:
    """One rank's copy of its rows; on rank 0 it is also the `Snapshot`."""

    def __init__(self, snapshotter: WeightSnapshotter, number: int, row_buffers: list[Tensor]) -> None:
        self.number = number
        self.row_buffers = row_buffers
        """Per bucket this rank's rows, cast to the dtype on the wire, as uint8."""
        self._snapshotter = snapshotter

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self._snapshotter.buckets

    def acquire(self) -> bool:
        return self._snapshotter.acquire(self)

    def release(self) -> None:
        self._snapshotter.release(self)

    def read(self, index: int) -> GatheredBucket:
        return self._snapshotter.read(self, index)


class WeightSnapshotter:
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
        self._snapshots: list[_RankSnapshot] = []
        """The newest snapshot, and the snapshot that is being pushed."""
        self._acquired: _RankSnapshot | None = None
        self._free_buffers: list[list[Tensor]] = []
        self._num_taken = 0
        self._gather_lock = threading.Lock()
        self._gathered: OrderedDict[tuple[int, int], GatheredBucket] = OrderedDict()
        """(number of the snapshot, index of the bucket) -> bucket, on rank 0."""
        is_alone = ranks.world_size == 1
        self._group = None if is_alone else dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        self._thread = threading.Thread(target=self._serve_gathers, name="gather", daemon=True)
        if ranks.rank > 0:
            self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's copies, in bytes."""
        taken = (snapshot.row_buffers for snapshot in self._snapshots)
        return sum(buffer.numel() for buffers in (*self._free_buffers, *taken) for buffer in buffers)

    def take_snapshot(self) -> Snapshot | None:
        """Copies the present weights; returns the snapshot on rank 0. Collective; for the training thread."""
        self._free_superseded()
        row_buffers = self._free_buffers.pop() if self._free_buffers else self._new_buffers()
        for index, buffer in enumerate(row_buffers):
            self._layout.copy_own(index, buffer)
        with self._lock:
            self._num_taken += 1
            snapshot = _RankSnapshot(self, self._num_taken, row_buffers)
            self._snapshots.append(snapshot)
            self._lock.notify_all()
        return snapshot if self._ranks.rank == 0 else None

    def close(self) -> None:
        """Ends the other ranks' threads. Collective. Call it after the last push has ended."""
        if self._ranks.rank > 0:
            self._thread.join()
        elif self._group is not None:
            with self._gather_lock:
                dist.broadcast(torch.tensor([_CLOSE, 0]), group=self._group, group_src=0)

    def acquire(self, snapshot: _RankSnapshot) -> bool:
        """`Snapshot.acquire`; at most one is acquired at a time."""
        with self._lock:
            assert self._acquired is None
            self._acquired = snapshot if snapshot in self._snapshots else None
            return self._acquired is snapshot

    def release(self, snapshot: _RankSnapshot) -> None:
        """`Snapshot.release`."""
        with self._lock:
            assert self._acquired is snapshot
            self._acquired = None

    def read(self, snapshot: _RankSnapshot, index: int) -> GatheredBucket:
        """`Snapshot.read`."""
        if self._acquired is not snapshot:
            raise WeightSyncError("the push of these weights is over")
        with self._gather_lock:
            key = (snapshot.number, index)
            if key not in self._gathered:
                self._gathered[key] = GatheredBucket(self._gather(snapshot, index))
                while len(self._gathered) > _MAX_GATHERED:
                    self._gathered.popitem(last=False)
            return self._gathered[key]

    def _new_buffers(self) -> list[Tensor]:
        is_pinned = self._ranks.device.type == "cuda"
        return [
            torch.empty(part.num_bytes, dtype=torch.uint8, pin_memory=is_pinned) for part in self._layout.own
        ]

    def _free_superseded(self) -> None:
        """Frees every snapshot but the acquired one. Collective: only rank 0 has acquired one."""
        with self._lock:
            kept = torch.tensor([_NONE if self._acquired is None else self._acquired.number])
            if self._ranks.rank == 0:
                self._free_all_but(int(kept))
        if self._group is not None:
            dist.broadcast(kept, src=0)
            with self._lock:
                self._free_all_but(int(kept))

    def _free_all_but(self, number: int) -> None:
        self._free_buffers += [each.row_buffers for each in self._snapshots if each.number != number]
        self._snapshots = [each for each in self._snapshots if each.number == number]

    def _gather(self, snapshot: _RankSnapshot, index: int) -> Tensor:
        """On rank 0: bucket `index` with the rows of all ranks, uint8[num_bytes]."""
        parts, num_bytes = self._layout.buckets[index], self.buckets[index].num_bytes
        if self._group is None:
            return snapshot.row_buffers[index][:num_bytes]
        try:
            dist.broadcast(torch.tensor([snapshot.number, index]), group=self._group, group_src=0)
            gathered, work = parts.begin_gather(snapshot.row_buffers[index], to_rank=0, group=self._group)
            work.wait(_GATHER_TIMEOUT)
        except RuntimeError as error:
            raise WeightSyncError(
                f"a rank of the trainer was lost while weights were gathered: {error}"
            ) from None
        flat = torch.empty(num_bytes, dtype=torch.uint8)
        parts.assemble(gathered, into=flat)
        return flat

    def _serve_gathers(self) -> None:
        """The other ranks' thread: sends the rows that rank 0 requests until rank 0 closes or is gone."""
        request = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                dist.broadcast(request, group=self._group, group_src=0)
                number, index = map(int, request)
                if number == _CLOSE:
                    return
                rows = self._rows_of(number, index)
                _, work = self._layout.buckets[index].begin_gather(rows, to_rank=0, group=self._group)
                work.wait()
        except RuntimeError as error:  # rank 0 has ended; the training thread fails by itself
            log.info("this rank gathers no more weights: %s", error)

    def _rows_of(self, number: int, index: int) -> Tensor:
        with self._lock:
            # Rank 0 may request a snapshot that this rank has not taken yet. No timeout is needed: rank 0
            # bounds its own wait, and if this rank's training thread fails first, the process ends.
            self._lock.wait_for(lambda: self._num_taken >= number)
            for snapshot in self._snapshots:
                if snapshot.number == number:
                    return snapshot.row_buffers[index]
        # Freed after a broken push. Rank 0 still waits for this number of bytes, and discards them.
        return torch.empty(self._layout.own[index].num_bytes, dtype=torch.uint8)
