"""The child processes of the launcher: each runs one daemon in a new session, with its output in a file.

There are three ways to end a child: SIGTERM to the child alone (it drains), SIGKILL to its process group, and
finally SIGKILL to every process with the run's marker in its environment. The last way also finds
processes that have started a new session, as torchrun's ranks do. When the launcher itself is killed, the
kernel sends SIGTERM to the children, which request that signal at their start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from areal_like.paths import RunPaths
from areal_like.runtime.logs import OUTPUT_FILE
from areal_like.runtime.process import PARENT_PID
from areal_like.terminal_text import harmless
from launch.local_job.actions import Exit, describe_exit
from launch.local_job.specs import ChildSpec

log = logging.getLogger(__name__)

RUN_MARKER = "AREAL_LIKE_RUN"
"""Environment variable of every process of one launched run, including grandchildren."""
_KILLED_S = 5.0
"""Longest wait for a process that was killed."""
ROOT = Path(__file__).resolve().parents[2]
"""The folder of the daemons' packages."""


def python_path() -> str:
    """PYTHONPATH for a child process: this checkout or installation first, then the current value."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


class Child:
    """A started process. Create it in the main thread: the kernel ends it when the creating thread ends."""

    def __init__(self, spec: ChildSpec, *, paths: RunPaths, marker: str, lock_fd: int) -> None:
        self._spec = spec
        self._output = paths.logs / f"{spec.name}.out"
        self._log = paths.logs / f"{spec.name}.log"
        # Earlier processes of the same name have written to these files; this one's output starts here.
        self._output_start = _size(self._output)
        self._log_start = _size(self._log)
        environment = os.environ | {
            PARENT_PID: str(os.getpid()),
            RUN_MARKER: marker,
            "OMP_NUM_THREADS": str(spec.num_threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            OUTPUT_FILE: str(self._output),
            "PYTHONPATH": python_path(),
        }
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *spec.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lock_fd,),
            )

    @property
    def pid(self) -> int:
        """Process id; it is also the id of the process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The exit code; None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Sends the stop signal to the process alone; it is responsible for its own children."""
        if self._process.poll() is None:
            self._process.send_signal(self._spec.stop_signal)

    def kill(self) -> None:
        """Kills the whole process group at once, also when the process itself has already ended.

        A process that hangs in the kernel, such as in a driver or on a lost file system, is left.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=_KILLED_S)
        except subprocess.TimeoutExpired:
            log.error(
                "%s (pid %d) hangs in the kernel: it has not ended %.0f s after SIGKILL",
                *(self._spec.name, self._process.pid, _KILLED_S),
            )

    def last_line(self) -> str:
        """The newest line of its output (a progress line rewritten with carriage returns counts as one)."""
        lines = _tail(self._output, start=self._output_start, num_lines=1)
        return harmless(lines[-1].rsplit("\r", 1)[-1].strip()) if lines else ""

    def complaint(self) -> str:
        """The message for the user that a process with exit code 2 has printed."""
        lines = _tail(self._output, start=self._output_start, num_lines=20)
        # torchrun prints its report of a failed rank after the rank's own message; that one begins with the
        # rank's name.
        own = [line for line in lines if re.match(rf"({re.escape(self._spec.name)}(-\d+)?|error): ", line)]
        told = (own or lines or [f"{self._spec.name}: see {self._output}"])[-1]
        return harmless(told.removeprefix("error: "))

    def last_words(self, *, num_lines: int = 12) -> list[str]:
        """The last lines of its output, then of the newest traceback in its log, if there is one."""
        lines = _tail(self._output, start=self._output_start, num_lines=num_lines)
        traces = [
            entry["exception"] for entry in _entries(self._log, start=self._log_start) if "exception" in entry
        ]
        lines += traces[-1].splitlines()[-num_lines:] if traces else []
        return [harmless(line) for line in lines]


