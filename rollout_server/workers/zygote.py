"""The process that starts workers: `python -m rollout_server.workers.zygote`.

It imports the task once and forks a worker whenever the server asks for one, which takes milliseconds and
shares the memory of the imports. Apart from the import it never runs a task's code. It has one thread, and
communicates over the SOCK_SEQPACKET socket that is its stdin; each packet is one msgpack message.

    server -> zygote   {"task": {...}, "seed": n, "sandbox": kind, "added": [...]}   first: the task to import
    zygote -> server   null | "error message"                         null if the task was imported
    server -> zygote   ["fork", worker, may_import]                   with the worker's socket (SCM_RIGHTS)
    server -> zygote   ["kill", worker, false]
    zygote -> server   ["ended", worker, "signal 9" | "exit code 1"]

    server -> worker   {"role": name, "options": {...}, "task": ...}  first frame: what to serve
    worker -> server   [value, error]                                 the role's first word

Only the zygote can signal a worker without a race, because a process id can be reused once the parent has
waited for it. It also reports a worker's end, because a process forked by a task's code may keep the worker's
socket open. When a worker has ended, the rest of its session and every process that it left behind are
killed. When the server ends, the zygote does the same with all workers, and exits. If the zygote itself is
killed, its workers end with it (PDEATHSIG; one that is still
starting, when its socket closes), and the server kills the processes that they started.

Neither threads nor CUDA survive a fork, and a fork next to threads that hold locks may hang before its child
can execute anything. So if the import of a task started threads or loaded torch, a worker that may import the
task (`may_import`) is a new interpreter, without the limit to one thread that the server added to the
environment (`added`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack

from areal_like.errors import ConfigError
from areal_like.runtime.process import adopt_orphans, die_with_parent, exit_at_once
from rollout_server import frames
from rollout_server.tasks.base import Task, make_task
from rollout_server.workers import environment_worker, reward_worker

log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 1 << 16
_END_TIMEOUT_S = 5.0
_SIGNALS_TO_IGNORE = (signal.SIGINT, signal.SIGTERM)
"""Signals to ignore: they reach the whole process group, but only the server may end its processes."""
_SERVE: dict[str, Callable[..., None]] = {
    "environment": environment_worker.serve,
    "reward": reward_worker.serve,
}
"""Serve functions by name of the role."""
_WORKER = "worker"
"""Command-line argument of a worker that imports the task itself."""


def main() -> None:
    """Serves until the server closes the socket."""
    die_with_parent(signum=signal.SIGKILL)
    if sys.argv[1:] == [_WORKER]:
        serve(frames.claim_stdin(), task=None)
    else:
        run_zygote()


def serve(connection: socket.socket, *, task: Task | None) -> None:
    """Serves in a worker until the server closes the socket, which may happen before its first frame.

    `task`: None if it is not imported yet.
    """
    try:
        setup = frames.read(lambda size: connection.recv(size, socket.MSG_WAITALL))
    except (EOFError, ConnectionError):
        return
    try:
        task = task or _make_task(setup)  # its own ConnectionError ends this process with a traceback
    except ConfigError as error:
        with contextlib.suppress(ConnectionError):
            connection.sendall(frames.pack([None, str(error)]))
        return
    with contextlib.suppress(EOFError, ConnectionError):
        _SERVE[setup["role"]](task, connection, **setup["options"])


def _make_task(setup: dict[str, Any]) -> Task:
    return make_task(setup["task"], seed=setup["seed"], sandbox=setup["sandbox"])


def run_zygote() -> None:
    """Starts workers until the server closes the socket."""
    for number in _SIGNALS_TO_IGNORE:
        signal.signal(number, signal.SIG_IGN)
    control = frames.claim_stdin()
    setup = frames.unpack(control.recv(MAX_PACKET_BYTES))
    try:
        task = _make_task(setup)
    except ConfigError as error:
        control.send(msgpack.packb(str(error)[: MAX_PACKET_BYTES // 8]))
        return
    control.send(msgpack.packb(None))
    num_threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if num_threads > 1:
        log.warning(
            "the task's import has started %d threads; an environment or agent that needs them may hang",
            num_threads - 1,
        )
    # From now on the end of the socket means that the server has ended, and workers must be ended first. Even
    # a suspended zygote notices that.
    die_with_parent(signum=signal.SIGCONT)
    zygote = Zygote(
        task, control, survives_fork=num_threads == 1 and "torch" not in sys.modules, added=setup["added"]
    )
    with contextlib.suppress(ConnectionError):  # the server ended while a message was being sent
        zygote.run()
    zygote.end_workers()


class Zygote:
    """Forks, kills and reaps workers."""

    def __init__(
        self, task: Task, control: socket.socket, *, survives_fork: bool, added: Sequence[str]
    ) -> None:
        """`survives_fork`: True if the import of the task survives a fork. `added`: names of environment
        variables that only this process needs."""
        self._task = task
        self._control = control
        self._survives_fork = survives_fork
        self._added = added
        self._pid = os.getpid()
        self._wakeup, self._wakes = socket.socketpair()
        for end in (self._wakeup, self._wakes):
            end.setblocking(False)
        self._pids: dict[int, int] = {}
        """Worker -> pid, for workers that are not reaped yet."""

    def run(self) -> None:
        """Serves until the server closes the socket."""
        # Imported objects are never garbage-collected: a collection would write to their pages, which workers
        # could then no longer share.
        gc.collect()
        gc.freeze()
        adopt_orphans()
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        ready = select.poll()
        for descriptor in (self._control, self._wakeup):
            ready.register(descriptor, select.POLLIN)
        while True:
            events = {descriptor for descriptor, _ in ready.poll()}
            if self._wakeup.fileno() in events:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
                self._reap()
            if self._control.fileno() in events and not self._obey():
                return

    def end_workers(self) -> None:
        """Kills all workers and what they have started."""
        self._pids.clear()  # every child is an orphan now
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline_s:
                self._kill_orphans()
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.001)

    def _obey(self) -> bool:
        """Performs the order in one packet; returns False at the end of the socket."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 1)
        except ConnectionError:
            return False
        if not packet:
            return False
        order, worker, may_import = msgpack.unpackb(packet)
        if order == "fork":
            self._start(worker, descriptors[0], may_import=may_import)
        elif worker in self._pids:
            os.kill(self._pids[worker], signal.SIGKILL)
        return True

    def _start(self, worker: int, descriptor: int, *, may_import: bool) -> None:
        try:
            if may_import and not self._survives_fork:
                pid = self._spawn(descriptor)
            elif (pid := os.fork()) == 0:
                self._become_worker(descriptor, may_import=may_import)
        except OSError as error:
            self._report(worker, f"it could not be started: {error}")
            return
        finally:
            os.close(descriptor)
        self._pids[worker] = pid

    def _spawn(self, descriptor: int) -> int:
        """Starts a new interpreter that serves the socket, and returns its pid.

        posix_spawn runs neither Python nor handlers of libraries (pthread_atfork) in the child.
        """
        os.set_inheritable(descriptor, False)  # the worker has it as its stdin only
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "rollout_server.workers.zygote", _WORKER],
            {name: value for name, value in os.environ.items() if name not in self._added},
            file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, 0)],
            setsid=True,
            setsigdef=_SIGNALS_TO_IGNORE,
        )

    def _become_worker(self, descriptor: int, *, may_import: bool) -> None:
        """Runs in the forked process and does not return."""
        code = 1
        try:
            die_with_parent(signum=signal.SIGKILL)
            if os.getppid() != self._pid:
                return
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *_SIGNALS_TO_IGNORE):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            for inherited in (self._control, self._wakeup, self._wakes):
                inherited.close()
            if may_import:
                for name in self._added:
                    os.environ.pop(name, None)
            connection = socket.socket(fileno=descriptor)
            connection.set_inheritable(False)
            serve(connection, task=self._task)
            code = 0
        except BaseException:  # no exception may reach the zygote's loop
            traceback.print_exc()
        finally:
            exit_at_once(code)

    def _reap(self) -> None:
        workers = {pid: worker for worker, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            # A process that has not been waited for keeps its id and its group's id.
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                worker = workers.get(ended.si_pid)
                if worker is not None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(ended.si_pid, signal.SIGKILL)
                _, status = os.waitpid(ended.si_pid, 0)
                if worker is not None:
                    del self._pids[worker]
                    code = os.waitstatus_to_exitcode(status)
                    self._report(worker, f"signal {-code}" if code < 0 else f"exit code {code}")
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Kills processes left behind by ended workers, which have become children of this process."""
        children = Path(f"/proc/self/task/{self._pid}/children")
        with contextlib.suppress(OSError):  # some kernels do not have this file
            for pid in set(map(int, children.read_text().split())).difference(self._pids.values()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _report(self, worker: int, reason: str) -> None:
        message: Any = ["ended", worker, reason]
        self._control.send(msgpack.packb(message))


if __name__ == "__main__":
    main()
    sys.exit(0)
