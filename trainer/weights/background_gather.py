"""Snapshots of which rank 0 gathers the rows in the background, over a process group of their own.

Training waits only until every rank has copied its own rows. Rank 0 reads one bucket at a time: it keeps at
most `_MAX_GATHERED` buckets and the parts of one more. If a push is staged it keeps all of them, in memory
that later pushes reuse.

With one rank the rows are the whole tensors: its copies are the buckets, and nothing is gathered. The other
ranks gather in a thread that waits for rank 0's requests without a time limit: a run may push nothing for
hours, and if a rank dies the group breaks at once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import NamedThread
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.snapshot import GatheredBucket, RankSnapshot, WeightSnapshotter, empty_buffer

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


class BackgroundGather(WeightSnapshotter):
    """A `WeightSnapshotter` whose buffers hold this rank's rows of each bucket."""

    def __init__(self, policy: Policy, ranks: Ranks, *, bucket_bytes: int, dtype: str) -> None:
        """As WeightSnapshotter."""
        super().__init__(policy, ranks, bucket_bytes=bucket_bytes, dtype=dtype)
        self._gather_lock = threading.Lock()
        self._gathered: OrderedDict[int, tuple[int, GatheredBucket]] = OrderedDict()
        """Index of a bucket -> (number of the snapshot, bucket), on rank 0, oldest first."""
        self._max_gathered = _MAX_GATHERED
        is_alone = ranks.world_size == 1
        self._group = None if is_alone else dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        self._thread = NamedThread(self._serve_gathers, name="gather")
        if ranks.rank > 0:
            self._thread.start()

    def close(self) -> None:
        """As WeightSnapshotter.close."""
        if self._ranks.rank > 0:
            self._thread.join()
        elif self._group is not None:
            with self._gather_lock:
                dist.broadcast(torch.tensor([_CLOSE, 0]), group=self._group, group_src=0)

    def stage(self, snapshot: RankSnapshot, *, integrity: str) -> None:
        """As WeightSnapshotter.stage."""
        self._max_gathered = len(self.buckets)
        super().stage(snapshot, integrity=integrity)

    def _new_buffers(self) -> list[Tensor]:
        return [empty_buffer(part.num_bytes, self._ranks.device) for part in self._layout.own]

    def _copy_weights(self, buffers: list[Tensor], *, number: int) -> None:
        for index, buffer in enumerate(buffers):
            self._layout.copy_own(index, buffer)

    def _read(self, snapshot: RankSnapshot, index: int) -> GatheredBucket:
        with self._gather_lock:
            number, bucket = self._gathered.get(index, (0, None))
            if bucket is None or number != snapshot.number:
                # The push of another number is over, so nobody reads its bucket any more.
                flat = self._gather(snapshot, index, into=bucket.data if bucket is not None else None)
                self._gathered.pop(index, None)
                self._gathered[index] = snapshot.number, (bucket := GatheredBucket(flat))
                while len(self._gathered) > self._max_gathered:
                    self._gathered.popitem(last=False)
            return bucket

    def _gather(self, snapshot: RankSnapshot, index: int, *, into: Tensor | None) -> Tensor:
        """On rank 0: bucket `index` with the rows of all ranks, uint8[num_bytes]; in `into` if given."""
        parts, num_bytes = self._layout.buckets[index], self.buckets[index].num_bytes
        if self._group is None:
            return snapshot.buffers[index][:num_bytes]
        try:
            dist.broadcast(torch.tensor([snapshot.number, index]), group=self._group, group_src=0)
            gathered, work = parts.begin_gather(snapshot.buffers[index], to_rank=0, group=self._group)
            work.wait(_GATHER_TIMEOUT)
        except RuntimeError as error:
            raise WeightSyncError(
                f"a rank of the trainer was lost while weights were gathered: {error}"
            ) from None
        flat = torch.empty(num_bytes, dtype=torch.uint8) if into is None else into
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
                    return snapshot.buffers[index]
        # Freed after a broken push. Rank 0 still waits for this number of bytes, and discards them.
        return torch.empty(self._layout.own[index].num_bytes, dtype=torch.uint8)
