"""Resident memory of this process, and its peak since a moment, as Linux counts them."""

from __future__ import annotations

import re
from pathlib import Path

from areal_like.runtime.freed_memory import return_freed_memory, set_thresholds

_LARGE_BYTES = 1 << 16


def release_freed_memory() -> None:
    """From now on freed tensors go back to the system at once, so the peak is that of live tensors.

    Otherwise glibc keeps freed blocks of up to 32 MiB for later, and how many depends on what the process has
    freed before. Its environment variables for this have no effect here: the ranks of the tests are forks,
    and glibc reads the variables when a program starts.

    Call it before the first large tensor is freed: glibc makes later tensors from blocks that it already
    keeps.
    """
    assert set_thresholds(mmap_bytes=_LARGE_BYTES, trim_bytes=_LARGE_BYTES), "these tests need glibc"
    return_freed_memory()


def reset_peak() -> int:
    """Sets the peak of resident memory to the present value, which it returns in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Largest resident memory since `reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
