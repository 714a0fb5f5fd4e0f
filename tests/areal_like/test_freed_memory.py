"""Freed memory that glibc keeps: when it is returned, and that it is."""

import platform
import subprocess
import sys

import pytest

from areal_like.runtime.freed_memory import FreedMemory, resident_bytes


def test_memory_is_returned_after_growth_only() -> None:
    freed = FreedMemory()
    assert [freed.is_due(looked) for looked in (1000, 900, 1250, 1251)] == [False, False, False, True]
    # What is usual is found anew: a live process may have grown.
    assert [freed.is_due(looked) for looked in (1200, 1500, 1501)] == [False, False, True]
    assert not any(FreedMemory().is_due(looked) for looked in (0, 0))  # it is not known


PROGRAM = """
import numpy as np
from areal_like.runtime.freed_memory import keep_freed_memory, resident_bytes, return_freed_memory
keep_freed_memory()
before = resident_bytes()
blocks, held = [], []
for _ in range(8):
    blocks.append(np.ones(30 << 20, np.uint8))
    held.append(np.ones(1 << 16, np.uint8))  # above it in the heap
full = resident_bytes()
blocks.clear()
kept = resident_bytes()
return_freed_memory()
print(*((each - before) >> 20 for each in (full, kept, resident_bytes())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is treated")
def test_glibc_keeps_freed_blocks_until_they_are_returned() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    full, kept, returned = map(int, ended.stdout.split())
    assert full > 200 and kept > 200 and returned < 40, "of eight blocks of 30 MiB"
    assert resident_bytes() > 1 << 20
