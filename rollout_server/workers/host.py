"""The worker processes of one task: starts them, stops them, and counts those that are lost.

    zygote:  STARTING -> READY -> lost: its workers end with it, and another is started
                 `-> cannot start (the task cannot be imported): tried again after a pause
    worker:  start() -> running -> end()
                           `-> lost: its process ended, a time limit, an invalid frame

Workers run a task's code, which may raise, hang, print, use all memory or end its process. They are
processes, because a thread cannot be killed and the event loop must not wait. They are forked by one process
that has imported the task (zygote.py), so a start takes milliseconds, and workers share the memory of the
import. multiprocessing is not used, because it pickles, and because an executor does not report which of its
workers hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import msgpack

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, EpisodeError, RewardError
from rollout_server.tasks.base import Task
from rollout_server.workers.worker import Worker, WorkerRole
from rollout_server.workers.zygote import MAX_PACKET_BYTES

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0
"""Time limit for the import of a task. It ends a hang: large libraries take a minute on a loaded machine."""
_FORK_TIMEOUT_S = 60.0
"""A fork takes milliseconds. A zygote none of whose workers starts within this time is considered hung."""
_FORK_CHECKS = 20
"""Number of checks in this time: if this process was suspended meanwhile, that counts only once."""
_STARTS_PER_CORE = 2
"""Maximum number of workers that start at the same time. Hundreds would slow down each other, and the
engine."""
_RESTART_DELAY_S = 1.0
"""Pause before a zygote is restarted: a broken import must not cause a busy loop."""
_END_TIMEOUT_S = 1.0
"""Time limit for a zygote to exit. Killing its workers takes milliseconds."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that keep libraries from starting threads on import, because threads do not survive a fork."""
_MARKER = "AREAL_LIKE_WORKERS"
"""Environment variable by which descendants of a zygote are found after its end."""
_ZYGOTE = "zygote"


class ZygoteError(ArealError):
    """The zygote cannot start, or is gone."""


class StartPatience:
    """Decides how long to wait for a worker's start: until no other started for `_FORK_CHECKS` checks.
    Pure."""

    def __init__(self) -> None:
        self._num_started = -1
        self._left = 0

    def goes_on(self, num_started: int) -> bool:
        """Returns False to stop waiting. `num_started`: workers of the host that have started so far."""
        if num_started != self._num_started:
            self._num_started, self._left = num_started, _FORK_CHECKS
        self._left -= 1
        return self._left > 0


