"""ZeroMQ sockets in an asyncio loop: `Listener` (a server's ROUTER) and `Link` (a DEALER connected to one).

Both call a handler for each message. A malformed message is counted and dropped, and never raises. The
sockets are read by a reader callback of the event loop, because zmq.asyncio creates a future for each
operation.

Send queues have no limit of their own, because credit bounds them: a server sends at most its leased samples,
and a rank fetches one group at a time, so no message has to be dropped. A peer that ignores credit is limited
on the receiving side: its connection is not read while _MAX_WAITING of its messages wait to be handled, and
the socket limits the size of a message (ZMQ_MAXMSGSIZE).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from areal_like.errors import (
    ArealError,
    ConfigError,
    DeadlineError,
    PeerLostError,
    RefusedError,
    RunFinishedError,
    WireError,
    WireVersionError,
)
from areal_like.wire.codec import decode, encode
from areal_like.wire.messages.hello import JobFailed, JobFinished, Refused

log = logging.getLogger(__name__)

_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000
_MAX_WAITING = 64
"""Received messages of one peer that may wait to be handled. The rest stay in its TCP connection, so a flood
of messages fills the sender's memory and not ours."""

_DRAIN_BATCH = 256
"""Messages handled in a row before other tasks of the event loop run."""

_MAX_VERSION_REFUSALS = 16
"""Refusals sent to one peer with another wire version. Credit does not bound them, and a peer that never
reads must not fill our memory."""
_MAX_REFUSED_PEERS = 1024
"""Peers for which refusals are counted; with more peers all counts are reset."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One received message."""

    peer: bytes
    """Routing id of the sender (empty on a Link)."""
    rid: int
    """Request id for the reply; 0 if none is expected."""
    message: Any
    num_bytes: int
    """Size of all frames, including the routing id."""


def _socket(kind: int, *, max_message_bytes: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, _MAX_WAITING)
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    return socket


