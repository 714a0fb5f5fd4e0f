"""A program that runs in a sandbox, and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_END_TIMEOUT_S = 7.0
"""Time for the supervisor to kill processes that the program left behind."""
_REAP_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class RunningProgram:
    """A supervised command with pipes. `kill` and `end` end all processes that it started, too."""

    process: subprocess.Popen[bytes]
    end_signal: signal.Signals
    directory: str = ""
    """Temporary directory, removed at the end; empty without one."""

    def kill(self) -> None:
        """Kills the command and waits for its end, which takes milliseconds. May be called again."""
        orphans = _children_of(self.process.pid) if self.process.poll() is None else []
        end_process(self.process, self.end_signal)
        _reap(orphans)

    def end(self) -> None:
        """Kills the command and closes its pipes. May be called again."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what is left to write has no reader
                    stream.close()
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def end_process(process: subprocess.Popen[bytes], end_signal: signal.Signals) -> None:
    """Signals a process and waits until it has ended; kills it if that takes too long."""
    if process.poll() is None:
        process.send_signal(end_signal)
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # some kernels do not have this file
        return []


def _reap(pids: Sequence[int]) -> None:
    """Waits for children of an ended process, which end with it, if this process adopts orphans.

    An environment's process does, and it is not used again while it has children.
    """
    deadline = time.monotonic() + _REAP_TIMEOUT_S
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # another process has adopted it
            while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.001)
