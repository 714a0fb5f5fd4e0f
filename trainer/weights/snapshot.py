"""Copies the weights for a push between two optimizer steps, so that training can continue during the push.

    snapshotter.take_snapshot()   on every rank, between two steps; training waits for it
    snapshot.stage()              on a sender, in any thread: its buckets and their sums are ready to be sent
    snapshot.read(i)              on a sender, in any thread: bucket i, one of its own

A sender is a rank that sends buckets to the engines: rank 0, or with `weights.senders` M ranks. Sender j has
the buckets j, j + M, j + 2 M, ...

There are two ways to gather the rows of all ranks. `BackgroundGather`, on CPUs: training waits only for a
copy of each rank's own rows, and the senders gather them later, bucket by bucket, each over a gloo group of
its own. `BoundaryGather`, on GPUs: the ranks gather before training continues, over the training's own NCCL
group, because a second NCCL communicator must not run concurrently without an order between the two. Both
send the parts of a bucket that `PushLayout` describes. Of several replicas (`trainer.replicas`) only the
ranks of replica 0, which has the senders, copy and gather; `MergedWeights` exchanges matrices in each.

At most two snapshots exist: the one that is being pushed and the newest. A new snapshot reuses the memory of
the newest one unless that is being pushed, so memory use does not grow during a run. With
`weights.num_snapshots=1` there is memory for one: `take_snapshot` waits until the push has ended.

With `weights.delta=auto` a sender also keeps the buckets of the snapshot that was pushed last, the base of
the next push: one snapshot more, or with several ranks in `BackgroundGather` all buckets of two pushes.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import NamedThread
from areal_like.weights.buckets import Bucket, TensorSpec, checksum, cut_buckets, spec_of, unflatten
from areal_like.weights.hf_layout import HfTensor
from areal_like.weights.integrity import sha256
from trainer.distributed.pinning import host_empty
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import row_range
from trainer.models.policy import Policy
from trainer.weights.push_source import PushSource, push_source
from trainer.weights.shares import sender_ranks, share_of_sender

log = logging.getLogger(__name__)

_RELEASE_WAIT_S = 5.0
"""Longest time between two collectives in which rank 0 tells that a push still lasts. The push has a time
limit of its own."""
_NONE = -1
"""Broadcast by rank 0 instead of a snapshot's number if no snapshot is acquired, or was pushed."""


class GatheredBucket:
    """One bucket with the rows of all ranks. Its sums are computed once, on first use."""

    def __init__(self, data: Tensor, *, known_checksum: int | None = None) -> None:
        """`known_checksum`: the checksum of `data`, if it was computed when the rows were gathered."""
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


class Snapshot:
    """The weights at the end of one optimizer step: one rank's share, and on a sender its buckets to push.

    NEWEST -> acquire() -> being pushed -> release() -> NEWEST -> replaced by a newer one: acquire() is False

    At most one is acquired at a time, by rank 0, which keeps it on all ranks.
    """

    def __init__(self, snapshotter: WeightSnapshotter, *, number: int, buffers: list[Tensor]) -> None:
        self.number = number
        self.buffers = buffers
        """This rank's data of each bucket, uint8; the content depends on the snapshotter."""
        self.buckets = snapshotter.buckets
        """The buckets in the order of sending, without checksums."""
        self.adapter = snapshotter.adapter
        """Header of the adapter that the buckets hold; None if they hold all weights."""
        self.untrained = snapshotter.untrained
        """Tensors of the model's files that no push contains."""
        self.is_acquired = self.is_freed = False
        self._snapshotter = snapshotter

    def acquire(self) -> bool:
        """Keeps the weights until `release`; returns False if a newer snapshot has replaced this one."""
        with self._snapshotter.lock:
            self.is_acquired = not self.is_freed
            return self.is_acquired

    def release(self) -> None:
        """Ends the push. With `weights.delta=auto` this snapshot can then be the base of the next push."""
        with self._snapshotter.lock:
            self.is_acquired = False
            self._snapshotter.last_pushed = self.number
            self._snapshotter.lock.notify_all()

    @property
    def base_number(self) -> int:
        """Number of the snapshot that was pushed last and that the senders keep; below 1: none."""
        return self._snapshotter.last_pushed if self._snapshotter.keeps_base else _NONE

    def base(self, number: int, index: int) -> Tensor:
        """One of this sender's buckets of the snapshot with `base_number`, uint8[num_bytes] on the CPU. From
        any thread, while this snapshot is acquired. Raises WeightSyncError if it was freed."""
        return self._snapshotter.base_bucket(number, index)

    def stage(self, *, integrity: str) -> None:
        """Makes every bucket of this sender and its sums ready, so that `read` returns at once: for engines
        that are paused during the broadcast. From any thread, while acquired; may be repeated. Raises
        WeightSyncError.

        `integrity`: `sha256` computes the digests too.
        """
        self._snapshotter.stages = True
        for index in self._snapshotter.share:
            self.read(index).sums(integrity=integrity)

    def read(self, index: int) -> GatheredBucket:
        """Returns one of this sender's buckets. From any thread, while acquired. Raises WeightSyncError."""
        if self.is_freed or not (self.is_acquired or self._snapshotter.is_helper):
            raise _push_is_over()
        return self._snapshotter.gathered(self, index)


