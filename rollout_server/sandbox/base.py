"""The interface of a sandbox: it runs one program with limits and returns what the program wrote.

`run` blocks. A reward calls it directly, and a tool calls it in a thread. A program that fails or exceeds a
limit is reported as a result, not an exception: the caller decides how to handle it. `start` is for a program
that serves its caller over pipes, such as a server of tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from areal_like.errors import ConfigError
from rollout_server.sandbox.running import RunningProgram


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one program. Raises ConfigError for a limit that is not above 0."""

    timeout_s: float = 10.0
    """Wall-clock time, in seconds; the same limit applies to the CPU time of each process."""
    memory_mb: int = 512
    """Address space of one process, in MiB. All processes of the program together may use twice that."""
    max_processes: int = 32
    """Number of processes and threads at a time."""
    file_mb: int = 64
    """Largest file, in MiB; with bwrap also all files together."""
    output_bytes: int = 16384
    """Bytes kept of stdout, and the same number of stderr."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "memory_mb", "max_processes", "file_mb", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"sandbox limit {name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """The exit status and output of a program."""

    stdout: str
    """The first `output_bytes` bytes; invalid UTF-8 is replaced."""
    stderr: str
    """Likewise. If a limit on processes or memory ended the program, its name is here."""
    exit_code: int
    """128 + n after signal n, as in a shell."""
    timed_out: bool
    """True if the program was killed at the time limit."""
    output_was_cut: bool
    """True if the program wrote more than was kept."""

    @property
    def succeeded(self) -> bool:
        """True if the program ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out


class Sandbox(Protocol):
    """Runs untrusted programs."""

    def run(
        self, program: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Runs Python source (a string) or a command (a list). When it returns, no process is left."""

    def start(
        self,
        command: Sequence[str],
        *,
        limits: Limits,
        environment: Mapping[str, str],
        readable: Sequence[str] = (),
    ) -> RunningProgram:
        """Starts a command whose pipes the caller reads and writes; `limits.output_bytes` is not used.

        `environment`: variables added to the few that every program has. `readable`: files and directories
        that it may read besides the system and the interpreter. If this process ends, all of it is killed.
        """

    def check(self) -> None:
        """Runs a program that prints a line. Raises ConfigError, which says why and what to do, if that
        fails."""


ACCEPT_RLIMITS = (
    "set rewards.sandbox=rlimits, which gives up isolation: the policy's programs can then read every file "
    "that the server can read (keys and the run directory, too), use the network, and signal its processes"
)


def problem_of(sandbox: Sandbox) -> str:
    """Returns why the sandbox cannot run a program; empty if it can."""
    result = sandbox.run("print(6 * 7)", limits=Limits(timeout_s=20.0))
    if result.stdout.strip() == "42" and result.succeeded:
        return ""
    if result.timed_out:
        return "a program that prints one line did not end within 20 s"
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.exit_code}"
