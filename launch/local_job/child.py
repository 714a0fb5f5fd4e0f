"""One daemon as a child process: its own session, its output in a file, and no way to outlive the launcher.

Three nets catch a child: SIGTERM to it alone (it drains), SIGKILL to its process group, and at the very end SIGKILL to
every process that carries the run's marker in its environment, which also finds what moved to a session of its own (torchrun's ranks
do). A launcher that is killed itself leaves all this to the kernel: children asked for SIGTERM at their parent's death.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from areal_like.paths import RunPaths
from areal_like.runtime.process import PARENT_PID

RUN_MARKER = "AREAL_LIKE_RUN"
"""Environment variable that every process of one launched run carries, grandchildren included."""
ROOT = Path(__file__).resolve().parents[2]
"""Where the daemons' packages are."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How to start one daemon."""

    name: str
    """Names its log and, for daemons, its endpoint file."""
    command: tuple[str, ...]
    """What follows `python -m`."""
    num_threads: int = 1
    """CPU threads of its numerical libraries."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Asks it to end by itself."""


class Child:
    """A started process. Start it from the main thread: the kernel ties the child to the thread that made it."""

    def __init__(self, spec: ChildSpec, *, paths: RunPaths, marker: str, lock_fd: int) -> None:
        self.spec = spec
        self.name = spec.name
        self._paths = paths
        self._output = paths.logs / f"{spec.name}.out"
        self._log = paths.logs / f"{spec.name}.log"
        # A restarted daemon appends to its files: what an earlier life said must not be taken for this one's last words.
        self._output_start = _size(self._output)
        self._log_start = _size(self._log)
        environment = os.environ | {
            PARENT_PID: str(os.getpid()),
            RUN_MARKER: marker,
            "OMP_NUM_THREADS": str(spec.num_threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
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
        self.started_s = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id, also that of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Asks it to drain. Its own children are its own business."""
        if self._process.poll() is None:
            self._process.send_signal(self.spec.stop_signal)

    def kill(self) -> None:
        """Ends it and everything in its process group at once, also what it left behind when it died."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_line(self) -> str:
        """The newest line of its output (a progress line rewritten with carriage returns counts as one)."""
        lines = _tail(self._output, start=self._output_start, num_lines=1)
        return lines[-1].rsplit("\r", 1)[-1].strip() if lines else ""

    def complaint(self) -> str:
        """The one message that a process with exit code 2 left for the user."""
        lines = _tail(self._output, start=self._output_start, num_lines=20)
        # torchrun reports a failed rank after the rank's own message, which carries the rank's name.
        own = [line for line in lines if re.match(rf"({re.escape(self.name)}(-\d+)?|error): ", line)]
        return (own or lines or [f"{self.name}: see {self._output}"])[-1].removeprefix("error: ")

    def last_words(self, *, num_lines: int = 12) -> list[str]:
        """The last lines of its output, then of the trace-back in its log if that holds one."""
        lines = _tail(self._output, start=self._output_start, num_lines=num_lines)
        traces = [
            entry["exception"] for entry in _entries(self._log, start=self._log_start) if "exception" in entry
        ]
        return lines + ([*traces[-1].splitlines()[-num_lines:]] if traces else [])


def describe_exit(code: int) -> str:
    """An exit code in words: `exit code 1`, `killed by SIGKILL`."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def marked_pids(marker: str) -> list[int]:
    """Living processes that carry this run's marker, except this one. Empty where there is no /proc."""
    wanted = f"{RUN_MARKER}={marker}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile, or is another user's
            if int(folder.name) != os.getpid() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_marked(marker: str, *, timeout_s: float = 5.0) -> int:
    """Kills every process of the run until none is left; returns how many there were."""
    num_killed = 0
    deadline_s = time.monotonic() + timeout_s
    while (pids := marked_pids(marker)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                num_killed += 1
        time.sleep(0.05)
    return num_killed


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, *, start: int, num_lines: int, max_bytes: int = 1 << 16) -> list[str]:
    """The last non-empty lines of a file from byte `start` on."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - max_bytes))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.split("\n") if line.strip()][-num_lines:]


def _entries(path: Path, *, start: int) -> list[dict[str, str]]:
    entries = []
    for line in _tail(path, start=start, num_lines=50):
        with contextlib.suppress(ValueError):  # a line cut in half by the window
            entries.append(json.loads(line))
    return entries