class WorkerHost:
    """Starts and ends worker processes. Belongs to one event loop; runs inside `async with`."""

    def __init__(self, task: Mapping[str, Any], *, seed: int, sandbox: str = "bwrap") -> None:
        """For the arguments see `make_task`."""
        self._setup = {"task": dict(task), "seed": seed, "sandbox": sandbox}
        self._loop = asyncio.get_running_loop()
        self._zygote: ZygoteProcess | None = None
        """The zygote; None while none is ready."""
        self._problem = ""
        """Why the last zygote could not start; empty while one is starting, and if it started."""
        self._is_settled = asyncio.Event()
        """Set while there is a zygote or a problem."""
        self._workers: dict[int, Worker] = {}
        self._last_number = 0
        self._num_started = 0
        self._may_start = asyncio.Semaphore(_STARTS_PER_CORE * len(os.sched_getaffinity(0)))
        self._num_lost: Counter[str] = Counter()
        """Number of workers by role, and zygotes, that were lost to a time limit or a crash."""
        self._keeping: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, config: Config, task: Task) -> Self:
        """Creates the host for one of a job's tasks. `config.task`: its settings."""
        settings = task.settings_of_workers(config.task)
        return cls(settings, seed=config.seed, sandbox=config.rewards.sandbox)

    async def __aenter__(self) -> Self:
        self._keeping = asyncio.create_task(self._keep_zygote(), name="workers")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._keeping is not None
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        await asyncio.sleep(0)  # transports of lost workers close their sockets in the next turn of the loop

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """Tasks that end only when the host is closed, or if no process can be started."""
        return [self._keeping] if self._keeping is not None else []

    def num_restarts(self, role: WorkerRole) -> int:
        """Returns the number of workers of a role, and zygotes, lost to a time limit or a crash."""
        return self._num_lost[role.name] + self._num_lost[_ZYGOTE]

    async def imported(self) -> None:
        """Waits until the task is imported. Raises ConfigError if it cannot be imported."""
        assert self._keeping is not None
        settled = asyncio.ensure_future(self._is_settled.wait())
        await asyncio.wait({settled, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if self._keeping.done():
            self._keeping.result()  # no process can be started
        if self._problem:
            raise ConfigError(f"the task's processes cannot start: {self._problem}")

    async def start(
        self,
        role: WorkerRole,
        *,
        on_message: Callable[[Any], None] | None = None,
        on_lost: Callable[[Worker], None] | None = None,
        instead: Callable[[], Worker | None] = lambda: None,
        **options: Any,
    ) -> tuple[Worker, Any]:
        """Starts a worker; returns it once it runs, with its first message. `options`: those of the role's
        `serve`.

        `on_lost` is called once, when the worker can no longer serve. `instead`: returns another worker to
        use, if one became free while this start waited for others. Raises the role's `lost` or `failed`.
        """
        async with self._may_start:
            if (free := instead()) is not None:
                return free, None
            while (zygote := self._zygote) is None:  # it may be lost again before this task continues
                await self._is_settled.wait()
                if self._problem:
                    raise role.lost(f"no process can be started: {self._problem}")

            def lost(worker: Worker) -> None:
                self._note_lost(worker)
                if on_lost is not None:
                    on_lost(worker)

            self._last_number += 1
            worker = Worker(self._last_number, role, on_lost=lost, on_message=on_message)
            hung = role.lost(f"no process has started within {_FORK_TIMEOUT_S:g} s")
            try:
                own, theirs = socket.socketpair()
                try:
                    with theirs:
                        await self._loop.create_unix_connection(lambda: worker, sock=own)
                        self._workers[worker.number] = worker
                        zygote.fork(worker.number, theirs, may_import=role.may_import)
                    said = await self._first_message(worker, {**self._setup, "options": options}, hung)
                except BaseException:  # most likely the caller was cancelled
                    if worker.lost is hung and self._zygote is zygote:
                        zygote.replace(f"it hangs: {hung}")
                    self.end(worker)
                    own.close()
                    raise
            except (OSError, ZygoteError) as error:  # too many open files
                raise role.lost(f"no process can be started: {error}") from error
            return worker, said

    def end(self, worker: Worker) -> None:
        """Ends a worker's process at once, even during a call."""
        if self._workers.pop(worker.number, None) is not None and self._zygote is not None:
            self._zygote.kill(worker.number)
        worker.fail(f"{worker.role.process} was ended")

    async def _first_message(
        self, worker: Worker, setup: Mapping[str, Any], hung: EpisodeError | RewardError
    ) -> Any:
        """Returns a worker's first message. Loses the worker because of `hung` if no worker starts for too
        long.

        A worker is not lost just because it is slow: on a busy machine all are.
        """
        first = {**setup, "role": worker.role.name}
        started = asyncio.ensure_future(worker.call(first, timeout_s=None, timed_out=""))
        started.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may be gone
        patience = StartPatience()
        try:
            while not started.done() and worker.lost is None:
                await asyncio.wait({started}, timeout=_FORK_TIMEOUT_S / _FORK_CHECKS)
                if not started.done() and not patience.goes_on(self._num_started):
                    worker.lose(hung)
            said = await started
        finally:
            started.cancel()
        self._num_started += 1
        return said

    def _on_process_ended(self, number: int, reason: str) -> None:
        if (worker := self._workers.get(number)) is not None:
            worker.fail(f"{worker.role.process} died ({reason})")

    def _note_lost(self, worker: Worker) -> None:
        if self._workers.pop(worker.number, None) is None:
            return  # it was ended deliberately, or with the zygote
        self._num_lost[worker.role.name] += 1
        log.warning("a worker is lost: %s", worker.lost)
        if self._zygote is not None:
            self._zygote.kill(worker.number)

    async def _keep_zygote(self) -> None:
        """Keeps a zygote running."""
        while True:
            reason = "this server ends"
            zygote = ZygoteProcess(self._setup, on_worker_ended=self._on_process_ended)
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await zygote.ready
                self._zygote = zygote
                self._is_settled.set()
                reason = await zygote.lost
                log.error("the process that starts workers was lost (%s); another is started", reason)
                self._num_lost[_ZYGOTE] += 1
                self._is_settled.clear()
            except (ZygoteError, TimeoutError) as error:
                self._problem = str(error) or f"its import took longer than {_START_TIMEOUT_S:g} s"
                log.error("the task's processes cannot start: %s", self._problem)
                self._is_settled.set()
            finally:
                self._zygote = None
                zygote.close()
                workers, self._workers = self._workers, {}
                for worker in workers.values():
                    worker.lose(worker.role.lost(f"the process that starts workers was lost: {reason}"))
            await asyncio.sleep(_RESTART_DELAY_S)
            if self._problem:
                self._problem = ""
                self._is_settled.clear()


class ZygoteProcess:
    """The server's end of one zygote. Create it in a running loop; `close` ends it with its workers.

        STARTING -> ready: READY -> lost: LOST
             `-> ready raises ZygoteError

    It uses a socket and not a pipe, because the sockets of workers are sent with the orders to start them.
    """

    def __init__(self, setup: Mapping[str, Any], *, on_worker_ended: Callable[[int, str], None]) -> None:
        """`setup`: first message to it. `on_worker_ended`: called with a worker and how its process ended."""
        self._loop = asyncio.get_running_loop()
        self._on_worker_ended = on_worker_ended
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Set to the reason when its socket is closed."""
        self._mark = secrets.token_hex(16)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        added = {name: "1" for name in _ONE_THREAD if name not in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server.workers.zygote"],
                stdin=theirs.fileno(),
                env=os.environ | added | {_MARKER: self._mark},
            )
        self._control.setblocking(False)
        self._orders: deque[tuple[bytes, socket.socket | None]] = deque()
        """Orders that the zygote has not had room for, each with the worker's socket."""
        self._loop.add_reader(self._control.fileno(), self._on_readable)
        self._control.send(msgpack.packb({**setup, "added": list(added)}))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fork(self, worker: int, theirs: socket.socket, *, may_import: bool) -> None:
        """Orders the start of a worker that serves the socket `theirs`. Raises ZygoteError."""
        if self._control.fileno() < 0:
            raise ZygoteError("the process that starts workers is gone")
        self._order(["fork", worker, may_import], theirs.dup())

    def kill(self, worker: int) -> None:
        """Tells the zygote to kill a worker; does nothing if the zygote is gone."""
        if self._control.fileno() >= 0:
            self._order(["kill", worker, False])

    def _order(self, order: list[Any], theirs: socket.socket | None = None) -> None:
        self._orders.append((msgpack.packb(order), theirs))
        if len(self._orders) == 1:
            self._send_orders()

    def _send_orders(self) -> None:
        """Sends as many orders as the zygote has room for; hundreds of samples may start at the same time."""
        while self._orders:
            order, theirs = self._orders[0]
            try:
                socket.send_fds(self._control, [order], [] if theirs is None else [theirs.fileno()])
            except BlockingIOError:
                self._loop.add_writer(self._control.fileno(), self._send_orders)
                return
            except OSError:
                self._end()  # the zygote is gone; its workers end with it
                return
            self._orders.popleft()
            if theirs is not None:
                theirs.close()
        self._loop.remove_writer(self._control.fileno())

    def replace(self, reason: str) -> None:
        """Abandons the zygote; `lost` is set."""
        self._end(reason)

    def close(self) -> None:
        """Ends the process, which ends its workers first, and waits for it."""
        has_workers = self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None
        self._end()
        if has_workers:
            self._process.send_signal(signal.SIGCONT)  # it may be stopped
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_END_TIMEOUT_S)
        self._process.kill()
        self._process.wait()  # returns at once: a process cannot ignore SIGKILL
        if (
            self._process.returncode != 0
        ):  # it was killed before it had ended the processes that its workers started
            _kill_marked(f"{_MARKER}={self._mark}".encode())

    def _on_readable(self) -> None:
        try:
            packet = self._control.recv(MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._end()
            return
        message = msgpack.unpackb(packet)
        if self.ready.done():
            _, worker, reason = message
            self._on_worker_ended(worker, reason)
        elif message is None:
            self.ready.set_result(None)
        else:
            self.ready.set_exception(ZygoteError(str(message)))

    def _end(self, reason: str = "it died") -> None:
        if self._control.fileno() < 0:
            return
        if not self.lost.done():  # it is cancelled together with a task that waits for it
            self.lost.set_result(reason)
        self._loop.remove_reader(self._control.fileno())
        self._loop.remove_writer(self._control.fileno())
        self._control.close()
        for _, theirs in self._orders:
            if theirs is not None:
                theirs.close()
        self._orders.clear()
        if not self.ready.done():
            self.ready.set_exception(ZygoteError("the process that imports it ended; see the log"))
            self.ready.exception()  # retrieves it, as there may be no waiter


def _kill_marked(entry: bytes) -> None:
    """Kills all processes that have this entry in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
            if entry not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            # If the process still has the entry now, it cannot be another one that reused the id.
            process = os.pidfd_open(int(folder.name))
            try:
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)
