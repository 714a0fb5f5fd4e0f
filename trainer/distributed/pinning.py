"""Pins host memory in place: torch's own pinned allocations are rounded up to a power of two."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def pin(tensor: Tensor) -> None:
    """Pins the memory of a tensor on the CPU for as long as the tensor exists."""
    cudart, pointer = torch.cuda.cudart(), tensor.data_ptr()  # type: ignore[no-untyped-call]
    portable = 1
    torch.cuda.check_error(int(cudart.cudaHostRegister(pointer, tensor.numel() * tensor.itemsize, portable)))
    # Called before the memory is freed; otherwise the driver would keep pages that are reused for other
    # memory.
    weakref.finalize(tensor, cudart.cudaHostUnregister, pointer)
