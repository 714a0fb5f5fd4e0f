"""The interface of a sandbox: it runs one program with limits and returns what the program wrote.

`run` blocks. A reward calls it as it is, and a tool calls it in a thread. A program that fails, or exceeds a
limit, is a result and no exception: what becomes of it is the caller's decision. A sandbox on other machines
is another class with these two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from areal_like.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Raises ConfigError for a limit that is not above 0."""

    timeout_s: float = 10.0
    """Wall-clock time, in seconds; CPU time of one process has the same limit."""
    memory_mb: int = 512
    """Address space of one process, in MiB. All its processes together may hold twice that."""
    max_processes: int = 32
    """Processes and threads at one time."""
    file_mb: int = 64
    """Largest file, in MiB; with bwrap also all files together."""
    output_bytes: int = 16384
    """Bytes that are kept of stdout, and as many of stderr."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "memory_mb", "max_processes", "file_mb", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"sandbox limit {name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """How a program ended, and what it wrote."""

    stdout: str
    """Its first `output_bytes` bytes; bytes that are no UTF-8 are replaced."""
    stderr: str
    """Likewise. A limit of processes or memory that ended the program is named here."""
    exit_code: int
    """128 + n after signal n, as in a shell."""
    timed_out: bool
    """The time limit was reached, and the program was killed."""
    output_was_cut: bool
    """The program wrote more than was kept."""

    @property
    def succeeded(self) -> bool:
        """True if the program ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out


class Sandbox(Protocol):
    """Runs programs that nobody has read."""

    def run(
        self, program: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Runs Python source (a string), or a command (a list). When it returns, no process is left."""

    def check(self) -> None:
        """Runs a program that prints a line. Raises ConfigError that says why it did not, and what to do."""


ACCEPT_RLIMITS = (
    "set rewards.sandbox=rlimits, which gives up isolation: the policy's programs can then read every file "
    "that the server can read (keys and the run directory, too), use the network, and signal its processes"
)


def problem_of(sandbox: Sandbox) -> str:
    """Why the sandbox does not run a program; empty if it does."""
    result = sandbox.run("print(6 * 7)", limits=Limits(timeout_s=20.0))
    if result.stdout.strip() == "42" and result.succeeded:
        return ""
    if result.timed_out:
        return "a program that prints one line did not end within 20 s"
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.exit_code}"
