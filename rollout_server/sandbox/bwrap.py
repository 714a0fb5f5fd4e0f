"""A sandbox of Linux namespaces, created by bubblewrap (`bwrap`).

Its commands see /usr, the interpreter's prefix and a /tmp in memory, which is their home, but no network, no
other processes and no other files. They run as user nobody. When bwrap is killed, the kernel kills all
processes of the namespace, and its files are gone. bwrap needs user namespaces, which some distributions and
most containers do not allow; `check` reports that. Versions before 0.6 have no `--size`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox.base import (
    ACCEPT_RLIMITS,
    Limits,
    OpenSandbox,
    ProgramResult,
    Sandbox,
    problem_of,
)
from rollout_server.sandbox.process import (
    collected,
    environment_of,
    memory_file,
    start_supervised,
    supervisor_arguments,
    supervisor_text,
)
from rollout_server.sandbox.running import RunningProgram

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_HOME = "/tmp"
_END_TIMEOUT_S = 7.0
"""Time for the supervisor to kill what is left of a command."""
_MAX_WORDS_BYTES = 1 << 16


class BwrapSandbox(Sandbox):
    """Opens sandboxes with bwrap."""

    kind = "bwrap"

    def open(self, *, limits: Limits | None = None) -> OpenSandbox:
        """Starts new namespaces. Raises ConfigError if bwrap is not installed."""
        limits = limits or Limits()
        command = _isolated([], [], limits, serves=True)
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                program = start_supervised(
                    command,
                    environment=environment_of(_HOME),
                    directory="/",
                    end_signal=signal.SIGKILL,
                    control=theirs,
                )
            except OSError as error:
                control.close()
                raise SandboxError(f"bwrap cannot be started: {error}") from error
        return _Namespaces(program, control, limits)

    def start(
        self,
        command: Sequence[str],
        *,
        limits: Limits,
        environment: Mapping[str, str],
        readable: Sequence[str] = (),
    ) -> RunningProgram:
        """Starts the command in new namespaces. Raises ConfigError if bwrap is not installed."""
        options = [option for path in readable for option in ("--ro-bind", path, path)]
        return start_supervised(
            _isolated(command, options, limits),
            environment=environment_of(_HOME) | dict(environment),
            directory="/",
            end_signal=signal.SIGKILL,
        )

    def check(self) -> None:
        problem = problem_of(self)
        if problem:
            raise ConfigError(
                f"rewards.sandbox=bwrap: bwrap does not work on this machine ({problem}). It needs user "
                "namespaces, which containers and some distributions do not allow: allow them (in a "
                "container, for example by --security-opt seccomp=unconfined; on Ubuntu see "
                f"kernel.apparmor_restrict_unprivileged_userns), or {ACCEPT_RLIMITS}"
            )


class _Namespaces(OpenSandbox):
    """The namespaces of one bwrap, and the supervisor in them that runs commands."""

    python = sys.executable

    def __init__(self, program: RunningProgram, control: socket.socket, limits: Limits) -> None:
        super().__init__(_HOME, limits)
        self._program = program
        self._control = control
        self._lock = threading.Lock()

    def _exec(
        self, command: list[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        request = {"command": command, "directory": directory, "timeout_s": limits.timeout_s}
        with self._lock, contextlib.ExitStack() as stack:
            readers, writers = [], []
            with contextlib.ExitStack() as sent:
                for _ in range(2):
                    reader, writer = os.pipe()
                    sent.callback(os.close, writer)
                    readers.append(stack.enter_context(os.fdopen(reader, "rb", buffering=0)))
                    writers.append(writer)
                try:
                    with memory_file(stdin) as given:
                        theirs = [given.fileno(), *writers]
                        socket.send_fds(self._control, [json.dumps(request).encode()], theirs)
                except OSError as error:
                    raise SandboxError(self._how_it_ended()) from error
            ending = _Command(self._control, lost=self._lost)
            result = collected(readers[0], readers[1], ending, limits=limits)
            return replace(result, stderr=result.stderr + ending.problem) if ending.problem else result

    def close(self) -> None:
        self._program.kill()
        with self._lock:  # a command in another thread has now lost its sandbox
            self._program.end()
            self._control.close()

    def _lost(self) -> SandboxError:
        """Ends what is left of the sandbox; returns the error that says why it cannot be used."""
        problem = self._how_it_ended()
        self._program.kill()
        return SandboxError(problem)

    def _how_it_ended(self) -> str:
        process = self._program.process
        if self._control.fileno() < 0:
            return "the sandbox is closed"
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "the sandbox does not answer"
        assert process.stderr is not None
        words = process.stderr.read(_MAX_WORDS_BYTES).decode(errors="replace").strip().splitlines()
        if words:
            return f"the sandbox has ended: {words[-1]:.300}"
        if process.returncode == 0:
            return f"the sandbox has ended: it lived for lifetime_s={self._limits.lifetime_s:g}"
        return f"the sandbox has ended: exit code {process.returncode}"


@dataclass
class _Command:
    """A command that the supervisor in the sandbox runs."""

    control: socket.socket
    lost: Callable[[], SandboxError]
    problem: str = ""
    """What the supervisor says about its end."""
    exit_code: int | None = None

    def wait(self, timeout_s: float) -> int:
        if self.exit_code is None:
            self.control.settimeout(max(timeout_s, 0.001))
            try:
                packet = self.control.recv(_MAX_WORDS_BYTES)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("", timeout_s) from error
            except OSError:
                packet = b""
            if not packet:
                raise self.lost()
            answer = json.loads(packet)
            self.exit_code, self.problem = answer["exit_code"], answer["problem"]
        return self.exit_code

    def end(self) -> int:
        if self.exit_code is not None:
            return self.exit_code
        try:
            self.control.settimeout(_END_TIMEOUT_S)
            self.control.send(b"{}")
            return self.wait(_END_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self.lost() from error


def _isolated(
    command: Sequence[str], options: Sequence[str], limits: Limits, *, serves: bool = False
) -> list[str]:
    """Returns the command line that runs a supervised command in new namespaces. `options`: more mounts."""
    executable = shutil.which("bwrap")
    if executable is None:
        raise ConfigError(
            f"rewards.sandbox=bwrap: bwrap is not installed; install bubblewrap, or {ACCEPT_RLIMITS}"
        )
    return [
        executable,
        *_namespace(limits),
        *options,
        "--remount-ro",
        "/",
        "--",
        *(sys.executable, "-I", "-S", "-c", supervisor_text()),
        supervisor_arguments(limits, is_namespace=True, serves=serves),
        *command,
    ]


def _namespace(limits: Limits) -> Iterator[str]:
    """Yields bwrap's options for the file system, in the order of mounting."""
    size = str(limits.file_mb << 20)
    # --unshare-all continues without a user namespace if there is none; --unshare-user does not.
    yield from ("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session")
    yield from ("--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--hostname", "sandbox")
    # bwrap leaves /proc/sys writable. If the server runs as root, the program is root outside its namespace,
    # too, and the kernel would let it change the settings of the whole machine.
    yield from ("--proc", "/proc", "--remount-ro", "/proc")
    yield from ("--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm")
    yield from ("--remount-ro", "/dev", "--size", size, "--tmpfs", "/tmp", "--chdir", "/tmp")
    yield from _system_files()


@cache
def _system_files() -> tuple[str, ...]:
    """Returns options that expose the system and the interpreter, but not the job's directory."""
    options: list[str] = []
    for path in _SYSTEM:
        if Path(path).is_symlink():
            options += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).is_dir():
            options += ["--ro-bind", path, path]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    here = Path.cwd()
    prefixes = [Path(prefix).absolute() for prefix in sorted({sys.base_prefix, sys.prefix})]
    shown = [Path(path) for path in _SYSTEM]
    for prefix in prefixes:
        if prefix not in shown and not prefix.is_relative_to(here):
            options += ["--ro-bind", str(prefix), str(prefix)]
            shown.append(prefix)
    if any(here != path and here.is_relative_to(path) for path in shown):
        options += ["--tmpfs", str(here)]
    for prefix in prefixes:
        if prefix.is_relative_to(here):
            options += ["--ro-bind", str(prefix), str(prefix)]
    return tuple(options)
