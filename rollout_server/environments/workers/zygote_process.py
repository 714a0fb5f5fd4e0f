"""The server's end of the zygote (zygote.py): starts it, sends it orders, and notices its end.

STARTING -> ready: READY -> lost: LOST
     `-> ready raises ConfigError (the task cannot be imported) or EnvironmentLostError
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from areal_like.errors import ConfigError, EnvironmentLostError
from rollout_server.environments.workers.zygote import MAX_PACKET_BYTES

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Libraries that start threads when they are imported: threads do not survive a fork."""
_END_TIMEOUT_S = 3.0
"""Longer than a zygote waits for the end of its workers."""


class ZygoteProcess:
    """One zygote. Create it in a running loop; `close` ends it and its workers."""

    def __init__(self, setup: Mapping[str, Any], *, on_worker_ended: Callable[[int, str], None]) -> None:
        """`setup`: its first message. `on_worker_ended`: called with a worker and how its process ended."""
        self._loop = asyncio.get_running_loop()
        self._on_worker_ended = on_worker_ended
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Done when its socket is closed."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout_server.environments.workers.zygote"],
                stdin=theirs.fileno(),
                env=os.environ | {name: os.environ.get(name, "1") for name in _ONE_THREAD},
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

    def kill_at_once(self) -> None:
        """Kills the process; `lost` follows."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process, and waits for its end: some milliseconds, in which it ends its workers."""
        is_serving = self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None
        self._end()
        if is_serving:
            self._process.send_signal(signal.SIGCONT)  # it may be stopped
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_TIMEOUT_S)
        self._process.kill()
        self._process.wait()  # returns at once: a process cannot ignore SIGKILL

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

    def _end(self) -> None:
        if self._control.fileno() < 0:
            return
        if not self.lost.done():  # it is cancelled with a task that waits for it
            self.lost.set_result(None)
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
