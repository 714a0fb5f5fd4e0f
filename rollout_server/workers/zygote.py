"""The process that starts workers: `python -m rollout_server.workers.zygote`.

It imports the task once and forks a worker whenever the server asks for one, which takes milliseconds and
shares the memory of the imports. It never runs a task's code itself, has one thread, and answers on the
SOCK_SEQPACKET socket that is its stdin; each packet is one msgpack message.

    server -> zygote   {"task": {...}, "seed": n, "sandbox": kind, "added": [...]}   first: the task to import
    zygote -> server   null | "error message"                         null if the task was imported
    server -> zygote   ["fork", worker, may_import]                   with the worker's socket (SCM_RIGHTS)
    server -> zygote   ["kill", worker, false]
    zygote -> server   ["ended", worker, "signal 9" | "exit code 1"]

    server -> worker   {"role": name, "options": {...}, "task": ...}  first frame: what to serve
    worker -> server   [value, error]                                 the role's first word

Only the zygote can signal a worker without a race: a process id is free for others once its parent has waited
for it. It also reports a worker's end, because a process that a task's code has forked may keep the worker's
socket open. When a worker has ended, the rest of its session and every process that it has left behind is
killed. When the server ends, the zygote does the same with all workers, and ends. If the zygote is killed
itself, its workers end with it (PDEATHSIG), and the server kills what these have started.

Neither threads nor CUDA survive a fork. So if the import of a task has started threads or has loaded torch, a
worker that may import the task (`may_import`) replaces the fork's program by its own interpreter, without the
limit to one thread that the server has added to the environment (`added`).
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
"""They reach the whole process group, but only the server ends its processes."""
_SERVE: dict[str, Callable[..., None]] = {
    "environment": environment_worker.serve,
    "reward": reward_worker.serve,
}
"""By the name of the role."""
_WORKER = "worker"
"""Argument of a worker that imports the task itself."""


def main() -> None:
    """Serves until the server closes the socket."""
    die_with_parent(signum=signal.SIGKILL)
    if sys.argv[1:] == [_WORKER]:
        serve(frames.claim_stdin(), task=None)
    else:
        run_zygote()


def serve(connection: socket.socket, *, task: Task | None) -> None:
    """Runs in a worker, until the server closes the socket. `task`: None if it is not imported."""
    setup = frames.read(lambda size: connection.recv(size, socket.MSG_WAITALL))
    try:
        task = task or _make_task(setup)
    except ConfigError as error:
        connection.sendall(frames.pack([None, str(error)]))
        return
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
    # From here on the end of the socket says that the server has ended, and there are workers to end first. A
    # zygote that is stopped notices it, too.
    die_with_parent(signum=signal.SIGCONT)
    zygote = Zygote(
        task, control, survives_fork=num_threads == 1 and "torch" not in sys.modules, added=setup["added"]
    )
    with contextlib.suppress(ConnectionError):  # the server ended while it was sent a message
        zygote.run()
    zygote.end_workers()


class Zygote:
    """Forks, kills and reaps workers."""

    def __init__(
        self, task: Task, control: socket.socket, *, survives_fork: bool, added: Sequence[str]
    ) -> None:
        """`survives_fork`: the import of the task does. `added`: names of environment variables that only
        this process needs."""
        self._task = task
        self._control = control
        self._survives_fork = survives_fork
        self._added = added
        self._pid = os.getpid()
        self._pids: dict[int, int] = {}
        """Worker -> pid, of those that are not reaped."""

    def run(self) -> None:
        """Returns when the server has closed the socket."""
        # Objects of the imports are never collected: a collection would write to their pages, and the workers
        # could no longer share them.
        gc.collect()
        gc.freeze()
        adopt_orphans()
        self._wakeup, self._wakes = socket.socketpair()
        for end in (self._wakeup, self._wakes):
            end.setblocking(False)
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
        """Does what one packet says; False at the end of the socket."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 1)
        except ConnectionError:
            return False
        if not packet:
            return False
        order, worker, may_import = msgpack.unpackb(packet)
        if order == "fork":
            self._fork(worker, descriptors[0], may_import=may_import)
        elif worker in self._pids:
            os.kill(self._pids[worker], signal.SIGKILL)
        return True

    def _fork(self, worker: int, descriptor: int, *, may_import: bool) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            self._report(worker, f"it could not be started: {error}")
            return
        if pid == 0:
            self._become_worker(descriptor, may_import=may_import)
        os.close(descriptor)
        self._pids[worker] = pid

    def _become_worker(self, descriptor: int, *, may_import: bool) -> None:
        """Runs in the worker, and does not return."""
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
                if not self._survives_fork:
                    os.dup2(descriptor, 0)
                    os.set_inheritable(descriptor, False)
                    os.execv(sys.executable, [sys.executable, "-m", "rollout_server.workers.zygote", _WORKER])
            connection = socket.socket(fileno=descriptor)
            connection.set_inheritable(False)
            serve(connection, task=self._task)
            code = 0
        except BaseException:  # of any kind: it must not reach the zygote's loop
            traceback.print_exc()
        finally:
            exit_at_once(code)

    def _reap(self) -> None:
        workers = {pid: worker for worker, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            # A process that is not waited for keeps its id, also as that of its group.
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
        """Kills what ended workers have left behind: it has become a child of this process."""
        children = Path(f"/proc/self/task/{self._pid}/children")
        with contextlib.suppress(OSError):  # a kernel without this file
            for pid in set(map(int, children.read_text().split())).difference(self._pids.values()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _report(self, worker: int, reason: str) -> None:
        message: Any = ["ended", worker, reason]
        self._control.send(msgpack.packb(message))


if __name__ == "__main__":
    main()
    sys.exit(0)
