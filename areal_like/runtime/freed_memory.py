"""Freed memory that glibc keeps in a process: how much of it, and when to return it to the system.

A tensor on a CPU is a block of malloc. glibc returns a freed block only if no block above it is in use, and
some of those above stay: tensors that live longer, and the code that oneDNN compiles for each new shape of a
product in bfloat16, half a megabyte each. So the resident memory of a long process grows: products of SmolLM2
with 1 to 3,000 rows leave 6.3 GB, of which 1.3 are in use. `return_freed_memory` returns the rest within a
quarter of a second, and later allocations pay for clear pages again. So it is called only after growth:

    FreedMemory:  nothing is usual -> a look: this much is usual -> a look: GROWTH times as much -> a return
                        ^------------------------------------------------------------------------------'

Only glibc is treated: with another allocator, or on another system, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import Any

GROWTH = 1.25
"""Resident memory that is too much, relative to what was usual after the last return."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_NEVER = -1


class FreedMemory:
    """Decides when freed memory has to be returned. Pure: resident bytes in, a decision out."""

    def __init__(self) -> None:
        self._usual_bytes: int | None = None

    def is_due(self, resident_bytes: int) -> bool:
        """True if it is to be returned now.

        Look at equal moments of the work, such as before each step, or at equal intervals.
        """
        if self._usual_bytes is None:
            self._usual_bytes = resident_bytes
        if resident_bytes <= GROWTH * self._usual_bytes:
            return False
        self._usual_bytes = None
        return True


def resident_bytes() -> int:
    """Resident memory of this process; 0 where it is not known."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Returns whole pages of free blocks to the system (malloc_trim(3))."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """From now on glibc keeps the freed blocks of the main thread until `return_freed_memory`: those of less
    than 1 GiB, in releases before 2.35 those of less than 32 MiB.

    By default it returns one of 32 MiB and more at once, and the system clears its pages again for the next
    tensor of that size. Other threads have heaps of at most 64 MiB, which end when they are free.
    """
    if not set_thresholds(mmap_bytes=1 << 30, trim_bytes=_NEVER):
        set_thresholds(mmap_bytes=32 << 20, trim_bytes=_NEVER)


def set_thresholds(*, mmap_bytes: int, trim_bytes: int) -> bool:
    """Blocks of `mmap_bytes` and more are mapped one by one, and returned when they are freed; the end of the
    heap is returned when `trim_bytes` of it are free.

    Both are less than 2 GiB. glibc no longer changes them. Returns False, and changes nothing, if glibc
    refuses `mmap_bytes`, or if this is not glibc.
    """
    libc = _glibc()
    # The first one first: setting the other alone would fix the first at its present, low value.
    return libc is not None and bool(
        libc.mallopt(_MMAP_THRESHOLD, mmap_bytes) and libc.mallopt(_TRIM_THRESHOLD, trim_bytes)
    )


@functools.cache
def _glibc() -> Any:
    """The C library of this process, None if it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (AttributeError in another library)
        return libc
    return None
