"""Programs that a benchmark starts: their memory, and their orderly end if the benchmark is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from areal_like.runtime.process import die_with_parent
from tests.support.waiting import is_alive

STOP_S = 180.0
"""Time in which a program that was told to stop has to end: a run writes a checkpoint."""


def descendants(root: int) -> list[int]:
    """The process ids of a process and of all of its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(pid)
        pending += children.get(pid, [])
    return found


def pss_mib(root: int) -> float:
    """Sum of the proportional set sizes of a process and all of its descendants, in MiB."""
    total = 0
    for pid in descendants(root):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / 1024


def wait_for_end(pids: Sequence[int], *, limit_s: float = STOP_S) -> None:
    """Waits until none of these processes exists. Raises TimeoutError after the limit."""
    ends_s = time.monotonic() + limit_s
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > ends_s:
            raise TimeoutError(f"processes {left} have been killed and did not end in {limit_s:g} s")
        time.sleep(0.1)


def run_program(
    command: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    env: Mapping[str, str],
    on_look: Callable[[float], None],
    look_s: float = 20.0,
    is_to_be_killed: Callable[[], bool] = lambda: False,
) -> int:
    """Runs a program to its end; its output is appended to `log`. Returns the exit code.

    `on_look`: called with the memory of its processes in MiB, every `look_s` seconds. `is_to_be_killed`:
    asked every second; the program and its descendants get SIGKILL when it is true. If this process is
    told to stop (KeyboardInterrupt, SystemExit), the program gets one SIGTERM and time to end; if it is
    killed, the kernel sends the SIGTERM.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C would reach it twice
            preexec_fn=die_with_parent,
        )
    try:
        next_look_s = 0.0
        while process.poll() is None:
            if time.monotonic() >= next_look_s:
                on_look(pss_mib(process.pid))
                next_look_s = time.monotonic() + look_s
            if is_to_be_killed():
                killed = descendants(process.pid)
                for pid in killed:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
                # The kernel needs a moment for a large process, which holds its files until then.
                wait_for_end(killed)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    return process.returncode
