"""Broadcasts the buckets of a snapshot over a weight group: the blocking part of a push, in threads.

Bucket i + 1 is read, and on a GPU copied to the device, while bucket i is being sent and summed up.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.collective import WeightGroup
from areal_like.weights.integrity import BucketSums
from trainer.weights.snapshot import GatheredBucket, Snapshot


class BucketSender:
    """Sends snapshots through one group. `close` it when the group is dissolved."""

    def __init__(self, group: WeightGroup, *, device: torch.device, name: str) -> None:
        """`device`: of the trainer. `name`: of the threads."""
        self._group = group
        self._device = device
        # Separate streams: on the default stream training would wait for the whole broadcast, and the
        # broadcast for everything that training has queued.
        self._stream: torch.cuda.Stream | None = None
        self._copy_stream: torch.cuda.Stream | None = None
        if group.backend == "nccl":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._reader = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"{name}-read", initializer=self._choose_device
        )

    def send(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> BucketSums:
        """Broadcasts every bucket and returns their sums. Blocks.

        `timeout_s`: of each broadcast. Raises WeightSyncError; the group is then broken.
        """
        self._choose_device()
        with torch.cuda.stream(self._stream):
            return self._send(snapshot, integrity=integrity, timeout_s=timeout_s)

    def close(self) -> None:
        """Ends the reading thread, without waiting for it."""
        self._reader.shutdown(wait=False)

    def _choose_device(self) -> None:
        """A new thread's GPU is number 0, and leaving a stream's context sets that one again, which since
        CUDA 12 makes a context there: half a gigabyte of a GPU that may be an engine's."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def _send(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> BucketSums:
        sums = BucketSums(checksums=[], digests=[])
        next_read = self._reader.submit(self._read, snapshot, 0)
        for index in range(len(snapshot.buckets)):
            bucket, on_wire = next_read.result()
            if index + 1 < len(snapshot.buckets):
                next_read = self._reader.submit(self._read, snapshot, index + 1)
            summing = self._reader.submit(bucket.sums, integrity=integrity)
            self._group.broadcast(on_wire, timeout_s=timeout_s)
            found, digest = summing.result()
            sums.checksums.append(found)
            sums.digests.extend([digest] if digest else [])
        return sums

    def _read(self, snapshot: Snapshot, index: int) -> tuple[GatheredBucket, Tensor]:
        """A bucket, and its bytes on the device that the group sends from. Runs in the reader's thread."""
        bucket = snapshot.read(index)
        if self._copy_stream is None:
            return bucket, bucket.data
        try:
            with torch.cuda.stream(self._copy_stream):
                on_wire = bucket.data.to(self._device, non_blocking=True)
            self._copy_stream.synchronize()
        except RuntimeError as error:  # the GPU's memory is full: a later push may find room
            raise WeightSyncError(
                f"could not copy a bucket of {len(bucket.data)} bytes to {self._device}: {error}"
            ) from None
        return bucket, on_wire
