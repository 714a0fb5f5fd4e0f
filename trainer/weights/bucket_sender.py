"""Sends the buckets of a push through a weight group, in threads: the blocking part of a session.

Reading bucket i + 1 and computing the sums of bucket i overlap the broadcast of bucket i. If the engines have
a base, reading includes the comparison with it, and a header precedes each bucket
(areal_like/weights/deltas.py). The sums are those of all bytes in either case.
"""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.deltas import HEADER_BYTES, Form, encode, word_bytes
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.messages.weights import SenderAddress
from trainer.weights.shares import share_of_sender
from trainer.weights.snapshot import GatheredBucket, Snapshot


@dataclass(kw_only=True)
class Traffic:
    """What was sent of the buckets of a push. Counts that can be added up over senders and groups."""

    whole_bytes: int = 0
    """Bytes of buckets that were sent whole."""
    delta_bytes: int = 0
    """Bytes of the payloads of other buckets, and of headers."""
    num_compared: int = 0
    """Words that were compared with the base."""
    num_changed: int = 0
    """Those that differ from it."""

    def add(self, other: Traffic) -> None:
        """Adds the counts of another share."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, kw_only=True)
class SentShare:
    """One sender's share of a push that was broadcast."""

    sums: BucketSums
    traffic: Traffic


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A bucket that is ready to be sent."""

    bucket: GatheredBucket
    messages: list[Tensor]
    """What is broadcast, one after the other, on the device that the group sends from."""
    traffic: Traffic


class BucketSender:
    """This rank's end of one session: sends its buckets of snapshots through its group."""

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
        self.store = SenderAddress(address=group.address, port=group.port)
        """Where the store of its group listens."""
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
        # Not a bound method: the executor would refer to this object, whose store would then stay open until
        # a collection of cycles.
        choose_device = functools.partial(_choose_device, device, self._stream)
        self._reader = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"{name}-read", initializer=choose_device
        )

    def connect(self) -> None:
        """Waits until all engines have joined the group."""
        self._group.connect()

    def close_store(self) -> None:
        """Ends the store; call it when all engines have joined."""
        self._group.close_store()

    def stage(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> None:
        """Makes this sender's buckets and their sums ready. `timeout_s`: the caller bounds its own wait."""
        snapshot.stage(integrity=integrity)

    def send(
        self,
        snapshot: Snapshot,
        *,
        integrity: str,
        timeout_s: float,
        may_begin: threading.Event,
        base: int | None = None,
    ) -> SentShare:
        """Broadcasts this sender's buckets and returns their sums. Blocks.

        `timeout_s`: time limit of each broadcast. `may_begin`: the first broadcast waits for it. `base`:
        number of the snapshot that all engines have; None: all bytes are sent. Raises WeightSyncError; the
        group is then broken.
        """
        sums, traffic = BucketSums(checksums=[], digests=[]), Traffic()
        share = share_of_sender(
            self._sender, num_senders=self._num_senders, num_buckets=len(snapshot.buckets)
        )
        _choose_device(self._device, self._stream)
        with torch.cuda.stream(self._stream):
            next_read = self._reader.submit(self._read, snapshot, share[0], base)
            for position in range(len(share)):
                read = next_read.result()
                if position + 1 < len(share):
                    next_read = self._reader.submit(self._read, snapshot, share[position + 1], base)
                summing = self._reader.submit(read.bucket.sums, integrity=integrity)
                if not may_begin.wait(timeout_s):
                    raise WeightSyncError(f"the receivers were not ready within {timeout_s:.4g} s")
                for message in read.messages:
                    self._group.broadcast(message, timeout_s=timeout_s)
                traffic.add(read.traffic)
                found, digest = summing.result()
                sums.checksums.append(found)
                sums.digests.extend([digest] if digest else [])
        return SentShare(sums=sums, traffic=traffic)

    def leave(self) -> None:
        """Leaves the group, also during a broadcast."""
        self._group.close()

    def forget(self) -> None:
        """Ends the reading thread, without waiting for it. Nothing may be called afterwards."""
        self._reader.shutdown(wait=False)

    def _read(self, snapshot: Snapshot, index: int, base: int | None) -> _Read:
        """Reads a bucket, and compares it with the base. Runs in the reader's thread."""
        bucket = snapshot.read(index)
        size = word_bytes(snapshot.buckets[index])
        try:
            with torch.cuda.stream(self._copy_stream):
                new = self._on_wire(bucket.data)
                if base is None:
                    read = _Read(bucket=bucket, messages=[new], traffic=Traffic(whole_bytes=len(new)))
                else:
                    old = self._on_wire(snapshot.base(base, index))
                    read = self._compared(bucket, old, new, word_bytes=size)
            if self._copy_stream is not None:
                self._copy_stream.synchronize()
        except RuntimeError as error:  # memory is full: a later push may succeed
            raise WeightSyncError(
                f"could not prepare a bucket of {len(bucket.data)} bytes on {self._device}: {error}"
            ) from None
        return read

    def _compared(self, bucket: GatheredBucket, old: Tensor, new: Tensor, *, word_bytes: int) -> _Read:
        encoded = encode(old, new, word_bytes=word_bytes)
        is_whole = encoded.header.form is Form.WHOLE
        traffic = Traffic(
            whole_bytes=len(new) if is_whole else 0,
            delta_bytes=HEADER_BYTES + (0 if is_whole else len(encoded.payload)),
            num_compared=encoded.header.num_words,
            num_changed=encoded.num_changed,
        )
        messages = [self._on_wire(encoded.header.to_bytes()), encoded.payload]
        return _Read(bucket=bucket, messages=messages[: 1 + bool(len(encoded.payload))], traffic=traffic)

    def _on_wire(self, data: Tensor) -> Tensor:
        """The same bytes on the device that the group sends from."""
        return data if self._copy_stream is None else data.to(self._device, non_blocking=True)


def _choose_device(device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """Sets the thread's GPU. Otherwise it is GPU 0, and leaving a stream's context would set that GPU again;
    since CUDA 12 this creates a context there, half a gigabyte on a GPU that may be an engine's."""
    if stream is not None:
        torch.cuda.set_device(device)
