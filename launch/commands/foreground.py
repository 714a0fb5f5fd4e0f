"""Code shared by commands that run processes in the foreground: stop signals, the run's directory, its
log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from areal_like.errors import ConfigError
from areal_like.runtime.logs import configure_launcher_log
from areal_like.runtime.process import keep_files_private
from areal_like.runtime.signals import handle_log_signals
from launch.local_job.child import python_path

if TYPE_CHECKING:
    from rich.console import Console

    from launch.run_directory.open_run import OpenRun


class StopSignals:
    """Counts Ctrl-C, SIGTERM, and SIGHUP when the terminal is gone.

    Signals within a second of the last counted one are ignored: terminals and process supervisors often
    deliver a signal twice. A SIGHUP while there is still a terminal calls `on_hangup` instead.
    """

    def __init__(self, *, on_hangup: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._last_s = 0.0
        self._on_hangup = on_hangup
        self._has_terminal = _has_terminal()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGHUP, self._handle_hangup)

    def _handle_hangup(self, number: int, frame: FrameType | None) -> None:
        if self._has_terminal and not _has_terminal():
            self._handle(number, frame)
        else:
            self._on_hangup()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.count == 0 or now_s - self._last_s > 1.0:
            self.count += 1
            self._last_s = now_s


def _has_terminal() -> bool:
    """True while one of the standard streams is a terminal that has not been closed."""
    return any(os.isatty(stream) for stream in (0, 1, 2))


@contextlib.contextmanager
def in_directory(run: OpenRun) -> Iterator[None]:
    """Runs the block with the files and the launcher's log of a run's directory, then closes the run.

    A ConfigError in the block removes the directory if this command has created it.
    """
    try:
        keep_files_private(run.paths.root)
        configure_launcher_log(run.paths, run.config.daemon)
        # Stack traces go only into the log: stderr is the user's terminal.
        handle_log_signals(to_stderr=False, hangup=False)
        yield
    except ConfigError:
        run.remove_if_created()
        raise
    finally:
        run.close()


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Prints lines as they are: without markup, colors or breaks."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def environment_of(**variables: str) -> dict[str, str]:
    """The environment of a daemon of this checkout or installation, with further variables."""
    return os.environ | {"PYTHONPATH": python_path()} | variables


def become(module: str, *words: str, num_threads: int) -> NoReturn:
    """Replaces this process by `python -m MODULE WORDS`."""
    environment = environment_of(OMP_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="false")
    os.execve(sys.executable, [sys.executable, "-m", module, *words], environment)


def run_role(
    module: str, *words: str, input: str | None = None, capture_output: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE WORDS` of this checkout or installation to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        env=environment_of(),
        input=input,
        capture_output=capture_output,
        text=True,
        check=False,
    )
