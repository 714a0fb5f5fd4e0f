"""Waits for a process to start as long as it makes progress, however slow the machine is.

    wait_until_ready(process, logs=folder, probe=lambda: port_file.exists(), what="the engine")

A short fixed limit would test the machine and not the program: with more processes than cores, a start that
usually takes five seconds may take a minute. A process makes progress if it is alive and its logs grow or it
uses CPU time (with its children).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STALLED_AFTER_S = 120.0
"""A start without progress for this long has failed."""
START_LIMIT_S = 600.0
"""Longest time of any start."""
HANG_LIMIT_S = 600.0
"""Limit of a call that is expected to return, on any machine. pytest's own limit is above it."""
_POLL_S = 0.02


def wait_until_ready(
    process: subprocess.Popen[Any], *, logs: Path, probe: Callable[[], bool], what: str
) -> None:
    """Polls `probe` until it is true.

    `logs`: a log file or a folder of them; it may not exist yet. Fails if the process ends, makes no progress
    for STALLED_AFTER_S, or is not ready after START_LIMIT_S.
    """
    started_s = progressed_s = time.monotonic()
    progress = (0, 0)
    while not probe():
        now_s = time.monotonic()
        assert process.poll() is None, f"{what}: the process ended with code {process.returncode}"
        if (latest := (_num_bytes(logs), _cpu_ticks(process.pid))) != progress:
            progress, progressed_s = latest, now_s
        assert now_s - progressed_s < STALLED_AFTER_S, f"{what}: no progress for {STALLED_AFTER_S:g} s"
        assert now_s - started_s < START_LIMIT_S, f"{what}: not ready after {START_LIMIT_S:g} s"
        time.sleep(_POLL_S)


def is_alive(pid: int) -> bool:
    """False also for a process that has ended and that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # the second: it ended while it was read
        return False


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def _num_bytes(logs: Path) -> int:
    files = logs.iterdir() if logs.is_dir() else [logs]
    return sum(file.stat().st_size for file in files if file.exists())


def _cpu_ticks(pid: int) -> int:
    """CPU time of a process and its descendants, in clock ticks."""
    try:
        pids = [pid, *descendants(pid)]
        stats = [Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split() for one in pids]
    except (FileNotFoundError, ProcessLookupError):  # one of them has just ended: that is a change too
        return 0
    return sum(int(fields[11]) + int(fields[12]) for fields in stats)
