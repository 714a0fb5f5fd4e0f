"""Starts Python processes of this project as forks of a process that has their imports already.

    Popen([sys.executable, "-m", "buffer", ...], env=..., stdout=...)    # as subprocess.Popen

A daemon spends three seconds of CPU time on importing torch and transformers, and the tests start several
hundred. Here each pytest process starts one *nursery*, which imports what daemons import. It has one thread,
and is asked over a socket for processes; a process that starts others itself (the launcher, the rollout
server, a trainer with ranks) has a nursery of its own, which is forked from it before it does anything.

A started process is what `python -m` would have made: a child of the process that asked (so `waitpid`,
PR_SET_PDEATHSIG and process groups work), in the session, directory, environment and with the files, limits
and ignored signals that it was asked for; /proc shows its command line and environment. It runs the module as
`__main__`. What differs: memory that it shares with the nursery, modules that were imported before, the hash
seed, which all forks share, and its end, which leaves the destruction of modules out.

    worker -> nursery -> intermediate, which ends at once -> process, adopted by the worker

A nursery ends when the process that asks it closes its socket or ends.

Whole jobs that start as in production are in tests/launch/test_run.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib
import inspect
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from areal_like.runtime.imports import uncollected

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "buffer",
    "launch",
    "launch.doctor.gpu.process",
    "launch.doctor.gpu.step",
    "rollout_server",
    "rollout_server.data_stats",
    "rollout_server.engine",
    "rollout_server.router",
    "rollout_server.scoring",
    "trainer",
    "trainer.evaluate",
    "trainer.planning",
    "trainer.preferences",
    "trainer.prepare_model",
    "trainer.replay.trace",
    "trainer.reward_model",
    "trainer.sft",
)
"""Programs whose children are forked too. Others are small, or their size is what a test measures."""
_IMPORTED = (
    "buffer.service.daemon",
    "launch.cli",
    "launch.commands.run",
    "rollout_server.daemon",
    "rollout_server.engine.__main__",
    "trainer.daemon",
)
_USED_LATER = (
    "hydra.core.override_parser.overrides_parser",
    "tests.support.snapshot_ranks",
    "tests.support.trainer_ranks",
    "trainer.models.tiny",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
"""What they import when they need it."""
_PARENTS = (
    "launch",
    "launch.doctor.gpu.process",
    "rollout_server",
    "trainer",
    "trainer.preferences",
    "trainer.reward_model",
    "trainer.sft",
)
_INHERITED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PADDING = "WARM_START_PADDING"
_MOST_COMMAND_BYTES, _MOST_ENVIRONMENT_BYTES = 1 << 16, 1 << 16
_MOST_FILES = 64
_FIRST_KEPT = 600
"""A forked process moves its descriptors to here before it closes and places those below."""
_MESSAGE_BYTES = 1 << 18
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 37, 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_EXECUTE = inspect.signature(subprocess.Popen._execute_child)


class Nursery:
    """The asking side: a connection to a process that forks others."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def start(self, request: Mapping[str, Any], files: Mapping[int, int]) -> int:
        """Returns the process id of a new child of this process. `files`: its descriptor -> one of ours."""
        message = json.dumps(dict(request, targets=list(files), group=os.getpgrp())).encode()
        with self._lock, _adopting():
            socket.send_fds(self._connection, [message], list(files.values()))
            started = self._connection.recv(64)
        if not started:
            raise OSError("the nursery of forked processes has ended")
        return int(started)

    def close(self) -> None:
        self._connection.close()


_nursery: Nursery | None = None
"""That of this process, once it has one."""


def nursery() -> Nursery:
    """The nursery of this process; starts it at the first call."""
    global _nursery
    if _nursery is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # A process's command line and environment in /proc are where the kernel wrote them when its program
        # started; forks write their own over these.
        program = f"from {__name__} import main; main()"
        command = [sys.executable, "-c", program, str(theirs.fileno()), "x" * _MOST_COMMAND_BYTES]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", _PADDING: "x" * _MOST_ENVIRONMENT_BYTES},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        _nursery = Nursery(ours)
        atexit.register(_end, _nursery, process)
    return _nursery


def _end(ended: Nursery, process: subprocess.Popen[bytes]) -> None:
    ended.close()
    process.wait()


_started: weakref.WeakSet[Popen] = weakref.WeakSet()


