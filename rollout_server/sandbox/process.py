"""Runs a command for a sandbox: bounded output, a wall-clock limit, and no process left behind."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from rollout_server.sandbox import supervisor
from rollout_server.sandbox.base import Limits, ProgramResult, as_bytes
from rollout_server.sandbox.running import RunningProgram, end_process

_READ_BYTES = 1 << 16
_MAX_DISCARDED_BYTES = 16 << 20
"""A program that writes more than this beyond the kept output is killed, because reading output costs CPU
time."""
_REST_TIMEOUT_S = 1.0
_MFD_NOEXEC_SEAL = 8


def memory_file(content: str | bytes) -> BinaryIO:
    """Returns an anonymous file with `content`, positioned at its start.

    It is sealed, so the program that reads it cannot use it as memory outside all limits, nor execute it
    (except before Linux 6.3).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("areal-like", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # older kernels do not support the flag
        descriptor = os.memfd_create("areal-like", flags)
    file = os.fdopen(descriptor, "w+b")
    file.write(as_bytes(content))
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return file


def environment_of(directory: str) -> dict[str, str]:
    """Returns the environment variables of a program whose home is `directory`."""
    return {
        "HOME": directory,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": directory,
    }


@functools.cache
def supervisor_text() -> str:
    """Returns the source of supervisor.py."""
    return Path(os.fspath(supervisor.__file__)).read_text()


def remote_command(command: Sequence[str], limits: Limits) -> list[str]:
    """Returns the command line that supervises a command where neither this repository nor its sandbox is.

    The supervisor alone ends the command at its time limit, with exit code 137.
    """
    arguments = vars(limits) | {"parent": 0, "serves": False, "extra_s": 0.0}
    return ["python3", "-I", "-S", "-c", supervisor_text(), json.dumps(arguments), *command]


def supervisor_arguments(limits: Limits, *, is_namespace: bool, serves: bool = False) -> str:
    """Returns the first argument of supervisor.py. In a process namespace it cannot see its parent."""
    return json.dumps(vars(limits) | {"parent": 0 if is_namespace else os.getpid(), "serves": serves})


@contextlib.contextmanager
def _with_priority() -> Iterator[None]:
    """What is started within the block has the lowest real-time priority, if this user may give it: the
    supervisor. It starts the program without one."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)  # of this thread
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)


def start_supervised(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: str,
    end_signal: signal.Signals,
    temporary: str = "",
    control: socket.socket | None = None,
) -> RunningProgram:
    """Starts a supervised command with unbuffered pipes. Raises OSError.

    `control`: the stdin of a supervisor that serves, which writes nothing to its stdout. Call it in a thread
    that lives on: the kernel signals the supervisor when the thread that started it ends.
    """
    with _with_priority():
        process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE if control is None else control.fileno(),
            stdout=subprocess.PIPE if control is None else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
        )
    return RunningProgram(process, end_signal, temporary)


class Ending(Protocol):
    """A command that was started elsewhere, until its end."""

    def wait(self, timeout_s: float) -> int:
        """Returns the exit code. Raises subprocess.TimeoutExpired."""

    def end(self) -> int:
        """Ends what is left of it; returns the exit code. May be called again."""


@dataclass
class _Supervised:
    process: subprocess.Popen[bytes]
    end_signal: signal.Signals

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def end(self) -> int:
        end_process(self.process, self.end_signal)
        code = self.process.returncode
        return 128 - code if code < 0 else code


@dataclass
class _Output:
    limit: int
    kept: bytearray = field(default_factory=bytearray)
    num_bytes: int = 0

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self.kept += data[: self.limit - len(self.kept)]


def run_bounded(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: str,
    stdin: str | bytes,
    limits: Limits,
    end_signal: signal.Signals,
) -> ProgramResult:
    """Runs a supervised command until it ends or reaches a limit; `end_signal` must end all of it."""
    with memory_file(stdin) as input_file, _with_priority():
        process = subprocess.Popen(
            command,
            stdin=input_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
        )
    assert process.stdout is not None and process.stderr is not None
    try:
        return collected(process.stdout, process.stderr, _Supervised(process, end_signal), limits=limits)
    finally:
        end_process(process, signal.SIGKILL)


def collected(stdout: IO[bytes], stderr: IO[bytes], ending: Ending, *, limits: Limits) -> ProgramResult:
    """Reads a command's output until it ends or reaches a limit, and ends it. Closes both streams."""
    out, err = _Output(limits.output_bytes), _Output(limits.output_bytes)
    streams: dict[IO[bytes], _Output] = {stdout: out, stderr: err}
    try:
        reason = _read_until_end(ending, streams, deadline=time.monotonic() + limits.timeout_s)
        code = ending.end()
        _read_rest(streams)
    finally:
        for stream in streams:
            stream.close()
    return ProgramResult(
        stdout_bytes=bytes(out.kept),
        stderr=err.kept.decode(errors="replace"),
        exit_code=code,
        timed_out=reason == "time",
        output_was_cut=any(output.num_bytes > output.limit for output in (out, err)),
        was_flood=reason == "output",
    )


def _read_until_end(ending: Ending, streams: Mapping[IO[bytes], _Output], *, deadline: float) -> str:
    """Reads until the program ends. Returns why it has to be ended: `time`, `output`, or nothing."""
    most = sum(output.limit for output in streams.values()) + _MAX_DISCARDED_BYTES
    if not _read(streams, deadline=deadline, most=most):
        return "output" if time.monotonic() < deadline else "time"
    try:  # a program may close its streams and continue
        ending.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "time"
    return ""


def _read(streams: Mapping[IO[bytes], _Output], *, deadline: float, most: int) -> bool:
    """Reads both streams. Returns False if they did not end before the deadline or `most` bytes."""
    with selectors.DefaultSelector() as selector:
        for stream, output in streams.items():
            selector.register(stream, selectors.EVENT_READ, output)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or sum(output.num_bytes for output in streams.values()) > most:
                return False
            for key, _ in selector.select(left):
                data = os.read(key.fd, _READ_BYTES)
                if data:
                    key.data.add(data)
                else:
                    selector.unregister(key.fileobj)
    return True


def _read_rest(streams: Mapping[IO[bytes], _Output]) -> None:
    """Reads the rest of the streams, but not for long: a process that escaped may hold them open."""
    most = sum(output.num_bytes for output in streams.values()) + _MAX_DISCARDED_BYTES
    _read(streams, deadline=time.monotonic() + _REST_TIMEOUT_S, most=most)
