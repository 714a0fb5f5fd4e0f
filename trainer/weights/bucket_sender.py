"""Sends the buckets of a push through a weight group, in threads: the blocking part of a session.

Reading bucket i + 1 and computing the sums of bucket i overlap the broadcast of bucket i.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup
from trainer.weights.shares import share_of_sender
from trainer.weights.snapshot import GatheredBucket, Snapshot


class BucketSender:
    """Sends one sender's buckets of snapshots through its group. `close` it when the group is dissolved."""

    def __init__(
        self,
        group: WeightGroup,
        *,
        device: torch.device,
        name: str,
        sender: int = 0,
        num_senders: int = 1,
    ) -> None:
        """`device`: this rank's. `name`: the name of the threads. `sender`: number of this sender, from 0."""
        self._group = group
        self._sender = sender
        self._num_senders = num_senders
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

    def send(
        self, snapshot: Snapshot, *, integrity: str, timeout_s: float, may_begin: threading.Event
    ) -> BucketSums:
        """Broadcasts this sender's buckets and returns their sums. Blocks.

        `timeout_s`: time limit of each broadcast. `may_begin`: the first broadcast waits for it. Raises
        WeightSyncError; the group is then broken.
        """
        self._choose_device()
        with torch.cuda.stream(self._stream):
            return self._send(snapshot, integrity=integrity, timeout_s=timeout_s, may_begin=may_begin)

    def close(self) -> None:
        """Ends the reading thread, without waiting for it."""
        self._reader.shutdown(wait=False)

    def _choose_device(self) -> None:
        """Sets the thread's GPU. Otherwise it is GPU 0, and leaving a stream's context would set that GPU
        again; since CUDA 12 this creates a context there, half a gigabyte on a GPU that may be an
        engine's."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def _send(
        self, snapshot: Snapshot, *, integrity: str, timeout_s: float, may_begin: threading.Event
    ) -> BucketSums:
        sums = BucketSums(checksums=[], digests=[])
        share = share_of_sender(
            self._sender, num_senders=self._num_senders, num_buckets=len(snapshot.buckets)
        )
        next_read = self._reader.submit(self._read, snapshot, share[0])
        for position in range(len(share)):
            bucket, on_wire = next_read.result()
            if position + 1 < len(share):
                next_read = self._reader.submit(self._read, snapshot, share[position + 1])
            summing = self._reader.submit(bucket.sums, integrity=integrity)
            if not may_begin.wait(timeout_s):
                raise WeightSyncError(f"the receivers were not ready within {timeout_s:.4g} s")
            self._group.broadcast(on_wire, timeout_s=timeout_s)
            found, digest = summing.result()
            sums.checksums.append(found)
            sums.digests.extend([digest] if digest else [])
        return sums

    def _read(self, snapshot: Snapshot, index: int) -> tuple[GatheredBucket, Tensor]:
        """Returns a bucket, and its bytes on the device that the group sends from. Runs in the reader's
        thread."""
        bucket = snapshot.read(index)
        if self._copy_stream is None:
            return bucket, bucket.data
        try:
            with torch.cuda.stream(self._copy_stream):
                on_wire = bucket.data.to(self._device, non_blocking=True)
            self._copy_stream.synchronize()
        except RuntimeError as error:  # the GPU's memory is full: a later push may succeed
            raise WeightSyncError(
                f"could not copy a bucket of {len(bucket.data)} bytes to {self._device}: {error}"
            ) from None
        return bucket, on_wire
