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

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox import supervisor
from rollout_server.sandbox.base import (
    Limits,
    OpenSandbox,
    ProgramResult,
    Sandbox,
    problem_of,
)
from rollout_server.sandbox.owner import Owner
from rollout_server.sandbox.process import (
    environment_of,
    run_bounded,
    start_supervised,
    supervisor_arguments,
)
from rollout_server.sandbox.running import RunningProgram


class RlimitsSandbox(Sandbox):
    """Runs programs as processes of the server's user."""

    kind = "rlimits"

    def open(self, *, limits: Limits | None = None) -> OpenSandbox:
        """Makes a temporary directory, which `close` removes."""
        return _Directory(_new_directory(), limits or Limits())

    def reap(self, owner: Owner) -> int:
        left = list(Path(tempfile.gettempdir()).glob(f"{owner.prefix}*"))
        for directory in left:
            shutil.rmtree(directory, ignore_errors=True)
        return len(left)

    def start(
        self,
        command: Sequence[str],
        *,
        limits: Limits,
        environment: Mapping[str, str],
        readable: Sequence[str] = (),
    ) -> RunningProgram:
        """Starts the command in a temporary directory. It can read all that the server can."""
        directory = _new_directory()
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


class _Directory(OpenSandbox):
    """A temporary directory; each command has a supervisor of its own."""

    python = sys.executable

    def _exec(
        self, command: list[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        if not Path(self.home).is_dir():
            raise SandboxError("the sandbox is closed")
        if not Path(directory).is_dir():  # Popen would raise
            command, directory = ["ls", directory], self.home
        return run_bounded(
            _supervised(command, limits),
            environment=environment_of(self.home),
            directory=directory,
            stdin=stdin,
            limits=limits,
            end_signal=signal.SIGTERM,
        )

    def close(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)


def _new_directory() -> str:
    return tempfile.mkdtemp(prefix=Owner.of_this_process().prefix)


def _supervised(command: Sequence[str], limits: Limits) -> list[str]:
    return [
        *(sys.executable, "-I", "-S", supervisor.__file__),
        supervisor_arguments(limits, is_namespace=False),
        *command,
    ]