class _Pump:
    """Reads a socket from the running loop.

    OPEN -> close() -> CLOSED

    The socket's descriptor is edge-triggered and a send may consume the edge, hence the extra read after
    every send.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._drain)
        self._scheduled = False
        self._schedule()

    def send(self, frames: list[bytes]) -> None:
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
        for _ in range(_DRAIN_BATCH):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frames(frames)
        self._schedule()


class Listener:
    """A bound ROUTER.

    `handler(envelope)` runs in the loop for each well-formed message; `num_bad_frames` counts malformed ones.
    Raises ConfigError if the address cannot be bound; the error message names `setting`, the port's key in
    the configuration.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        handler: Callable[[Envelope], None],
        max_message_bytes: int,
        setting: str = "port",
    ) -> None:
        self._handler = handler
        self.num_bad_frames = 0
        self._num_refusals: Counter[bytes] = Counter()
        socket = _socket(zmq.ROUTER, max_message_bytes=max_message_bytes)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        if ":" in host:
            socket.set(zmq.IPV6, 1)
        try:
            socket.bind(f"tcp://{_bracket(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(
                f"cannot bind {host}:{port} ({error.strerror}): set {setting} to a free port or 0"
            ) from None
        self.port = int(socket.get_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self._pump = _Pump(socket, self._on_frames)

    def send(self, peer: bytes, message: Any, *, rid: int = 0) -> bool:
        """Queues a message for a peer. Returns False if the peer is no longer connected."""
        try:
            self._pump.send([peer, *encode(message, rid=rid)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close(self) -> None:
        """Closes the socket and discards queued messages."""
        self._pump.close()

    def _refuse_version(self, peer: bytes, reason: str) -> None:
        if len(self._num_refusals) > _MAX_REFUSED_PEERS:
            self._num_refusals.clear()
        self._num_refusals[peer] += 1
        if self._num_refusals[peer] <= _MAX_VERSION_REFUSALS:
            self.send(peer, Refused(field="wire version", reason=reason))

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message, rid = decode(frames[1:])
        except WireError as error:
            self.num_bad_frames += 1
            # Logged at counts 1, 2, 4, 8, ...: many bad frames must not produce as many log lines.
            if self.num_bad_frames.bit_count() == 1:
                log.warning("bad frame refused (%d so far): %s", self.num_bad_frames, error)
            # The peer cannot decode the refusal, but can read our wire version in its header.
            if isinstance(error, WireVersionError):
                self._refuse_version(frames[0], str(error))
            return
        self._handler(Envelope(peer=frames[0], rid=rid, message=message, num_bytes=sum(map(len, frames))))


class Link:
    """A DEALER connected to one Listener. Use it only from the event loop in which it was created.

    `handler(message)` gets every message that is not a reply. ZeroMQ reconnects by itself, so a lost peer can
    be recognized only by its silence: `last_heard_s` is the loop's clock at the last message.
    """

    def __init__(
        self, address: str, *, handler: Callable[[Any], None], max_message_bytes: int = 64 << 20
    ) -> None:
        self._handler = handler
        self._rids = itertools.count(1)
        self._pending: dict[int, tuple[Any, asyncio.Future[Any]]] = {}
        self.address = address
        self.num_bad_frames = 0
        self.last_heard_s = asyncio.get_running_loop().time()
        socket = _socket(zmq.DEALER, max_message_bytes=max_message_bytes)
        # With a fixed routing id, a TCP reconnect loses neither our registration nor replies in flight.
        socket.set(zmq.ROUTING_ID, uuid.uuid4().bytes)
        socket.set(zmq.RECONNECT_IVL, 100)
        socket.set(zmq.RECONNECT_IVL_MAX, 2_000)
        if "[" in address:
            socket.set(zmq.IPV6, 1)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(
                f"cannot connect to {address!r} ({error.strerror}): want tcp://host:port"
            ) from None
        self._pump = _Pump(socket, self._on_frames)

    def send(self, message: Any) -> None:
        """Queues a one-way message."""
        self._pump.send(encode(message))

    async def call(self, message: Any, *, timeout_s: float) -> Any:
        """Sends a request and returns its reply.

        Raises DeadlineError without a reply in time, PeerLostError when the link is closed meanwhile,
        RefusedError for `Refused`, RunFinishedError for `JobFinished`, ArealError for `JobFailed`.
        """
        rid = next(self._rids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[rid] = (message, future)
        try:
            self._pump.send(encode(message, rid=rid))
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            raise DeadlineError(
                f"{self.address} did not answer {type(message).__name__} within {timeout_s:g} s"
            ) from None
        finally:
            del self._pending[rid]
        if isinstance(reply, Refused):
            refusal = RefusedError(f"{type(message).__name__} was refused ({reply.field}): {reply.reason}")
            refusal.field = reply.field
            raise refusal
        if isinstance(reply, JobFinished):
            raise RunFinishedError("the run is finished: raise trainer.num_steps to continue it")
        if isinstance(reply, JobFailed):
            raise ArealError(reply.reason)
        return reply

    def resend_pending(self) -> None:
        """Sends every pending request again, for a receiver that restarted and lost them.

        Requests are idempotent.
        """
        for rid, (message, _) in self._pending.items():
            self._pump.send(encode(message, rid=rid))

    def close(self) -> None:
        """Closes the socket; pending calls raise PeerLostError."""
        self._pump.close()
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(PeerLostError(f"link to {self.address} was closed"))

    def _on_frames(self, frames: list[bytes]) -> None:
        self.last_heard_s = asyncio.get_running_loop().time()
        try:
            message, rid = decode(frames)
        except WireError as error:
            self.num_bad_frames += 1
            log.warning("bad frame from %s refused: %s", self.address, error)
            if isinstance(error, WireVersionError):
                for _, waiting in self._pending.values():
                    if not waiting.done():
                        waiting.set_exception(RefusedError(f"{self.address}: {error}"))
            return
        _, future = self._pending.get(rid, (None, None))
        if future is not None and not future.done():
            future.set_result(message)
        elif rid == 0:
            self._handler(message)
        else:
            log.debug("reply %s came after its request timed out", type(message).__name__)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def tcp_address(host: str, port: int) -> str:
    """`tcp://host:port`, with brackets around an IPv6 host."""
    return f"tcp://{_bracket(host)}:{port}"
