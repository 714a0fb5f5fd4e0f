"""The interface of a sandbox: a file system of its own, and commands that run in it with limits.

    with make_sandbox("bwrap").open(limits=Limits(memory_mb=256)) as box:
        box.write({"sum.py": b"print(1 + 2)\n"})
        result = box.exec(["python3", "sum.py"], timeout_s=5.0)
        box.read("sum.py")

    Sandbox      one kind, such as bwrap. It holds nothing, and may be made anywhere.
    OpenSandbox  one sandbox: exec, write and read, close. It lives for a program, or for a whole sample.

All calls block. A reward calls them directly, and a tool calls them in a thread. A command that fails or
exceeds a limit is a result, not an exception: the caller decides how to handle it. A sandbox that is lost (it
does not start, the kernel or a daemon ended it) raises SandboxError, which fails the sample. `run` is one
program in a sandbox of its own; `start` is for a program that serves its caller over pipes, such as a server
of tools.

bwrap's sandboxes end with the process that opened them. Other kinds may leave something behind if that
process is killed: it is marked with the owner (`owner.py`), by which `reap` finds it.
"""

from __future__ import annotations

import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import Self

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox.owner import Owner
from rollout_server.sandbox.running import RunningProgram

_WRITE_TIMEOUT_S = 60.0
"""Time limit for putting files into a sandbox, in seconds; the first call also starts it."""
_READ_TIMEOUT_S = 10.0
"""Time limit for reading a file, in seconds: a pipe that a command made has no end."""
_MAX_NAME_BYTES = 1024
_MAX_COMMAND_BYTES = 65_536
_PROGRAM = "program.py"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a sandbox and of each command in it. Raises ConfigError for a limit that is not
    above 0."""

    timeout_s: float = 10.0
    """Wall-clock time of one command, in seconds; the same limit applies to the CPU time of each process."""
    memory_mb: int = 512
    """Address space of one process, in MiB. All processes of a command together may use twice that."""
    max_processes: int = 32
    """Number of processes and threads at a time."""
    file_mb: int = 64
    """Largest file, in MiB; with bwrap and containers also all files together."""
    output_bytes: int = 16384
    """Bytes kept of stdout, and the same number of stderr."""
    lifetime_s: float = 7200.0
    """Time after which a sandbox that was not closed ends by itself, in seconds."""

    def __post_init__(self) -> None:
        names = ("timeout_s", "memory_mb", "max_processes", "file_mb", "output_bytes", "lifetime_s")
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"sandbox limit {name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """The exit status and output of a command."""

    stdout_bytes: bytes
    """The first `output_bytes` bytes."""
    stderr: str
    """Likewise; invalid UTF-8 is replaced. If a limit on processes or memory ended the command, its name is
    here."""
    exit_code: int
    """128 + n after signal n, as in a shell."""
    timed_out: bool
    """True if the command was killed at the time limit."""
    output_was_cut: bool
    """True if the command wrote more than was kept."""
    was_flood: bool = False
    """True if it was killed because it wrote so much more that reading it would cost too much."""

    @property
    def stdout(self) -> str:
        """`stdout_bytes` as text; invalid UTF-8 is replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def succeeded(self) -> bool:
        """True if the command ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out


class OpenSandbox(ABC):
    """One sandbox. Commands run one at a time, and no process is left when `exec` returns; files stay until
    `close`."""

    python: str = "python3"
    """The Python interpreter of the sandbox."""

    def __init__(self, home: str, limits: Limits) -> None:
        self.home = home
        """Directory of the files, where commands run: an absolute path as commands see it."""
        self._limits = limits

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: str | bytes = "",
        directory: str = "",
        timeout_s: float | None = None,
        output_bytes: int | None = None,
    ) -> ProgramResult:
        """Runs a command. `directory`: where, below `home`. The other arguments replace those of the limits.

        Raises SandboxError if the sandbox is lost, and ValueError if a command is too long or a directory not
        below `home`.
        """
        limits = replace(
            self._limits,
            timeout_s=self._limits.timeout_s if timeout_s is None else timeout_s,
            output_bytes=self._limits.output_bytes if output_bytes is None else output_bytes,
        )
        where = f"{self.home}/{checked_name(directory)}" if directory else self.home
        return self._exec(checked_command(command), stdin=stdin, directory=where, limits=limits)

    @abstractmethod
    def _exec(
        self, command: list[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        """Runs a command in a directory, an absolute path. `limits`: its own. Raises SandboxError."""

    @abstractmethod
    def close(self) -> None:
        """Ends the sandbox with all that is in it. May be called again."""

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Writes files; names are paths below `home`, whose directories are made.

        Raises ValueError for another name, and SandboxError if they do not fit.
        """
        command = ["tar", "-x", "-o", "-f", "-", "-C", self.home]
        result = self.exec(command, stdin=_archive(files), timeout_s=_WRITE_TIMEOUT_S)
        if not result.succeeded:
            raise SandboxError(f"files cannot be written into the sandbox: {problem_in(result, line=0)}")

    def read(self, name: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Returns the first `max_bytes` bytes of a file below `home`.

        What the file is was decided by the commands in the sandbox: a link, a device, a pipe. Raises OSError
        if it cannot be read, ValueError for a name that is not below `home`.
        """
        path = f"{self.home}/{checked_name(name)}"
        result = self.exec(
            ["head", "-c", str(max_bytes), path], timeout_s=_READ_TIMEOUT_S, output_bytes=max_bytes
        )
        if not result.succeeded:
            raise OSError(f"{name} cannot be read: {problem_in(result, line=0)}")
        return result.stdout_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sandbox(ABC):
    """Makes sandboxes of one kind, for untrusted programs."""

    kind: str
    """What `rewards.sandbox` calls it."""

    @abstractmethod
    def open(self, *, limits: Limits | None = None) -> OpenSandbox:
        """Opens a sandbox with no files. Raises SandboxError, or ConfigError if a program is missing.

        Call it in a thread that lives on: bwrap's sandboxes end with the thread that opened them.
        """

    @abstractmethod
    def check(self) -> None:
        """Runs a program that prints a line. Raises ConfigError, which says why and what to do, if that
        fails."""

    def run(
        self, program: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Runs Python source (a string) or a command (a list) in a sandbox of its own, without anything left.

        Raises SandboxError.
        """
        with self.open(limits=limits) as box:
            if isinstance(program, str):
                box.write({_PROGRAM: program})
                program = [box.python, "-I", "-B", "-u", f"{box.home}/{_PROGRAM}"]
            return box.exec(program, stdin=stdin)

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
        Raises ConfigError if this kind cannot serve over pipes.
        """
        raise ConfigError(
            f"rewards.sandbox={self.kind}: servers of tools on stdio run only in bwrap or rlimits; give the "
            "server a `url`, or another `sandbox`"
        )

    def reap(self, owner: Owner) -> int:
        """Removes the sandboxes of an owner whose processes have ended; returns how many. See `owner.py`.

        Raises SandboxError if they cannot be listed or removed.
        """
        return 0


ACCEPT_RLIMITS = (
    "set rewards.sandbox=rlimits, which gives up isolation: the policy's programs can then read every file "
    "that the server can read (keys and the run directory, too), use the network, and signal its processes"
)


def problem_of(sandbox: Sandbox) -> str:
    """Returns why the sandbox cannot run a program; empty if it can."""
    try:
        result = sandbox.run("print(6 * 7)", limits=Limits(timeout_s=20.0))
    except SandboxError as error:
        return str(error)
    if result.stdout.strip() == "42" and result.succeeded:
        return ""
    if result.timed_out:
        return "a program that prints one line did not end within 20 s"
    return problem_in(result)


def problem_in(result: ProgramResult, *, line: int = -1) -> str:
    """Returns why a command failed: a line of its stderr, or its exit code."""
    if result.timed_out:
        return "it took too long"
    lines = result.stderr.strip().splitlines()
    return f"{lines[line]:.300}" if lines else f"exit code {result.exit_code}"


def checked_name(name: str) -> str:
    """Returns the name of a file below `home`. Raises ValueError for another one."""
    path = PurePosixPath(name)
    is_below = path.parts and not path.is_absolute() and ".." not in path.parts
    if not is_below or "\0" in name or len(name.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise ValueError(f"{name!r:.100}: want a path below the sandbox's home, without ..")
    return str(path)


def checked_command(command: Sequence[str]) -> list[str]:
    """Returns the words of a command. Raises ValueError if no kernel would start it."""
    words = list(command)
    if not words or any("\0" in word for word in words):
        raise ValueError("a command needs a program, and no word with a null character")
    if (size := sum(len(word.encode(errors="replace")) + 1 for word in words)) > _MAX_COMMAND_BYTES:
        raise ValueError(
            f"a command of {size} bytes is too long (at most {_MAX_COMMAND_BYTES}): pass data by stdin"
        )
    return words


def as_bytes(content: str | bytes) -> bytes:
    """Returns a file's or an input's content; what is not Unicode is replaced."""
    return content.encode(errors="replace") if isinstance(content, str) else content


def _archive(files: Mapping[str, str | bytes]) -> bytes:
    """Returns the files as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            data = as_bytes(content)
            entry = tarfile.TarInfo(checked_name(name))
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
