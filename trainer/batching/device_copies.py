"""Copies host arrays to the trainer's device without blocking the host.

A GPU runs a micro-batch asynchronously. The host prepares the next one in the meantime, provided that no call
synchronizes with the GPU, as a plain copy from pageable memory does. So arrays are copied from pinned memory,
in a separate stream that does not wait for the kernels queued before.

Left out: a thread that prepares micro-batches. It would compete for the GIL with the thread that launches the
kernels, to save a few milliseconds of a micro-batch that runs for a second, and a CPU has no idle core.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def copied(arrays: Sequence[NDArray[Any]], device: torch.device | str) -> list[Tensor]:
    """Tensors of the arrays on `device`, ready for its current stream. On a CPU they share the memory."""
    device, on_host = torch.device(device), [torch.from_numpy(array) for array in arrays]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in on_host]
    current, side = torch.cuda.current_stream(device), _stream(device)
    with torch.cuda.stream(side):
        # The pinned memory comes from torch's allocator, which reuses it only after the copy.
        copies = [tensor.pin_memory().to(device, non_blocking=True) for tensor in on_host]
    current.wait_stream(side)  # the stream waits, not the host
    for copy in copies:
        copy.record_stream(current)
    return copies


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
