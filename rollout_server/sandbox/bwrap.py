"""A sandbox of Linux namespaces, created by bubblewrap (`bwrap`).

The program sees /usr, the interpreter's prefix and an empty /tmp, which is its home, but no network, no other
processes and no other files. It runs as user nobody. When bwrap is killed, the kernel kills all processes of
the namespace. bwrap needs user namespaces, which some distributions and most containers do not allow; `check`
reports that. Versions before 0.6 have no `--size`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from areal_like.errors import ConfigError
from rollout_server.sandbox import supervisor
from rollout_server.sandbox.base import ACCEPT_RLIMITS, Limits, ProgramResult, problem_of
from rollout_server.sandbox.process import (
    environment_of,
    memory_file,
    run_bounded,
    start_supervised,
    supervisor_arguments,
)
from rollout_server.sandbox.running import RunningProgram

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_PROGRAM = "/tmp/program.py"


class BwrapSandbox:
    """Runs programs with bwrap."""

    def run(
        self, program: str | Sequence[str], *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Runs the program in new namespaces. Raises ConfigError if bwrap is not installed."""
        limits = limits or Limits()
        is_source = isinstance(program, str)
        with memory_file(program if isinstance(program, str) else "") as source:
            options = ["--ro-bind-data", str(source.fileno()), _PROGRAM] if is_source else []
            command = [sys.executable, "-I", "-B", "-u", _PROGRAM] if is_source else program
            return run_bounded(
                _isolated(command, options, limits),
                environment=environment_of("/tmp"),
                directory="/",
                stdin=stdin,
                limits=limits,
                end_signal=signal.SIGKILL,
                pass_fds=[source.fileno()],
            )

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
            environment=environment_of("/tmp") | dict(environment),
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


def _isolated(command: Sequence[str], options: Sequence[str], limits: Limits) -> list[str]:
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
        *(sys.executable, "-I", "-S", "-c", _supervisor_text()),
        supervisor_arguments(limits, is_namespace=True),
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


@cache
def _supervisor_text() -> str:
    return Path(os.fspath(supervisor.__file__)).read_text()
