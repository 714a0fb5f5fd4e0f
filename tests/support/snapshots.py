"""A weight snapshot of given tensors, to be pushed without a policy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.buckets import cut_buckets, flatten, spec_of
from trainer.weights.snapshot import GatheredBucket, Snapshot


class Held(Snapshot):
    """Stands in for the snapshot that trainer.weights makes of a policy."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        bucket_bytes: int,
        dtype: str = "float32",
        adapter: AdapterHeader | None = None,
        pushed_before: Held | None = None,
    ) -> None:
        """`pushed_before`: the snapshot that the senders keep as the base of a delta."""
        self.adapter = adapter
        self.untrained = ()
        self.buckets = cut_buckets(
            [spec_of(name, tensor, dtype=dtype) for name, tensor in tensors.items()],
            bucket_bytes=bucket_bytes,
        )
        self.number = 1 if pushed_before is None else pushed_before.number + 1
        self._pushed_before = pushed_before
        self._data = [flatten(bucket, tensors) for bucket in self.buckets]

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    @property
    def base_number(self) -> int:
        return -1 if self._pushed_before is None else self._pushed_before.number

    def base(self, number: int, index: int) -> Tensor:
        assert self._pushed_before is not None and number == self._pushed_before.number
        return self._pushed_before._data[index]

    def stage(self, *, integrity: str) -> None:
        pass

    def read(self, index: int) -> GatheredBucket:
        return GatheredBucket(self._data[index])
