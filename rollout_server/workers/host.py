"""The server's end of the zygote (zygote.py): starts it, sends it orders, and notices its end.

    STARTING -> ready: READY -> lost: LOST
         `-> ready raises ConfigError (the task cannot be imported) or EnvironmentLostError

A pipe would not do: the sockets of workers are sent with the orders to start them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack

from areal_like.errors import ConfigError, EnvironmentLostError
from rollout_server.workers.zygote import MAX_PACKET_BYTES

_END_TIMEOUT_S = 1.0
"""To kill workers takes milliseconds."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Libraries that start threads when they are imported: threads do not survive a fork."""

_MARKER = "AREAL_LIKE_ENVIRONMENTS"
"""Environment variable by which the descendants of a zygote are found after its end."""


class ZygoteProcess:
    """One zygote. Create it in a running loop; `close` ends it with its workers."""

    def __init__(self, setup: Mapping[str, Any], *, on_worker_ended: Callable[[int, str], None]) -> None:
        """`setup`: its first message. `on_worker_ended`: called with a worker and how its process ended."""
        self._loop = asyncio.get_running_loop()
        self._on_worker_ended = on_worker_ended
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Why, when its socket is closed."""
        self._mark = secrets.token_hex(16)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server.workers.zygote"],
                stdin=theirs.fileno(),
                env=os.environ
                | {name: os.environ.get(name, "1") for name in _ONE_THREAD}
                | {_MARKER: self._mark},
            )
        self._control.setblocking(False)
        self._orders: deque[tuple[bytes, socket.socket | None]] = deque()
        """Orders, with the socket of the worker, that the zygote has not had room for."""
        self._loop.add_reader(self._control.fileno(), self._on_readable)
        self._control.send(msgpack.packb(dict(setup)))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fork(self, worker: int, theirs: socket.socket) -> None:
        """Orders a worker that serves the socket `theirs`. Raises EnvironmentLostError."""
        if self._control.fileno() < 0:
            raise EnvironmentLostError("the process that starts environments is gone")
        self._order(["fork", worker], theirs.dup())

    def kill(self, worker: int) -> None:
        """Orders the end of a worker."""
        if self._control.fileno() >= 0:
            self._order(["kill", worker])

    def _order(self, order: list[Any], theirs: socket.socket | None = None) -> None:
        self._orders.append((msgpack.packb(order), theirs))
        if len(self._orders) == 1:
            self._send_orders()

    def _send_orders(self) -> None:
        """Sends what the zygote has room for: hundreds of samples may start at the same time."""
        while self._orders:
            order, theirs = self._orders[0]
            try:
                socket.send_fds(self._control, [order], [] if theirs is None else [theirs.fileno()])
            except BlockingIOError:
                self._loop.add_writer(self._control.fileno(), self._send_orders)
                return
            except OSError:
                self._end()  # it is gone; its workers end with it
                return
            self._orders.popleft()
            if theirs is not None:
                theirs.close()
        self._loop.remove_writer(self._control.fileno())

    def replace(self, reason: str) -> None:
        """Gives it up; `lost` follows."""
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
        if self._process.returncode != 0:  # it was killed before it had ended what its workers have started
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
            self.ready.set_exception(ConfigError(str(message)))

    def _end(self, reason: str = "it died") -> None:
        if self._control.fileno() < 0:
            return
        if not self.lost.done():  # it is cancelled with a task that waits for it
            self.lost.set_result(reason)
        self._loop.remove_reader(self._control.fileno())
        self._loop.remove_writer(self._control.fileno())
        self._control.close()
        for _, theirs in self._orders:
            if theirs is not None:
                theirs.close()
        self._orders.clear()
        if not self.ready.done():
            self.ready.set_exception(
                EnvironmentLostError("the process that starts environments ended at its start; see the log")
            )
            self.ready.exception()  # nobody may wait for it


def _kill_marked(entry: bytes) -> None:
    """Kills the processes that have this entry in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
            if entry not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            # The process cannot be mistaken for another of the same id if it still has the entry now.
            process = os.pidfd_open(int(folder.name))
            try:
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)