class ProcessTable:
    """The children of one run that have been started and not yet reaped. `lock_fd`: the run's lock.

    Use it from the main thread only: the kernel ends a child when the thread that started it ends.
    """

    def __init__(self, paths: RunPaths, *, lock_fd: int) -> None:
        self._paths, self._lock_fd = paths, lock_fd
        self._marker = f"{paths.root}:{os.getpid()}:{time.time_ns()}"
        self._children: dict[str, Child] = {}
        self._unstarted: dict[str, Exit] = {}
        """Children that could not be started: they count as ended."""

    @property
    def names(self) -> list[str]:
        """Names of the children that are not reaped yet."""
        return [*self._children, *self._unstarted]

    def start(self, spec: ChildSpec) -> None:
        """Starts a child. One that cannot be started (no process, memory or file is left) has exit code 1."""
        try:
            child = Child(spec, paths=self._paths, marker=self._marker, lock_fd=self._lock_fd)
        except OSError as error:
            text = f"{spec.name} cannot be started: {error}"
            log.error("%s", text)
            self._unstarted[spec.name] = Exit(name=spec.name, code=1, last_words=(text,))
            return
        log.info("%s started, pid %d", spec.name, child.pid)
        self._children[spec.name] = child

    def reap(self, name: str) -> Exit | None:
        """Removes a child that has ended and kills the rest of its process group; None while it runs."""
        if name in self._unstarted:
            return self._unstarted.pop(name)
        child = self._children.get(name)
        code = child.exit_code() if child else None
        if child is None or code is None:
            return None
        del self._children[name]
        child.kill()
        (self._paths.endpoints / f"{name}.json").unlink(missing_ok=True)
        log.info("%s ended: %s", name, describe_exit(code))
        complaint = child.complaint() if code == 2 else ""
        return Exit(name=name, code=code, complaint=complaint, last_words=tuple(child.last_words()))

    def terminate(self, name: str) -> None:
        """Sends a child its stop signal."""
        if name in self._children:
            self._children[name].terminate()

    def kill(self, name: str) -> None:
        """Kills a child and its process group at once."""
        self._unstarted.pop(name, None)
        if (child := self._children.pop(name, None)) is not None:
            child.kill()

    def kill_everything(self) -> None:
        """Kills every process of the run at once, also processes that have started a new session."""
        for child in self._children.values():
            child.kill()
        kill_marked(self._marker)
        self._children.clear()
        self._unstarted.clear()

    def last_line(self, name: str) -> str:
        """The newest line of a child's output; empty when it does not run."""
        child = self._children.get(name)
        return child.last_line() if child else ""

    def last_words(self, name: str) -> list[str]:
        """The last lines of a child's output and traceback; empty when it does not run."""
        child = self._children.get(name)
        return child.last_words() if child else []


def kill_marked(marker: str, *, timeout_s: float = 5.0) -> None:
    """Kills every process of the run until none is left or `timeout_s` is over."""
    deadline_s = time.monotonic() + timeout_s
    while (pids := _marked_pids(marker)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked_pids(marker: str) -> list[int]:
    """Living processes with this run's marker, except this one. Empty on a system without /proc."""
    wanted = f"{RUN_MARKER}={marker}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # OSError: the process has ended in the meantime, or belongs to another user.
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _tail(path: Path, *, start: int, num_lines: int, max_bytes: int = 1 << 16) -> list[str]:
    """The last non-empty lines of a file from byte `start` on."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(start if start <= size else 0, size - max_bytes))  # shorter: a new file (logs.py)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:  # it was never written, or is just being renamed
        return []
    return [line.rstrip() for line in text.split("\n") if line.strip()][-num_lines:]


def _entries(path: Path, *, start: int) -> list[dict[str, str]]:
    entries = []
    for line in _tail(path, start=start, num_lines=50):
        with contextlib.suppress(ValueError):  # `_tail` may have cut the first line
            entries.append(json.loads(line))
    return entries