def end_started() -> None:
    """Kills the forked processes of this process that still run, as after a test that failed."""
    for process in list(_started):
        if process.poll() is None:
            process.kill()
            process.wait()


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`; `python -m MODULE` and `python -c CODE` are forked from the nursery."""

    def _execute_child(self, *given: Any) -> None:
        call = _EXECUTE.bind(self, *given).arguments
        if not self._can_fork(call):
            super()._execute_child(*given)
            return
        pipes = [call[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        standard = dict(enumerate((pipes[0], pipes[3], pipes[5])))
        files = {number: number if fd == -1 else fd for number, fd in standard.items()}
        request = {
            "argv": [str(word) for word in call["args"]],
            "cwd": str(call["cwd"] or Path.cwd()),
            "environment": dict(os.environ if call["env"] is None else call["env"]),
            "session": call["start_new_session"],
            "ignored": [one for one in _INHERITED_SIGNALS if signal.getsignal(one) is signal.SIG_IGN],
            "files_limit": resource.getrlimit(resource.RLIMIT_NOFILE),
            "umask": _umask(),
        }
        try:
            self.pid = nursery().start(request, files | {fd: fd for fd in call["pass_fds"]})
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True
        _started.add(self)

    def _can_fork(self, call: Mapping[str, Any]) -> bool:
        """False for what only an exec can do, and for other programs."""
        args = call["args"]
        plain = call["preexec_fn"] is None and call["umask"] == -1 and call["process_group"] == -1
        is_python = isinstance(args, list) and args[0] == sys.executable and args[1] in ("-m", "-c")
        return (
            plain and not call["shell"] and call["executable"] is None and call["uid"] is None and is_python
        )


class _PopenInDaemons(Popen):
    """In forked processes in place of `subprocess.Popen`."""

    def _can_fork(self, call: Mapping[str, Any]) -> bool:
        has_nursery = _nursery is not None
        return has_nursery and super()._can_fork(call) and _module(call["args"]) in MODULES


def run(args: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` of a forked process."""
    timeout_s, check = options.pop("timeout", None), options.pop("check", False)
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """In the block, processes whose parent ends become children of this one, if they descend from it."""
    before = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _umask() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def serve(connection: socket.socket) -> dict[str, Any]:
    """Forks processes until the other side closes the socket; returns each one's request, in that process."""
    os.setpgid(0, 0)  # signals for the group of the process that asks are not for its nursery
    while True:
        message, files, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _MOST_FILES)
        if not message:
            os._exit(0)
        request = json.loads(message)
        reading, writing = os.pipe()
        if (intermediate := os.fork()) == 0:
            intermediate = os.getpid()
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            while os.getppid() == intermediate:
                time.sleep(0.0005)
            connection = _enter(request, files, connection)
            if connection is None:
                return request
            os.setpgid(0, 0)
            continue
        os.waitpid(intermediate, 0)  # from here on the process is a child of the one that asked
        connection.send(os.read(reading, 64))
        for fd in (reading, writing, *files):
            os.close(fd)


def _enter(
    request: Mapping[str, Any], files: Sequence[int], connection: socket.socket
) -> socket.socket | None:
    """Takes the session and the files of a new process.

    Returns None in it, and in the nursery that it starts if it has children the socket of that.
    """
    if request["session"]:
        os.setsid()
    else:
        os.setpgid(0, request["group"])
    connection.detach()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_KEPT) for fd in (*files, ours.detach(), theirs.detach())
    ]
    os.closerange(3, _FIRST_KEPT)
    *files, ours_fd, theirs_fd = kept
    is_parent = _module(request["argv"]) in _PARENTS
    if is_parent and os.fork() == 0:
        for fd in (*files, ours_fd):
            os.close(fd)
        return socket.socket(fileno=theirs_fd)
    for fd, target in zip(files, request["targets"], strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.close(theirs_fd)
    global _nursery
    _nursery = Nursery(socket.socket(fileno=ours_fd)) if is_parent else None
    if not is_parent:
        os.close(ours_fd)
    return None


def _module(argv: Sequence[str]) -> str:
    return argv[2] if argv[1] == "-m" else ""


def become(request: Mapping[str, Any]) -> None:
    """Makes this process what `python -m MODULE` is before it runs the module."""
    environment, argv = request["environment"], request["argv"]
    os.environ.clear()
    _write_over_start(argv, environment)
    os.environ.update(environment)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files_limit"]))
    is_unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _stream(1, sys.stdout, is_unbuffered=is_unbuffered)
    sys.stderr = sys.__stderr__ = _stream(2, sys.stderr, is_unbuffered=is_unbuffered)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = request["cwd"] if argv[1] == "-m" else ""
    sys.path[:] = [first, *paths, *sys.path[1:]]
    sys.orig_argv[:] = argv
    sys.argv[:] = [argv[2] if argv[1] == "-m" else "-c", *argv[3:]]
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    subprocess.Popen = _PopenInDaemons  # type: ignore[misc]
    _forget_shadowed(Path(request["cwd"]))


def _forget_shadowed(cwd: Path) -> None:
    """Removes imported packages that the working directory has under the same names: its own come first."""
    for package in ("buffer", "launch", "rollout_server", "trainer"):
        if cwd != ROOT and (cwd / package).is_dir():
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]


def _stream(fd: int, before: Any, *, is_unbuffered: bool) -> Any:
    raw = open(fd, "wb", buffering=0 if is_unbuffered else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        raw,
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=fd == 2 or os.isatty(fd),
        write_through=is_unbuffered,
    )


def _write_over_start(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Makes /proc/PID/cmdline and environ those of this process; nothing may point into the old ones."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])
    settings = [f"{key}={value}" for key, value in environment.items()]
    for start, end, words in ((arg_start, arg_end, argv), (env_start, env_end, settings)):
        data = b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)
        assert len(data) <= end - start, "more than the nursery's own, which is padded"
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)


def _run(request: Mapping[str, Any]) -> None:
    argv = request["argv"]
    if argv[1] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(argv[2], "<string>", "exec"), main.__dict__)
        return
    if not hasattr(sys.modules.get(argv[2]), "__path__"):
        sys.modules.pop(argv[2], None)
    runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


def _end_after(request: Mapping[str, Any]) -> NoReturn:
    """Runs the program, then what an interpreter does at its end except for the destruction of all modules.

    That would copy the memory shared with the nursery, for a third of a second.
    """
    code: object = 0
    try:
        _run(request)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # closed pipes
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def main() -> None:
    """The first nursery: imports what daemons import, and serves."""
    with uncollected():
        for module in (*_IMPORTED, *_USED_LATER):
            importlib.import_module(module)
        for verb in sys.modules["launch.cli"].COMMANDS:
            sys.modules["launch.cli"].parser_of(verb)
    num_threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    assert num_threads == 1, f"an import has started threads ({num_threads}): a fork would not have them"
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    become(request)
    _end_after(request)
