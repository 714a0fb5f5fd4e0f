"""A sandbox that only sets limits, for machines without user namespaces. It is used only if configured.

The program runs in its own session and temporary directory, with a scrubbed environment and the limits of
supervisor.py, which also kills daemons that the program leaves behind. There is no isolation: the program can
read all files that the server can read, use the network, and signal other processes of the same user. A
program that starts sessions faster than they are found may leave processes behind; they keep their limits on
CPU time and memory. RLIMIT_FSIZE bounds each file, not their sum.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from areal_like.errors import ConfigError
from rollout_server.sandbox import supervisor
from rollout_server.sandbox.base import Limits, ProgramResult, problem_of
from rollout_server.sandbox.process import (
    environment_of,
    run_bounded,
    start_supervised,
    supervisor_arguments,
)
from rollout_server.sandbox.running import RunningProgram


class RlimitsSandbox:
    """Runs programs as processes of the server's user."""

    def run(
        self, program: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Runs the program in a temporary directory, which is removed afterwards."""
        limits = limits or Limits()
        directory = Path(tempfile.mkdtemp(prefix="areal-like-program-"))
        try:
            if isinstance(program, str):
                path = directory / "program.py"
                path.write_text(program, errors="replace")
                program = [sys.executable, "-I", "-B", "-u", str(path)]
            return run_bounded(
                _supervised(program, limits),
                environment=environment_of(str(directory)),
                directory=str(directory),
                stdin=stdin,
                limits=limits,
                end_signal=signal.SIGTERM,
            )
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def start(
        self,
        command: Sequence[str],
        *,
        limits: Limits,
        environment: Mapping[str, str],
        readable: Sequence[str] = (),
    ) -> RunningProgram:
        """Starts the command in a temporary directory. It can read all that the server can."""
        directory = tempfile.mkdtemp(prefix="areal-like-program-")
        try:
            return start_supervised(
                _supervised(command, limits),
                environment=environment_of(directory) | dict(environment),
                directory=directory,
                end_signal=signal.SIGTERM,
                temporary=directory,
            )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def check(self) -> None:
        problem = problem_of(self)
        if problem:
            raise ConfigError(f"rewards.sandbox=rlimits: cannot run {sys.executable} ({problem})")


def _supervised(command: Sequence[str], limits: Limits) -> list[str]:
    return [
        *(sys.executable, "-I", "-S", supervisor.__file__),
        supervisor_arguments(limits, is_namespace=False),
        *command,
    ]