class WeightSnapshotter(ABC):
    """Takes the snapshots of one rank. Create and `close` it on all ranks at the same time."""

    def __init__(
        self,
        policy: Policy,
        ranks: Ranks,
        *,
        bucket_bytes: int,
        dtype: str,
        lora: str = "merged",
        senders: int = 1,
        delta: str = "off",
    ) -> None:
        """`dtype`: dtype of floating-point weights on the wire. `lora`: `weights.lora`. `senders`:
        `weights.senders`. `delta`: `weights.delta`. Collective. Raises ConfigError if there are more senders
        than ranks."""
        self._ranks = ranks
        self._source = push_source(policy, ranks, dtype=dtype, lora=lora)
        self.keeps_base = delta != "off" and self._source.adapter is None
        """True if the buckets that were pushed last are kept."""
        self.last_pushed = _NONE
        """On rank 0: number of the snapshot whose push ended last."""
        self.adapter = self._source.adapter
        """Header of the adapter that is pushed; None if all weights are."""
        stored = policy.stored
        self.untrained = () if stored is None else (*stored.untouched, *stored.obsolete)
        """Tensors of the model's files that no push contains."""
        self._layout = PushLayout(
            policy.model,
            source=self._source,
            rank=ranks.shard_rank,
            world_size=ranks.num_shards,
            bucket_bytes=bucket_bytes,
            dtype=dtype,
            float32_names=policy.float32_names,
        )
        self.buckets = tuple(parts.bucket for parts in self._layout.buckets)
        """The buckets of every snapshot, without checksums."""
        self.sender_ranks = sender_ranks(senders, num_ranks=ranks.num_shards, num_buckets=len(self.buckets))
        """The ranks that send, in the order of their numbers."""
        self.share = range(0)
        """Indices of the buckets that this rank sends."""
        if ranks.rank in self.sender_ranks:
            number = self.sender_ranks.index(ranks.rank)
            self.share = share_of_sender(
                number, num_senders=len(self.sender_ranks), num_buckets=len(self.buckets)
            )
        self.is_helper = ranks.rank > 0
        """True if not this rank but rank 0 decides how long a snapshot is kept."""
        self.lock = threading.Condition()
        """Guards the states of the snapshots."""
        self.stages = False
        """True once a push was staged: every bucket of a snapshot is kept from then on."""
        self.num_snapshots = 2
        """Most snapshots that exist at a time, 1 or 2; equal on all ranks."""
        self._snapshots: list[Snapshot] = []
        """The newest snapshot, and the snapshot that is being pushed."""
        self._free_buffers: list[list[Tensor]] = []
        self._num_taken = 0
        self.metrics: dict[str, float] = {}
        """Figures of the newest snapshot, equal on all ranks."""

    @property
    def num_bytes(self) -> int:
        """Memory of this rank's snapshots, in bytes."""
        taken = (snapshot.buffers for snapshot in self._snapshots)
        return sum(buffer.numel() for buffers in (*self._free_buffers, *taken) for buffer in buffers)

    def take_snapshot(self) -> Snapshot | None:
        """Copies the current weights; returns the snapshot on rank 0. Collective; for the training thread."""
        self._free_superseded()
        while len(self._snapshots) == self.num_snapshots + self._keeps_pushed_snapshot:
            self._wait_for_release()
            self._free_superseded()
        is_copied = self._ranks.replica == 0
        new_buffers = self._new_buffers if is_copied else list
        buffers = self._free_buffers.pop() if self._free_buffers else new_buffers()
        self._source.begin()
        if is_copied:
            self._copy_weights(buffers, number=self._num_taken + 1)
        self.metrics = self._source.end()
        with self.lock:
            self._num_taken += 1
            snapshot = Snapshot(self, number=self._num_taken, buffers=buffers)
            self._snapshots.append(snapshot)
            self.lock.notify_all()
        return snapshot if self._ranks.rank == 0 else None

    def find(self, number: int) -> Snapshot:
        """The snapshot that rank 0 is pushing, on another sender. From any thread.

        Waits until this rank has taken it, without a time limit: rank 0 bounds its own wait. Raises
        WeightSyncError if it was freed.
        """
        with self.lock:
            self.lock.wait_for(lambda: self._num_taken >= number)
            for snapshot in self._snapshots:
                if snapshot.number == number:
                    return snapshot
        raise _push_is_over()

    def base_bucket(self, number: int, index: int) -> Tensor:
        """One of this sender's buckets of the snapshot that was pushed last; see `Snapshot.base`."""
        with self.lock:
            for snapshot in self._snapshots:
                if snapshot.number == number:
                    return snapshot.buffers[self._buffer_of(index)][: self.buckets[index].num_bytes]
        raise _push_is_over()

    @property
    def _keeps_pushed_snapshot(self) -> bool:
        """True if the base is a snapshot, which is then kept; equal on all ranks."""
        return self.keeps_base

    @abstractmethod
    def _buffer_of(self, index: int) -> int:
        """Place of a whole bucket among the buffers of a snapshot."""

    @abstractmethod
    def close(self) -> None:
        """Ends this rank's threads. Collective. Call it after the last push has ended."""

    @abstractmethod
    def _new_buffers(self) -> list[Tensor]:
        """Memory for one more snapshot, pinned if the device is a GPU."""

    @abstractmethod
    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        """Fills the buffers of snapshot `number` with the current weights. Collective."""

    @abstractmethod
    def gathered(self, snapshot: Snapshot, index: int) -> GatheredBucket:
        """One of this sender's buckets of an acquired snapshot. From any thread. Raises WeightSyncError."""

    def _free_superseded(self) -> None:
        """Frees every snapshot except the acquired one and the base. Collective, because only rank 0 knows
        which they are."""
        with self.lock:
            acquired = [each.number for each in self._snapshots if each.is_acquired]
            assert len(acquired) <= 1
            base = self.last_pushed if self._keeps_pushed_snapshot else _NONE
            kept = torch.tensor([*(acquired or [_NONE]), base])
            if self._ranks.rank == 0:
                self._free_all_but(kept.tolist())
        if self._ranks.world_size > 1:
            dist.broadcast(kept, src=0)
            with self.lock:
                self._free_all_but(kept.tolist())

    def _wait_for_release(self) -> None:
        """On rank 0, waits for the end of the push; the other ranks wait in the next collective, so not for
        long."""
        if self._ranks.rank == 0:
            with self.lock:
                self.lock.wait_for(
                    lambda: not any(each.is_acquired for each in self._snapshots), timeout=_RELEASE_WAIT_S
                )

    def _free_all_but(self, numbers: Collection[int]) -> None:
        for each in self._snapshots:
            if each.number not in numbers:
                each.is_freed = True
                self._free_buffers.append(each.buffers)
        self._snapshots = [each for each in self._snapshots if each.number in numbers]


