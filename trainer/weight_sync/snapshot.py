"""The weights of one moment, held still for a push while training goes on.

    freeze() on every rank, between two steps   this rank's rows of every bucket, packed and cast: one copy, and all that training waits for
    Snapshot.read(i) on rank 0, any thread      bucket i made whole: every rank's rows over a process group of their own

Rank 0 asks for one bucket at a time, so it never holds the whole model: at most `_MAX_WHOLE` buckets, and the parts of one more. Every rank
holds at most two frozen copies of its own rows: the one that is being pushed (`acquire`d) and the newest. Freezing overwrites the
newest if nobody has acquired it, so memory is neither asked for nor given back while a run goes on.

    FROZEN -> acquire() -> being pushed -> release() -> FROZEN -> superseded by the next freeze (acquire() is False from then on)

A lone rank's rows are the whole tensors, so its frozen copies are the buckets themselves and nothing is gathered. FSDP2 gives rank r the
rows from r * ceil(rows / M) on. Other ranks gather in a thread that takes its orders from rank 0 and waits for them without limit: a
training run may be quiet for hours, and a rank that dies breaks the group at once.

Left out: gathering over NCCL, which must not run beside the training's own collectives without an order between them. Rows go
through host memory and gloo.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from datetime import timedelta
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import Bucket, TensorSpec, checksum, cut_buckets, spec_of, unflatten
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.models.sharded_weights import row_range, rows_per_rank, shards_of

log = logging.getLogger(__name__)

_MAX_WHOLE = 2
"""Buckets that rank 0 keeps whole, so that engines that keep step share one gathering."""
_QUIET = timedelta(days=30)
_GATHER = timedelta(seconds=120)
"""Longest that rank 0 waits for everybody's rows of one bucket; a rank that is so late still answers, and nobody listens."""
_CLOSE = -1
_NONE = -1


class GatheredBucket:
    """One bucket, of all ranks."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        """uint8[num_bytes], on the CPU."""

    @cached_property
    def checksum(self) -> int:
        """Of `data`; computed when it is asked for, which may be while `data` travels."""
        return checksum(self.data)


class Snapshot(Protocol):
    """What the publisher needs of frozen weights."""

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """In the order of sending, without checksums."""
        ...

    def acquire(self) -> bool:
        """Keeps the weights until `release`; False when newer ones have taken their place."""
        ...

    def release(self) -> None:
        """The push is over."""
        ...

    def read(self, index: int) -> GatheredBucket:
        """One bucket. From any thread, while acquired. Raises WeightSyncError."""
        ...


class _Frozen:
    """One rank's packed rows of one moment, and on rank 0 the snapshot itself."""

    def __init__(self, freezer: WeightSnapshotter, number: int, packed: list[Tensor]) -> None:
        self.number = number
        self.packed = packed
        self._freezer = freezer

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self._freezer.buckets

    def acquire(self) -> bool:
        return self._freezer.acquire(self)

    def release(self) -> None:
        self._freezer.release(self)

    def read(self, index: int) -> GatheredBucket:
        return self._freezer.read(self, index)


