"""Pinned host memory, from which and to which a GPU copies at the full rate of its bus."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE_BYTES = 64 << 20
"""From here on an allocation has pages of its own (glibc maps what is above 32 MiB)."""


def host_empty(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """An uninitialized tensor in host memory.

    torch rounds its pinned allocations up to a power of two, so a large one is pinned in place. Two small
    ones could share a page, which cannot be pinned twice.
    """
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if not pinned or tensor.numel() * tensor.itemsize < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    tensor = torch.empty(shape, dtype=dtype)
    cudart, pointer = torch.cuda.cudart(), tensor.data_ptr()  # type: ignore[no-untyped-call]
    portable = 1
    torch.cuda.check_error(int(cudart.cudaHostRegister(pointer, tensor.numel() * tensor.itemsize, portable)))
    # Called before the memory is freed; otherwise the driver would keep pages that are reused for other
    # memory.
    weakref.finalize(tensor, cudart.cudaHostUnregister, pointer)
    return tensor