def _push_is_over() -> WeightSyncError:
    return WeightSyncError("the push of these weights is over")


def empty_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """uint8[num_bytes] on the CPU, pinned if `device` is a GPU, so that copies run at the bus' full rate."""
    return host_empty((num_bytes,), torch.uint8, pinned=device.type == "cuda")


_MAX_GATHERED = 2
"""Most gathered buckets that a sender keeps, so that groups of engines in concurrent pushes share them."""
_GROUP_TIMEOUT = timedelta(days=30)
"""Timeout of a gathering group: longest time between two pushes."""
_GATHER_TIMEOUT = timedelta(seconds=120)
"""Longest time that a sender waits for all ranks' rows of a bucket. Rows that arrive later are discarded."""
_CLOSE = -1
"""Broadcast by a sender instead of a snapshot's number to end the other ranks' threads."""


class BackgroundGather(WeightSnapshotter):
    """A `WeightSnapshotter` whose buffers hold this rank's rows of each bucket.

    Training waits only until every rank has copied its own rows. A sender reads one bucket at a time: it
    keeps at most `_MAX_GATHERED` buckets and the parts of one more. If a push is staged it keeps all of its
    own, in memory that later pushes reuse.

    With one rank the rows are the whole tensors: its copies are the buckets, and gathering is not needed.
    Each sender has a gloo group of all ranks, so that all ranks make the collectives of one group in the
    order of its sender's requests, and the senders need no order among one another. The other ranks gather in
    a thread for each sender that waits for its requests without a time limit: a run may not push for hours,
    and if a rank dies the group breaks at once.
    """

    def __init__(self, policy: Policy, ranks: Ranks, **settings: Any) -> None:
        """The arguments are those of WeightSnapshotter."""
        super().__init__(policy, ranks, **settings)
        self._gather_lock = threading.Lock()
        self._is_closed = False
        self._gathered: OrderedDict[int, tuple[int, GatheredBucket]] = OrderedDict()
        """Index of a bucket -> (number of the snapshot, bucket), on a sender, oldest first."""
        self._base: dict[int, tuple[int, GatheredBucket]] = {}
        """The same for the snapshot that was gathered before, if the base of the next push is kept."""
        self._groups: dict[int, dist.ProcessGroup] = {}
        """Rank of a sender -> the group over which it gathers; empty if there is one rank, or on the ranks of
        other replicas."""
        if ranks.num_shards > 1:
            of_replica_0 = list(range(ranks.num_shards))
            groups = {
                rank: dist.new_group(of_replica_0, backend="gloo", timeout=_GROUP_TIMEOUT)
                for rank in self.sender_ranks
            }
            self._groups = groups if ranks.replica == 0 else {}
        self._threads = [
            NamedThread(partial(self._serve_gathers, sender), name="gather")
            for sender in self._groups
            if sender != ranks.rank
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads of all ranks."""
        if (group := self._groups.get(self._ranks.rank)) is not None:
            with self._gather_lock:
                self._is_closed = True
                dist.broadcast(torch.tensor([_CLOSE, 0]), group=group, group_src=self._ranks.rank)
        for thread in self._threads:
            thread.join()

    def _new_buffers(self) -> list[Tensor]:
        return [empty_buffer(part.num_bytes, self._ranks.device) for part in self._layout.own]

    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        for index, buffer in enumerate(buffers):
            self._layout.copy_own(index, buffer)

    def gathered(self, snapshot: Snapshot, index: int) -> GatheredBucket:
        """Gathers the bucket, or returns it if it was gathered before and is kept."""
        with self._gather_lock:
            if self._is_closed:  # a push that was interrupted at the end: no rank would send its rows
                raise _push_is_over()
            number, bucket = self._gathered.get(index, (0, None))
            if bucket is None or number != snapshot.number:
                # The push of another number is over, so its bucket is no longer read, except as the base.
                unused = bucket
                if self._keeps_gathered and bucket is not None:
                    _, unused = self._base.get(index, (0, None))
                    self._base[index] = number, bucket
                flat = self._gather(snapshot, index, into=unused.data if unused is not None else None)
                self._gathered.pop(index, None)
                self._gathered[index] = snapshot.number, (bucket := GatheredBucket(flat))
                most = len(self.buckets) if self.stages or self._keeps_gathered else _MAX_GATHERED
                while len(self._gathered) > most:
                    self._gathered.popitem(last=False)
            return bucket

    def base_bucket(self, number: int, index: int) -> Tensor:
        """See WeightSnapshotter. With several ranks these are gathered buckets."""
        if not self._keeps_gathered:
            return super().base_bucket(number, index)
        with self._gather_lock:
            for held, bucket in (self._base.get(index, (0, None)), self._gathered.get(index, (0, None))):
                if bucket is not None and held == number:
                    return bucket.data
        raise _push_is_over()

    @property
    def _keeps_gathered(self) -> bool:
        return self.keeps_base and bool(self._groups)

    @property
    def _keeps_pushed_snapshot(self) -> bool:
        return self.keeps_base and self._ranks.num_shards == 1

    def _buffer_of(self, index: int) -> int:
        return index

    def _gather(self, snapshot: Snapshot, index: int, *, into: Tensor | None) -> Tensor:
        """On a sender: bucket `index` with the rows of all ranks, uint8[num_bytes]; in `into` if given."""
        parts, num_bytes = self._layout.buckets[index], self.buckets[index].num_bytes
        if not self._groups:
            return snapshot.buffers[index][:num_bytes]
        rank, group = self._ranks.rank, self._groups[self._ranks.rank]
        try:
            dist.broadcast(torch.tensor([snapshot.number, index]), group=group, group_src=rank)
            gathered, work = parts.begin_gather(snapshot.buffers[index], to_rank=rank, group=group)
            work.wait(_GATHER_TIMEOUT)
        except RuntimeError as error:
            raise WeightSyncError(
                f"a rank of the trainer was lost while weights were gathered: {error}"
            ) from None
        flat = torch.empty(num_bytes, dtype=torch.uint8) if into is None else into
        parts.assemble(gathered, into=flat)
        return flat

    def _serve_gathers(self, sender: int) -> None:
        """A thread of the other ranks: sends the rows that a sender requests until it closes or is gone.

        `sender`: its rank.
        """
        group, request = self._groups[sender], torch.empty(2, dtype=torch.int64)
        try:
            while True:
                dist.broadcast(request, group=group, group_src=sender)
                number, index = map(int, request)
                if number == _CLOSE:
                    return
                rows = self._rows_of(number, index)
                _, work = self._layout.buckets[index].begin_gather(rows, to_rank=sender, group=group)
                work.wait()
        except RuntimeError as error:  # the sender has ended; the training thread fails by itself
            log.info("this rank has stopped gathering weights: %s", error)

    def _rows_of(self, number: int, index: int) -> Tensor:
        with self.lock:
            # A sender may request a snapshot that this rank has not taken yet. No timeout is needed: it
            # bounds its own wait, and if this rank's training thread fails first, the process ends.
            self.lock.wait_for(lambda: self._num_taken >= number)
            for snapshot in self._snapshots:
                if snapshot.number == number:
                    return snapshot.buffers[index]
        # Freed after a broken push. The sender still waits for this number of bytes, and discards them.
        return torch.empty(self._layout.own[index].num_bytes, dtype=torch.uint8)


_MAX_COPYING = 2
"""Most buckets on a sender's device that are being copied to the host or wait for the copy."""


class BoundaryGather(WeightSnapshotter):
    """A `WeightSnapshotter` whose buffers hold whole buckets, those of a sender on that sender only.

    Bucket by bucket, every rank casts its rows to the dtype on the wire on its own device and sends them to
    the bucket's sender, which puts them in order on its device, computes the checksum there, and copies the
    bucket into pinned host memory. Gathering bucket i + 1 overlaps copying bucket i. All ranks issue these
    collectives at the same place of the training loop, so that the order on the communicator is the same
    everywhere.

    A sender holds all its buckets of up to two snapshots in host memory; the other ranks hold none. Its
    device needs room for `_MAX_COPYING` + 1 buckets, and every device for its own part of one. There are no
    activations at that time, so this does not raise the peak of a step.

    Left out: overlap with the next step's forward. The copy to the host takes most of the time, and a forward
    that shares the communicator would wait for it too. The same code runs on any device; tests compare its
    buckets with `BackgroundGather`'s on gloo.
    """

    def __init__(self, policy: Policy, ranks: Ranks, **settings: Any) -> None:
        """The arguments are those of WeightSnapshotter."""
        super().__init__(policy, ranks, **settings)
        self._gathered: dict[int, dict[int, GatheredBucket]] = {}
        """Number of a snapshot -> the buckets that this rank sends, by index."""
        self._copier = _HostCopier(ranks.device)

    def close(self) -> None:
        """Does nothing: there are no threads to end."""

    def _new_buffers(self) -> list[Tensor]:
        return [empty_buffer(self.buckets[index].num_bytes, self._ranks.device) for index in self.share]

    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        gathered: dict[int, GatheredBucket] = {}
        into = dict(zip(self.share, buffers, strict=True))
        for index, parts in enumerate(self._layout.buckets):
            part = _empty(self._layout.own[index].num_bytes, self._ranks.device)
            self._layout.copy_own(index, part)
            all_parts = part
            if self._ranks.num_shards > 1:
                sender = self.sender_ranks[index % len(self.sender_ranks)]
                group = self._ranks.mesh.get_group()
                all_parts, work = parts.begin_gather(part, to_rank=sender, group=group)
                work.wait()
            if index in into:
                self._copier.wait_for_room()
                whole = _empty(parts.bucket.num_bytes, self._ranks.device)
                parts.assemble(all_parts, into=whole)
                gathered[index] = GatheredBucket(into[index], known_checksum=checksum(whole))
                self._copier.copy(whole, into=into[index])
        self._copier.finish()
        with self.lock:
            kept = {each.number: self._gathered[each.number] for each in self._snapshots}
            self._gathered = kept | {number: gathered}

    def _buffer_of(self, index: int) -> int:
        return self.share.index(index)

    def gathered(self, snapshot: Snapshot, index: int) -> GatheredBucket:
        """Returns the bucket that was gathered when the snapshot was taken."""
        with self.lock:
            if (buckets := self._gathered.get(snapshot.number)) is None:
                raise _push_is_over()
            return buckets[index]


class _HostCopier:
    """Copies buckets from the device to the host on a separate stream, `_MAX_COPYING` at a time.

    On a CPU it copies synchronously.
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
        bucket.record_stream(self._stream)  # its memory is not reused before the copy is done
        self._copying.append(self._stream.record_event())

    def finish(self) -> None:
        """Waits for all copies."""
        while self._copying:
            self._copying.popleft().synchronize()


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


_ALIGN = 8
"""Every part ends at a multiple of this, so that concatenated parts can be viewed in any dtype."""


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """One rank's part of one bucket."""

    specs: tuple[TensorSpec, ...]
    """The rows of each tensor that this rank holds; tensors without such rows are left out."""
    starts: tuple[int, ...]
    """Index of the first of them in dimension 0 of the whole tensor."""

    @property
    def num_bytes(self) -> int:
        """Length of the part's buffer, a multiple of `_ALIGN`."""
        return -(-sum(spec.num_bytes for spec in self.specs) // _ALIGN) * _ALIGN

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of the part's uint8[num_bytes] buffer, one for each of `specs`, without copying."""
        if not self.specs:
            return []
        rows = Bucket(tensors=self.specs)
        return list(unflatten(rows, flat[: rows.num_bytes]).values())


@dataclass(frozen=True, kw_only=True)
class BucketParts:
    """One bucket and its part on each rank."""

    bucket: Bucket
    of_rank: tuple[RankPart, ...]

    @property
    def num_bytes(self) -> int:
        """Total size of all parts, end to end."""
        return sum(part.num_bytes for part in self.of_rank)

    def assemble(self, parts: Tensor, into: Tensor) -> None:
        """Copies all ranks' parts, uint8[num_bytes] in rank order, to their places in the whole bucket.

        `into`: uint8[bucket.num_bytes].
        """
        tensors = unflatten(self.bucket, into)
        for part, flat in zip(self.of_rank, self._split(parts), strict=True):
            for spec, start, rows in zip(part.specs, part.starts, part.views(flat), strict=True):
                tensors[spec.name][start : start + len(rows)].copy_(rows)

    def begin_gather(self, part: Tensor, *, to_rank: int, group: Any) -> tuple[Tensor, Any]:
        """Starts sending every rank's part to rank `to_rank`. Collective.

        `part`: this rank's part, uint8[its num_bytes], on a device that the group's backend supports. Returns
        all parts in rank order (empty on the other ranks), and the work to wait for.
        """
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        sizes = [each.num_bytes for each in self.of_rank] if rank == to_rank else [0] * world_size
        sent = [len(part) if other == to_rank else 0 for other in range(world_size)]
        parts = part.new_empty(sum(sizes))
        # torch has no gather for parts of different sizes. NCCL skips empty parts.
        work = dist.all_to_all_single(parts, part, sizes, sent, group=group, async_op=True)
        return parts, work

    def _split(self, parts: Tensor) -> Sequence[Tensor]:
        return torch.split(parts, [part.num_bytes for part in self.of_rank])


class PushLayout:
    """The buckets of every push, and this rank's rows of them.

    FSDP2 shards rows: of M ranks, rank r holds ceil(rows / M) rows of each parameter from r * ceil(rows / M)
    on. A checkpoint's tensor that is a whole parameter is divided in the same way; a tensor inside a row of a
    parameter (an expert's matrix) is on one rank. A rank's part of a bucket is one flat buffer with its rows
    of the bucket's tensors, in their order. Parts have different sizes: with padding to the largest, a bucket
    of experts that are all on one rank would need M times its memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: PushSource,
        rank: int,
        world_size: int,
        bucket_bytes: int,
        dtype: str,
        float32_names: Collection[str] = (),
    ) -> None:
        """`model`: a sharded transformers model. `source`: what is pushed of it. `dtype`: dtype of
        floating-point weights on the wire; `float32_names`: parameters that are float32 there anyway."""
        params = dict(model.named_parameters())
        tensors = {tensor.name: tensor for tensor in source.tensors}
        specs = [
            _spec_on_wire(tensor, params[tensor.param], "float32" if tensor.param in float32_names else dtype)
            for tensor in tensors.values()
        ]
        num_rows = {name: param.shape[0] for name, param in params.items()}
        self.buckets = tuple(
            BucketParts(
                bucket=bucket,
                of_rank=tuple(
                    _part_of(bucket, tensors, num_rows, rank=each, world_size=world_size)
                    for each in range(world_size)
                ),
            )
            for bucket in cut_buckets(specs, bucket_bytes=bucket_bytes)
        )
        self.own = tuple(bucket.of_rank[rank] for bucket in self.buckets)
        """This rank's part of each bucket."""
        self._source = source
        self._tensors = tensors
        self._first_rows = {
            name: row_range(param.shape, rank=rank, world_size=world_size)[0]
            for name, param in params.items()
        }

    def copy_own(self, index: int, into: Tensor) -> None:
        """Copies this rank's part of a bucket, cast to the dtypes on the wire. `into`: uint8[num_bytes]."""
        part = self.own[index]
        for spec, view in zip(part.specs, part.views(into), strict=True):
            tensor = self._tensors[spec.name]
            found = tensor.part_in(self._source.rows(tensor.param), first_row=self._first_rows[tensor.param])
            assert found is not None
            view.copy_(found[0])


def _part_of(
    bucket: Bucket, tensors: dict[str, HfTensor], num_rows: dict[str, int], *, rank: int, world_size: int
) -> RankPart:
    specs, starts = [], []
    for spec in bucket.tensors:
        tensor = tensors[spec.name]
        shape = torch.Size((num_rows[tensor.param],))
        there = tensor.rows_in(*row_range(shape, rank=rank, world_size=world_size))
        if there is not None:
            rows = (there[1] - there[0], *spec.shape[1:])
            specs.append(TensorSpec(name=spec.name, dtype=spec.dtype, shape=rows))
            starts.append(there[0])
    return RankPart(specs=tuple(specs), starts=tuple(starts))


def _spec_on_wire(tensor: HfTensor, param: Tensor, dtype: str) -> TensorSpec:
    own_dtype = spec_of(tensor.name, param).dtype
    return TensorSpec(
        name=tensor.name, dtype=dtype if param.is_floating_point() else own_dtype, shape=tensor.shape
    )