class WeightSnapshotter:
    """One rank's end; make it on every rank at the same time, and `close` it there too."""

    def __init__(self, policy: Policy, ranks: Ranks, *, bucket_bytes: int, dtype: str) -> None:
        """`dtype`: of floating-point weights on the wire. Collective."""
        self._ranks = ranks
        self._shards = shards_of(policy)
        specs = [
            TensorSpec(
                name=s.name,
                dtype=dtype if s.rows.is_floating_point() else spec_of(s.name, s.rows).dtype,
                shape=tuple(s.shape),
            )
            for s in self._shards
        ]
        self.buckets = cut_buckets(specs, bucket_bytes=bucket_bytes)
        """Of every snapshot, without checksums."""
        self._rows = [
            Bucket(tensors=tuple(_rows_of_a_rank(spec, ranks.world_size) for spec in bucket.tensors))
            for bucket in self.buckets
        ]
        self._lock = threading.Condition()
        self._held: list[_Frozen] = []
        self._acquired: _Frozen | None = None
        self._spare: list[list[Tensor]] = []
        self._num_frozen = 0
        self._reading = threading.Lock()
        self._whole: OrderedDict[tuple[int, int], GatheredBucket] = OrderedDict()
        self._group = dist.new_group(backend="gloo", timeout=_QUIET) if ranks.world_size > 1 else None
        self._thread = threading.Thread(target=self._serve, name="gather", daemon=True)
        if ranks.rank > 0:
            self._thread.start()

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's frozen copies."""
        return sum(
            flat.numel()
            for packed in (*self._spare, *(frozen.packed for frozen in self._held))
            for flat in packed
        )

    def freeze(self) -> Snapshot | None:
        """The weights of now; rank 0 gets the snapshot. Collective; for the training thread."""
        self._retire()
        packed = self._spare.pop() if self._spare else self._new_buffers()
        rows_of = {shard.name: shard.rows for shard in self._shards}
        for bucket, flat in zip(self._rows, packed, strict=True):
            for name, view in unflatten(bucket, flat).items():
                rows = rows_of[name]
                (view[: len(rows)] if view.ndim else view).copy_(rows)
        with self._lock:
            self._num_frozen += 1
            frozen = _Frozen(self, self._num_frozen, packed)
            self._held.append(frozen)
            self._lock.notify_all()
        return frozen if self._ranks.rank == 0 else None

    def close(self) -> None:
        """No push is under way any more: ends the other ranks' threads. Collective."""
        if self._ranks.rank > 0:
            self._thread.join()
        elif self._group is not None:
            with self._reading:
                dist.broadcast(torch.tensor([_CLOSE, 0]), group=self._group, group_src=0)

    def acquire(self, frozen: _Frozen) -> bool:
        """See `Snapshot`; one at a time."""
        with self._lock:
            assert self._acquired is None
            self._acquired = frozen if frozen in self._held else None
            return self._acquired is frozen

    def release(self, frozen: _Frozen) -> None:
        """See `Snapshot`."""
        with self._lock:
            assert self._acquired is frozen
            self._acquired = None

    def read(self, frozen: _Frozen, index: int) -> GatheredBucket:
        """See `Snapshot`."""
        if self._acquired is not frozen:
            raise WeightSyncError("the push of these weights is over")
        with self._reading:
            key = (frozen.number, index)
            if key not in self._whole:
                self._whole[key] = GatheredBucket(self._gather(frozen, index))
                while len(self._whole) > _MAX_WHOLE:
                    self._whole.popitem(last=False)
            return self._whole[key]

    def _new_buffers(self) -> list[Tensor]:
        is_pinned = self._ranks.device.type == "cuda"
        return [
            torch.empty(bucket.num_bytes, dtype=torch.uint8, pin_memory=is_pinned) for bucket in self._rows
        ]

    def _retire(self) -> None:
        """Gives up all that is frozen but what is being pushed; rank 0 knows what that is."""
        with self._lock:
            kept = torch.tensor([_NONE if self._acquired is None else self._acquired.number])
            if self._ranks.rank == 0:
                self._keep(int(kept))
        if self._group is not None:
            dist.broadcast(kept, src=0)
            with self._lock:
                self._keep(int(kept))

    def _keep(self, number: int) -> None:
        self._spare += [frozen.packed for frozen in self._held if frozen.number != number]
        self._held = [frozen for frozen in self._held if frozen.number == number]

    def _gather(self, frozen: _Frozen, index: int) -> Tensor:
        """On rank 0: bucket `index` whole."""
        if self._group is None:
            return frozen.packed[index]
        try:
            dist.broadcast(torch.tensor([frozen.number, index]), group=self._group, group_src=0)
            parts = [torch.empty_like(frozen.packed[index]) for _ in range(self._ranks.world_size)]
            work: Any = dist.gather(
                frozen.packed[index], parts, group=self._group, group_dst=0, async_op=True
            )
            work.wait(_GATHER)
        except RuntimeError as error:
            raise WeightSyncError(
                f"a rank of the trainer was lost while weights were gathered: {error}"
            ) from None
        flat = torch.empty(self.buckets[index].num_bytes, dtype=torch.uint8)
        whole = unflatten(self.buckets[index], flat)
        for rank, part in enumerate(parts):
            for name, rows in unflatten(self._rows[index], part).items():
                first, end = row_range(whole[name].shape, rank=rank, world_size=self._ranks.world_size)
                whole[name][first:end].copy_(rows[: end - first])
        return flat

    def _serve(self) -> None:
        """The other ranks' thread: gathers what rank 0 asks for until it closes or is gone."""
        order = torch.empty(2, dtype=torch.int64)
        try:
            while True:
                dist.broadcast(order, group=self._group, group_src=0)
                number, index = order.tolist()
                if number == _CLOSE:
                    return
                with self._lock:
                    # Rank 0 may be ahead of our freeze. It bounds the wait; a training thread that fails in its freeze ends the process.
                    self._lock.wait_for(lambda: self._num_frozen >= int(order[0]))
                    packed = next((frozen.packed for frozen in self._held if frozen.number == number), None)
                # Retired after a push that broke: rank 0 waits for these rows, and discards them.
                part = (
                    packed[index] if packed else torch.empty(self._rows[index].num_bytes, dtype=torch.uint8)
                )
                dist.gather(part, None, group=self._group, group_dst=0)
        except RuntimeError as error:
            log.info(
                "no more weights are gathered: %s", error
            )  # rank 0 has ended; the training thread notices by itself


def _rows_of_a_rank(spec: TensorSpec, world_size: int) -> TensorSpec:
    """A rank's rows of a tensor, padded so that all ranks have equally many."""
    if world_size == 1:  # also a tensor without dimensions
        return spec
    num_rows = rows_per_rank(torch.Size(spec.shape), world_size)
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(num_rows, *spec.shape[1:]))
