"""A small file system, for tests of a full disk."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(directory: Path, *, num_mib: int = 2) -> Iterator[Path]:
    """Mounts a tmpfs of `num_mib` MiB at a new directory; skips the test where mounting is not permitted."""
    directory.mkdir(parents=True)
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={num_mib}m", "none", directory], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting is not permitted here")
    try:
        yield directory
    finally:
        for is_last in (*[False] * 300, True):  # a process that is just ending may have a file open there
            if subprocess.run(["umount", directory], check=is_last, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
