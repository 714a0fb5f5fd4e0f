"""Snapshots gathered between two optimizer steps, over the training's own process group.

Bucket by bucket, every rank casts its rows to the dtype on the wire on its own device and sends them to rank
0, which puts them in order on its device, computes the checksum there, and copies the bucket into pinned host
memory. Gathering bucket i + 1 overlaps copying bucket i. All ranks issue these collectives at the same place
of the training loop, so that the order on the communicator is the same everywhere.

Rank 0 holds all buckets of up to two snapshots in host memory, the other ranks nothing. Rank 0's device
needs room for `_MAX_COPYING` + 1 buckets, and every device for its own part of one. No activations exist at
that time, so this does not raise the peak of a step.

Left out: overlap with the next step's forward. The copy to the host takes most of the time, and a forward
that shares the communicator would wait for it too.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from areal_like.weights.buckets import checksum
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.snapshot import GatheredBucket, RankSnapshot, WeightSnapshotter, empty_buffer

_MAX_COPYING = 2
"""Buckets on rank 0's device that are being copied to the host, or wait for it."""


class BoundaryGather(WeightSnapshotter):
    """A `WeightSnapshotter` whose buffers hold whole buckets, on rank 0 only.

    The same code runs on any device; tests compare its buckets with `BackgroundGather`'s on gloo.
    """

    def __init__(self, policy: Policy, ranks: Ranks, *, bucket_bytes: int, dtype: str) -> None:
        """As WeightSnapshotter."""
        super().__init__(policy, ranks, bucket_bytes=bucket_bytes, dtype=dtype)
        self._gathered: dict[int, list[GatheredBucket]] = {}
        """Number of a snapshot -> its buckets, on rank 0."""
        self._copier = _HostCopier(ranks.device)

    def close(self) -> None:
        """As WeightSnapshotter.close: there are no threads to end."""

    def _new_buffers(self) -> list[Tensor]:
        if self._ranks.rank > 0:
            return []
        return [empty_buffer(bucket.num_bytes, self._ranks.device) for bucket in self.buckets]

    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        gathered: list[GatheredBucket] = []
        for index, parts in enumerate(self._layout.buckets):
            part = _empty(self._layout.own[index].num_bytes, self._ranks.device)
            self._layout.copy_own(index, part)
            all_parts = part
            if self._ranks.world_size > 1:
                all_parts, work = parts.begin_gather(part, to_rank=0, group=self._ranks.mesh.get_group())
                work.wait()
            if self._ranks.rank == 0:
                self._copier.wait_for_room()
                whole = _empty(parts.bucket.num_bytes, self._ranks.device)
                parts.assemble(all_parts, into=whole)
                gathered.append(GatheredBucket(buffers[index], known_checksum=checksum(whole)))
                self._copier.copy(whole, into=buffers[index])
        self._copier.finish()
        with self._lock:
            kept = {each.number: self._gathered[each.number] for each in self._snapshots}
            self._gathered = kept | {number: gathered}

    def _read(self, snapshot: RankSnapshot, index: int) -> GatheredBucket:
        with self._lock:
            return self._gathered[snapshot.number][index]


class _HostCopier:
    """Copies buckets from the device to the host on a stream of its own, `_MAX_COPYING` at a time.

    On a CPU it copies at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copying: deque[torch.cuda.Event] = deque()

    def wait_for_room(self) -> None:
        """Waits until fewer than `_MAX_COPYING` buckets are being copied."""
        while len(self._copying) >= _MAX_COPYING:
            self._copying.popleft().synchronize()

    def copy(self, bucket: Tensor, *, into: Tensor) -> None:
        """Starts a copy; `into` is complete after `finish`."""
        if self._stream is None:
            into.copy_(bucket)
            return
        self._stream.wait_stream(torch.cuda.current_stream(bucket.device))
        on_stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        with on_stream:
            into.copy_(bucket, non_blocking=True)
        bucket.record_stream(self._stream)  # its memory is not used again before the copy is done
        self._copying.append(self._stream.record_event())

    def finish(self) -> None:
        """Waits for all copies."""
        while self._copying:
            self._copying.popleft().synchronize()


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
