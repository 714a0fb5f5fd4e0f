"""A copy of one model's shards in host memory, which a thread writes while training continues.

    take() on the training thread -> the thread writes `values` -> take() again, into the same memory

The memory is allocated once and lies in the order of the rank's row file, so a row file is written in one
piece. It is 12 bytes for each parameter of this rank (4 without moments), and pinned if the shards are on a
GPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainer.models.packed_model import PackedModel
from trainer.models.sharded_weights import MODEL_PREFIX

MASTER = "master"


class ModelState(Protocol):
    """What a checkpoint stores of a model: an optimizer, or a copy of a policy, which has no moments."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the moments."""

    @property
    def shards(self) -> Mapping[str, Tensor]:
        """This rank's part of each parameter, by the model's own names."""

    @property
    def num_updates(self) -> int:
        """Updates so far."""

    def moments(self, shard_name: str) -> Mapping[str, Tensor]:
        """By kind, of one shard."""

    def new_moments(self, *, num_updates: int) -> Mapping[str, Mapping[str, Tensor]]:
        """Moments after `num_updates` updates for the caller to fill, by shard and kind."""


class HostCopy:
    """One rank's masters and moments."""

    def __init__(self, model: PackedModel, optimizer: ModelState) -> None:
        """`take` copies the state of these."""
        self._optimizer = optimizer
        self.kinds = (MASTER, *optimizer.kinds)
        """What is kept of each parameter."""
        self._names = {name.removeprefix(MODEL_PREFIX): name for name, _ in model.named_parameters()}
        shards = {name: optimizer.shards[own] for name, own in self._names.items()}
        dtypes = {shard.dtype for shard in shards.values()}
        assert len(dtypes) == 1, f"masters of several dtypes: {dtypes}"
        (self.dtype,) = dtypes
        """Of masters and moments."""
        places = [(kind, name, shard.shape) for kind in self.kinds for name, shard in shards.items()]
        sizes = [math.prod(shape) for _, _, shape in places]
        self._flat = torch.empty(sum(sizes), dtype=self.dtype)
        self._is_cuda = any(shard.is_cuda for shard in shards.values())
        if self._is_cuda:
            _pin(self._flat)
        self.values: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        """Kind -> parameter's Hugging Face name -> this rank's rows; views of one tensor, in this order."""
        for (kind, name, shape), part in zip(places, torch.split(self._flat, sizes), strict=True):
            self.values[kind][name] = part.view(shape)
        self.num_updates = 0
        """Of the optimizer, when the copy was taken."""

    def take(self) -> None:
        """Replaces the copy by the present state. For the training thread, while nothing is being written."""
        self.num_updates = self._optimizer.num_updates
        for name, own in self._names.items():
            state = {MASTER: self._optimizer.shards[own].detach(), **self._optimizer.moments(own)}
            for kind in self.kinds:
                self.values[kind][name].copy_(state[kind], non_blocking=self._is_cuda)
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()

    def flat(self, kinds: tuple[str, ...]) -> Tensor:
        """The values of `kinds`, the last of `self.kinds`, in one tensor of one dimension, sharing memory."""
        assert kinds == self.kinds[-len(kinds) :]
        num_others = sum(v.numel() for kind in self.kinds[: -len(kinds)] for v in self.values[kind].values())
        return self._flat[num_others:]


def _pin(tensor: Tensor) -> None:
    """Pins memory in place: torch's own pinned allocations are rounded up to a power of two."""
    cudart, pointer = torch.cuda.cudart(), tensor.data_ptr()  # type: ignore[no-untyped-call]
    portable = 1
    torch.cuda.check_error(int(cudart.cudaHostRegister(pointer, tensor.numel() * tensor.itemsize, portable)))
    # Called before the memory is freed; else the driver would keep the pages of memory that others get.
    weakref.finalize(tensor, cudart.cudaHostUnregister, pointer)
