"""The ZeroMQ sockets of an event loop: their options and limits, and the reader.

A socket is read by a reader callback of the event loop, because zmq.asyncio creates a future for each
operation.

No ZeroMQ heartbeats: libzmq 4.3.5 aborts the process when a heartbeat is due on a connection whose peer has
left and whose receive queue is full (a stopped or flooded daemon). Other mechanisms detect the same problems:

    a daemon that hangs      the application's own heartbeats and time limits: `buffer.lease_timeout_s`,
                             `BufferConnection.silent_s`, `AskAlive`
    a host that is gone      TCP keepalive (_KEEPALIVE_IDLE_S, ...), and _MAX_UNACKNOWLEDGED_S for data that
                             are not acknowledged; the connection ends, and with it the peer's routing id and
                             the messages queued for it
    a network that is back   the same on the other side: a connection that ended is made again

Queues are bounded. A peer is not read while _MAX_WAITING of its messages wait to be handled; the rest stay in
its TCP connection. At most _MAX_QUEUED messages wait for a peer that does not read; further ones are dropped
and counted, which costs no data, because every request, sample and heartbeat is sent again until the peer has
responded. Credit keeps healthy peers far below this number. The socket limits the size of a frame
(ZMQ_MAXMSGSIZE), the pump the frames and bytes of a message, and the codec the size of its header.

libzmq has an option for the size of a frame, and none for the number of a message's frames or their sum: it
keeps a message until its last frame has arrived. So who may connect bounds this memory: this machine's
processes, or holders of keys.
The pump takes no more of such a message than its limits, skips the rest without stalling the loop, and
counts it as malformed.

Control returns to the event loop after _DRAIN_S, so that HTTP requests are served during a flood. ZeroMQ
reads the peers in turn, so a peer that sends much does not delay the others by more than one message each.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

import zmq

log = logging.getLogger(__name__)

_KEEPALIVE_IDLE_S = 10
"""Idle time of a TCP connection after which the other host is probed."""
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_PROBES = 4
_MAX_UNACKNOWLEDGED_S = 30
"""A connection ends when the other host has not acknowledged sent data for this long (TCP_USER_TIMEOUT), or
has not made room for more. Ranks and servers that were stopped for longer connect again."""

_MAX_WAITING = 64
"""Received messages of one peer that may wait to be handled. The rest stay in its TCP connection, so a flood
of messages fills the sender's memory and not ours."""
_MAX_QUEUED = 1000
"""Messages that may wait to be sent to one peer. Credit keeps healthy peers far below this."""

_HANDSHAKE_S = 5.0
"""Time for a peer to complete its handshake. Until then it may be a stranger, and libzmq keeps up to
`max_message_bytes` of what it sends: the time bounds how much that can be from all strangers together."""

_DRAIN_S = 0.01
"""Time for messages in a row before other tasks of the event loop run."""


def set_io_threads(count: int) -> None:
    """Sets the number of threads that move the messages of this process. Call it before the first socket."""
    zmq.Context.instance().set(zmq.IO_THREADS, count)


def connection_socket(
    kind: int, *, max_message_bytes: int, context: zmq.Context[zmq.Socket[bytes]] | None = None
) -> zmq.Socket[bytes]:
    """A socket with the options above, not connected yet."""
    socket = (context or zmq.Context.instance()).socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, _MAX_QUEUED)
    socket.set(zmq.RCVHWM, _MAX_WAITING)
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    if kind == zmq.ROUTER:
        socket.set(zmq.HANDSHAKE_IVL, int(1000 * _HANDSHAKE_S))
    socket.set(zmq.TCP_KEEPALIVE, 1)
    socket.set(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
    socket.set(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_INTERVAL_S)
    socket.set(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_PROBES)
    socket.set(zmq.TCP_MAXRT, 1000 * _MAX_UNACKNOWLEDGED_S)
    return socket


class Pump:
    """Reads a socket from the running loop.

    OPEN -> close() -> CLOSED

    The socket's descriptor is edge-triggered and a send may consume the edge, hence the extra read after
    every send.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[bytes]], None],
        *,
        max_frames: float = math.inf,
        max_bytes: float = math.inf,
        on_excess: Callable[[bytes], None] = lambda first: None,
    ) -> None:
        """`on_excess(first frame)` is called for a message of more than `max_frames` frames, or with another
        frame after more than `max_bytes`; its other frames are skipped."""
        self._socket = socket
        self._on_frames = on_frames
        self._on_excess = on_excess
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._is_skipping = False
        """True within a message that is too large."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._drain)
        self._scheduled = False
        self._schedule()

    def send(self, frames: list[bytes]) -> None:
        """Raises zmq.ZMQError: EHOSTUNREACH without a connection to the peer, EAGAIN if its queue is full."""
        self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=True)
        self._schedule()

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        end_s = self._loop.time() + _DRAIN_S
        while self._loop.time() < end_s:
            if self._socket.closed:
                return
            try:
                if self._is_skipping:
                    self._socket.recv(flags=zmq.NOBLOCK)
                    self._is_skipping = self._has_more
                    continue
                frames = self._receive()
            except zmq.Again:
                return
            if self._is_skipping:
                self._on_excess(frames[0])
            else:
                self._on_frames(frames)
        self._schedule()

    def _receive(self) -> list[bytes]:
        """The next message; the first frames of one that is too large, which is then skipped."""
        frames = [self._first_frame()]
        num_bytes = 0
        while self._has_more:
            if len(frames) == self._max_frames or num_bytes > self._max_bytes:
                self._is_skipping = True
                break
            frames.append(self._socket.recv(flags=zmq.NOBLOCK))
            num_bytes += len(frames[-1])
        return frames

    def _first_frame(self) -> bytes:
        return self._socket.recv(flags=zmq.NOBLOCK)

    @property
    def _has_more(self) -> bool:
        return bool(self._socket.get(zmq.RCVMORE))


class KeyedPump(Pump):
    """A pump of a ROUTER with CURVE: `user_id` belongs to the message with which `on_frames` is called."""

    user_id = ""

    def _first_frame(self) -> bytes:
        route = self._socket.recv(flags=zmq.NOBLOCK, copy=False)
        self.user_id = str(route["User-Id"])
        return route.bytes


def log_at_powers_of_2(count: int, message: str, *args: object) -> None:
    """Logs at counts 1, 2, 4, 8, ...: many events must not produce as many log lines."""
    if count.bit_count() == 1:
        log.warning(message, *args, count)
