"""Receives the tensors of one weight update into the shadow weights, which no forward pass reads.

A bucket whose layout equals the shadow weights' (same dtypes, same tensors in the same order) is received
directly into them. Any other bucket is received into a buffer, and its tensors are copied and cast from
there, each to the dtype that it has in the shadow weights. While one bucket is being received, the previous
one is verified: checksum, names, shapes, all values finite.

If the update has a base, a header precedes each bucket, and only the words that changed may follow it
(areal_like/weights/deltas.py). They are applied to a copy of the base's bytes, in the shadow weights or in a
buffer, and the result is verified like a bucket that was sent whole.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import NamedThread
from areal_like.weights.buckets import (
    Bucket,
    TensorSpec,
    checksum,
    checksum_and_finiteness,
    is_finite,
    spec_of,
    unflatten,
)
from areal_like.weights.deltas import HEADER_BYTES, Form, Header, apply
from areal_like.weights.integrity import BucketSums, sha256
from areal_like.weights.weight_group import WeightGroup
from rollout_server.engine.models.base import ModelFacts, Weights

T = TypeVar("T")
_WORD_BYTES = 8
_MIN_TIMEOUT_S = 0.001


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What a receiver checks the tensors of an adapter against, as `ModelFacts` for those of a model."""

    parameter_shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    """Dtype in which the adapter is computed."""
    device: torch.device
    tied_names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, named: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device) -> AdapterFacts:
        """The facts of tensors that an adapter is received into."""
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        return cls(parameter_shapes=shapes, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class _Receiving:
    """A bucket whose broadcast has begun."""

    index: int
    bucket: Bucket
    header: Header | None
    """What a payload is applied to the base with; None if the bucket comes whole."""
    flat: Tensor
    """uint8: the bytes of the bucket, or of the payload, which the broadcast writes to."""
    buffer: Tensor | None
    """The receive buffer that `flat` is a part of; None if it is a part of the shadow weights."""
    wait: Callable[[], None]
    """Waits for the end of the broadcast. Raises WeightSyncError."""

    def wait_quietly(self) -> None:
        """Waits for the end of the broadcast, whether it succeeds or not."""
        with contextlib.suppress(WeightSyncError):
            self.wait()


class BucketReceiver:
    """Fills one set of shadow weights, or the tensors of an adapter.

    Its methods block and run in threads, one at a time.
    """

    def __init__(
        self,
        weights: Weights,
        facts: ModelFacts | AdapterFacts,
        buffers: list[Tensor],
        *,
        base: Weights | None = None,
    ) -> None:
        """`buffers`: receive buffers of an earlier update, to be reused; this object takes ownership of the
        list. `base`: the active weights, if only what differs from them is sent; nothing may write to
        them."""
        self.weights = weights
        self._base = base
        self.device = facts.device
        self.received: list[TensorSpec] = []
        """Every tensor that was received and verified, in order."""
        self.error = ""
        """Message of the first error; empty if there was none."""
        self.is_tainted = False
        """True after a failed broadcast into the shadow weights: it may still write into them at any later
        time, so they must not be used again."""
        self.buffers = buffers
        """Receive buffers that are not in use."""
        self.facts = facts
        """Shapes, dtype and tied names of the tensors that have to arrive."""
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            # The shadow weights were active until the last swap: queued decode kernels may still read them.
            self._stream.wait_stream(torch.cuda.default_stream(self.device))

    def on_own_stream(self, work: Callable[[], T]) -> T:
        """Runs `work` on this receiver's CUDA stream; on a CPU, calls it directly.

        On the default stream, decoding would wait for the whole broadcast, and the broadcast for decoding.
        """
        with torch.cuda.stream(self._stream):
            return work()

    def receive(
        self,
        groups: Sequence[WeightGroup],
        buckets: Iterable[Bucket],
        *,
        timeout_s: float,
        integrity: str = "none",
    ) -> BucketSums:
        """Receives and verifies flattened buckets; returns their sums.

        `groups`: one for each of M senders; bucket i comes over group i mod M, and one bucket of each sender
        is received at a time. Receives begin in the order of the buckets on every engine, because concurrent
        NCCL communicators that are used in different orders may wait for one another. `integrity`: with
        `sha256` the sums include digests of exactly the bytes that were received. An error in a bucket's
        content is recorded in `error`, and the remaining buckets are still received, so that neither the
        senders nor the other engines hang. Raises WeightSyncError if a group breaks. `timeout_s`: for all
        buckets together.
        """
        device = self._receive_device(groups[0])
        end_s = time.monotonic() + timeout_s
        sums = BucketSums(checksums=[], digests=[])
        receiving: deque[_Receiving] = deque()
        """Oldest first; at most one of each group."""

        def verify(received: _Receiving) -> None:
            flat, buffer = received.flat, received.buffer
            if received.header is not None:
                flat, buffer = self._rebuilt(received, received.header)
            if integrity == "sha256":
                sums.digests.append(sha256(flat))
            sums.checksums.append(self._verify(received.bucket, flat, buffer))

        def finish_oldest() -> _Receiving:
            oldest = receiving.popleft()
            has_ended = False
            try:
                oldest.wait()
                has_ended = True
            finally:
                self.is_tainted |= oldest.buffer is None and not has_ended
            return oldest

        try:
            for index, bucket in enumerate(buckets):
                received = finish_oldest() if len(receiving) == len(groups) else None
                group = groups[index % len(groups)]
                header: Header | None = None
                if self._base is not None:
                    raw = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=device)
                    wait = group.begin_broadcast(raw, timeout_s=max(_MIN_TIMEOUT_S, end_s - time.monotonic()))
                    if received is not None:  # while the sender compares the next bucket
                        verify(received)
                        received = None
                    wait()
                    header = _parsed(raw, bucket, index)
                flat, buffer = self._place_for(bucket, header, device)
                wait = _nothing
                if flat.numel() or self._base is None:
                    wait = group.begin_broadcast(
                        flat, timeout_s=max(_MIN_TIMEOUT_S, end_s - time.monotonic())
                    )
                receiving.append(
                    _Receiving(index=index, bucket=bucket, header=header, flat=flat, buffer=buffer, wait=wait)
                )
                if received is not None:
                    verify(received)
            while receiving:
                verify(finish_oldest())
        finally:
            self.is_tainted |= any(left.buffer is None for left in receiving)
            # A receive that still runs over another group needs an owner until it ends: whoever drops the
            # last reference to a gloo group waits for it, and holds the GIL meanwhile.
            for left in receiving:
                NamedThread(left.wait_quietly, name="weights").start()
        return sums

    def receive_tensors(self, group: WeightGroup, bucket: Bucket, *, timeout_s: float) -> None:
        """Receives a bucket that is not flattened, one broadcast per tensor. Raises WeightSyncError.

        `timeout_s`: for each tensor.
        """
        device = self._receive_device(group)
        tensors = {}
        for spec in bucket.tensors:
            tensors[spec.name] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            group.broadcast(tensors[spec.name], timeout_s=timeout_s)
        self.store(tensors)

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors into the shadow weights, casting to the dtypes there.

        Raises WeightSyncError for an unknown name, a wrong shape, or values that are not finite. A name that
        aliases another parameter is skipped: its values come under the other name.
        """
        shapes = self.facts.parameter_shapes
        for name, tensor in tensors.items():
            if name in self.facts.tied_names:
                continue
            if name not in shapes:
                raise WeightSyncError(f"tensor {name} is unknown to the model")
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise WeightSyncError(
                    f"tensor {name} must have shape {list(shapes[name])}, got {list(tensor.shape)}"
                )
            target = self.weights.named[name]
            target.copy_(tensor)
            self._check_finite(name, target)
            self.received.append(spec_of(name, tensor))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def can_be_base(self, buckets: Iterable[Bucket]) -> bool:
        """True if the bytes of these buckets can be restored from the weights that they were stored in."""
        named = self.weights.named
        return all(
            spec.name in named
            and spec.name not in self.facts.tied_names
            and _keeps(getattr(torch, spec.dtype), in_dtype=named[spec.name].dtype)
            for bucket in buckets
            for spec in bucket.tensors
        )

    def _place_for(
        self, bucket: Bucket, header: Header | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Where a broadcast is received: the bytes, and the buffer if they are not shadow weights."""
        if header is not None:
            buffer = self._take_buffer(header.payload_bytes, device)
            return buffer[: header.payload_bytes], buffer
        if (flat := self._slice_of(self.weights, bucket, device)) is not None:
            return flat, None
        buffer = self._take_buffer(bucket.num_bytes, device)
        return buffer[: bucket.num_bytes], buffer

    def _rebuilt(self, received: _Receiving, header: Header) -> tuple[Tensor, Tensor | None]:
        """Applies a payload to the base's bytes, in the place where a whole bucket would have been received.

        A malformed payload is recorded in `error`.
        """
        assert self._base is not None and received.buffer is not None
        bucket, device = received.bucket, received.flat.device
        flat, buffer = self._place_for(bucket, None, device)
        if (base := self._slice_of(self._base, bucket, device)) is not None:
            flat.copy_(base)
        else:
            for name, view in unflatten(bucket, flat).items():
                view.copy_(self._base.named[name])
        try:
            apply(header, received.flat, flat)
        except WeightSyncError as error:
            self.error = self.error or f"bucket {received.index}: {error}"
        self.buffers.append(received.buffer)
        return flat, buffer

    def _receive_device(self, group: WeightGroup) -> torch.device:
        return self.device if group.backend == "nccl" else torch.device("cpu")

    def _slice_of(self, weights: Weights, bucket: Bucket, device: torch.device) -> Tensor | None:
        """Returns the part of a set of weights that has the bucket's layout, uint8[num_bytes], or None."""
        arena, named = weights.arena, weights.named
        if arena is None or arena.device != device:
            return None
        if any(
            s.name not in named
            or s.dtype != _name_of(named[s.name].dtype)
            or tuple(named[s.name].shape) != s.shape
            for s in bucket.tensors
        ):
            return None
        start = named[bucket.tensors[0].name].data_ptr()
        if any(
            named[s.name].data_ptr() != start + offset
            for s, offset in zip(bucket.tensors, bucket.offsets, strict=True)
        ):
            return None
        first = start - arena.data_ptr()
        # Checksums read whole words. Only a bucket that begins inside a group of fused tensors can be
        # unaligned.
        if first % _WORD_BYTES:
            return None
        return arena[first : first + bucket.num_bytes]

    def _take_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """Returns a free buffer, uint8[num_bytes or more]."""
        for index, buffer in enumerate(self.buffers):
            if buffer.numel() >= num_bytes and buffer.device == device:
                return self.buffers.pop(index)
        # At most one buffer for each bucket that is being received, and one (with a base two) for the bucket
        # that is being verified: this one replaces a free one, which is too small.
        del self.buffers[:1]
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def _verify(self, bucket: Bucket, flat: Tensor, buffer: Tensor | None) -> int:
        """Verifies a received bucket, copies it into the weights if `buffer` holds it; returns its checksum.

        `buffer` is None if the bucket was received in place.
        """
        is_in_place = buffer is None
        dtypes = {spec.dtype for spec in bucket.tensors}
        if is_in_place and len(dtypes) == 1:
            found, all_finite = checksum_and_finiteness(flat, dtype=getattr(torch, dtypes.pop()))
        else:
            # The tensors are checked one by one: below, or when they are copied.
            found, all_finite = checksum(flat), not is_in_place
        try:
            if bucket.checksum not in (None, found):
                raise WeightSyncError("a bucket's checksum is wrong: its bytes changed in transit")
            if is_in_place:
                for name, tensor in unflatten(bucket, flat).items() if not all_finite else ():
                    self._check_finite(name, tensor)
                self.received += bucket.tensors
            else:
                self.store(unflatten(bucket, flat))
        except WeightSyncError as error:
            self.error = self.error or str(error)
        if buffer is not None:
            self.buffers.append(buffer)
        return found

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise WeightSyncError(f"tensor {name} has values that are not finite in {tensor.dtype}")


def _nothing() -> None:
    """Waits for the end of a broadcast that is not made, because it has no bytes."""


def _parsed(raw: Tensor, bucket: Bucket, index: int) -> Header | None:
    """Reads a header; None: the bucket comes whole. Raises WeightSyncError, because the sizes of the
    broadcasts that follow are unknown then."""
    try:
        header = Header.parse(raw, bucket)
    except WeightSyncError as error:
        raise WeightSyncError(f"bucket {index}: {error}") from None
    return None if header.form is Form.WHOLE else header


def _keeps(dtype: torch.dtype, *, in_dtype: torch.dtype) -> bool:
    """True if every value of `dtype` is one of `in_dtype`."""
    is_wider = in_dtype in (torch.float32, torch.float64) and in_dtype.itemsize > dtype.itemsize
    return is_wider or dtype == in_dtype


def _name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a bucket."""
    return str(dtype).removeprefix("torch.")
