"""Waits for a process to start as long as it makes progress, however slow the machine is.

    wait_until_ready(process, logs=folder, probe=lambda: port_file.exists(), what="the engine")

A short fixed limit would test the machine and not the program: with more processes than cores, a start that
usually takes five seconds may take a minute. A process makes progress if it is alive and its logs grow or it
uses CPU time (with its children).
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.growing_files import sizes_of

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
        if (latest := (sum(sizes_of(logs).values()), _cpu_ticks(process.pid))) != progress:
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
    """Process ids below `pid`; processes that end meanwhile are left out."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, _text(task / "children").split()):
                found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> str:
    """The words of a process's command; empty if it has ended."""
    return _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def _text(path: Path) -> str:
    """The content of a file in /proc; empty if its thread or process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _cpu_ticks(pid: int) -> int:
    """CPU time of a process and its descendants, in clock ticks."""
    stats = [_text(Path(f"/proc/{one}/stat")) for one in (pid, *descendants(pid))]
    fields = [stat.rpartition(")")[2].split() for stat in stats if stat]
    return sum(int(each[11]) + int(each[12]) for each in fields)
