"""ZeroMQ sockets in an asyncio loop: `Listener` (a server's ROUTER) and `Link` (a DEALER connected to one).

Both call a handler for each message. A malformed message is counted and dropped, and never raises. The
sockets and their limits are those of `pump.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

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
from areal_like.security.keys import AllowedKey
from areal_like.wire.codec import MAX_ROUTES, decode, encode, read_prefix
from areal_like.wire.curve import CurveClient, CurveServer
from areal_like.wire.messages.hello import JobFailed, JobFinished, Refused
from areal_like.wire.pump import KeyedPump, Pump, connection_socket, log_at_powers_of_2

log = logging.getLogger(__name__)

_Value = TypeVar("_Value", int, float)
_ALLOWED = 16
"""Malformed frames that are read before a peer is muted; those of another wire version get a refusal."""
_MAX_FRAMES = 3 + MAX_ROUTES
"""Frames of a message: the sender's routing id, the header, the data, and routes."""
_MUTED_S = 10.0
_MAX_PEERS = 1024
"""Peers that are remembered; the one that was added first is forgotten first."""


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
    key: AllowedKey | None = None
    """Key of the sender, checked for this very message; None without keys."""


class BadPeers:
    """Mutes peers that send malformed frames: after a few of them, a peer's frames are not read for a while.

        READ -> _ALLOWED bad frames -> MUTED for _MUTED_S -> READ

    A daemon of another wire version gets a readable refusal for each of its first frames, and a flood of
    malformed frames costs no more than receiving it. Only malformed frames count, so no daemon of this
    release is muted. The clock is an argument.
    """

    def __init__(self) -> None:
        self._num_bad: dict[bytes, int] = {}
        self._muted_until_s: dict[bytes, float] = {}

    def is_muted(self, peer: bytes, *, now_s: float) -> bool:
        """True if this peer's frames are to be dropped unread."""
        until_s = self._muted_until_s.get(peer)
        if until_s is None:
            return False
        if now_s < until_s:
            return True
        del self._muted_until_s[peer]
        return False

    def record(self, peer: bytes, *, now_s: float) -> None:
        """Counts a malformed frame."""
        num_bad = self._num_bad.pop(peer, 0) + 1
        if num_bad < _ALLOWED:
            _put(self._num_bad, peer, num_bad)
        else:
            _put(self._muted_until_s, peer, now_s + _MUTED_S)


def _put(entries: dict[bytes, _Value], peer: bytes, value: _Value) -> None:
    while len(entries) >= _MAX_PEERS:
        del entries[next(iter(entries))]
    entries[peer] = value


class Listener:
    """A bound ROUTER.

    `handler(envelope)` runs in the loop for each well-formed message; `num_bad_frames` counts malformed ones,
    and those of a peer that is muted because it sent many (`BadPeers`).
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        handler: Callable[[Envelope], None],
        max_message_bytes: int,
        setting: str = "port",
        accepts: Collection[type] | None = None,
        screen: Callable[[bytes, type], bool] | None = None,
        on_malformed: Callable[[bytes, str], None] = lambda peer, what: None,
        curve: CurveServer | None = None,
    ) -> None:
        """`accepts`: the message types that peers may send; others are malformed. None: all.

        `screen(peer, type)` is called before a message is decoded; False drops it. `on_malformed(peer, what)`
        is called for each frame that is read and cannot be decoded. `curve`: only peers with an allowed key
        connect. Raises ConfigError if the address cannot be bound; the error message names `setting`, the
        port's key in the configuration.
        """
        self._handler = handler
        self._accepts = accepts
        self._screen = screen
        self._on_malformed = on_malformed
        self._bad_peers = BadPeers()
        self._clock = asyncio.get_running_loop().time
        self.num_bad_frames = 0
        self.num_dropped = 0
        """Number of messages that were dropped because the peer did not read earlier ones."""
        self._curve = curve
        context = None if curve is None else curve.context
        socket = connection_socket(zmq.ROUTER, max_message_bytes=max_message_bytes, context=context)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        if ":" in host:
            socket.set(zmq.IPV6, 1)
        if curve is not None:
            curve.protect(socket)
        try:
            socket.bind(f"tcp://{_bracket(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            if curve is not None:
                curve.stop()
            socket.close()
            raise ConfigError(
                f"cannot bind {host}:{port} ({error.strerror}): set {setting} to a free port or 0"
            ) from None
        self.port = int(socket.get_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        # A sample's record and its routes, each in a frame.
        limits: dict[str, Any] = {
            "max_frames": _MAX_FRAMES,
            "max_bytes": 2 * max_message_bytes,
            "on_excess": lambda peer: self._count_bad(peer, "a message with too many frames or bytes"),
        }
        if curve is None:
            self._pump = Pump(socket, self._on_frames, **limits)
        else:
            self._pump = self._keyed_pump(socket, curve, limits)

    def send(self, peer: bytes, message: Any, *, rid: int = 0) -> bool:
        """Queues a message for a peer.

        Returns False if the peer is no longer connected, or does not read its messages.
        """
        try:
            self._pump.send([peer, *encode(message, rid=rid)])
        except zmq.Again:
            self.num_dropped += 1
            log_at_powers_of_2(
                self.num_dropped, "a peer does not read: %s dropped (%d so far)", type(message).__name__
            )
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    @property
    def num_refused_handshakes(self) -> int:
        """Connections that were refused for lack of an allowed key; 0 without keys."""
        return 0 if self._curve is None else self._curve.num_refused_handshakes

    @property
    def num_refused_frames(self) -> int:
        """Messages that were refused because of their sender's key; 0 without keys."""
        return 0 if self._curve is None else self._curve.num_refused_frames

    def count_refused_frame(self, reason: str) -> None:
        """Counts a message that the handler refused because of its sender's key."""
        if self._curve is not None:
            self._curve.count_refused_frame(reason)

    def close(self) -> None:
        """Closes the socket and discards queued messages."""
        if self._curve is not None:
            self._curve.stop()
        self._pump.close()
        if self._curve is not None:
            self._curve.context.term()

    def _keyed_pump(self, socket: zmq.Socket[bytes], curve: CurveServer, limits: dict[str, Any]) -> Pump:
        def on_frames(frames: list[bytes]) -> None:
            key = curve.sender(pump.user_id)
            if key is not None:
                self._on_frames(frames, key)
            # A peer whose key was renewed is about to connect with the new one: without a refusal it waits.
            elif not curve.is_replaced(pump.user_id) and curve.may_answer(pump.user_id):
                self.send(frames[0], Refused(field="key", reason="this key was revoked or has expired"))

        curve.bound()
        pump = KeyedPump(socket, on_frames, **limits)
        return pump

    def _on_frames(self, frames: list[bytes], key: AllowedKey | None = None) -> None:
        peer = frames[0]
        if self._bad_peers.is_muted(peer, now_s=self._clock()):
            self.num_bad_frames += 1
            return
        try:
            prefix = read_prefix(frames[1:])
            if self._accepts is not None and prefix.kind not in self._accepts:
                raise WireError(f"{prefix.tag} is not for this socket")
            if self._screen is not None and not self._screen(peer, prefix.kind):
                return
            message, rid = decode(frames[1:], prefix)
        except WireError as error:
            self._count_bad(peer, str(error))
            # The peer cannot decode the refusal, but can read our wire version in its header.
            if isinstance(error, WireVersionError):
                self.send(peer, Refused(field="wire version", reason=str(error)))
            return
        num_bytes = sum(map(len, frames))
        self._handler(Envelope(peer=peer, rid=rid, message=message, num_bytes=num_bytes, key=key))

    def _count_bad(self, peer: bytes, what: str) -> None:
        self.num_bad_frames += 1
        self._bad_peers.record(peer, now_s=self._clock())
        log_at_powers_of_2(self.num_bad_frames, "bad frame refused: %s (%d so far)", what)
        self._on_malformed(peer, what)


class Link:
    """A DEALER connected to one Listener. Use it only from the event loop in which it was created.

    `handler(message)` gets every message that is not a reply. ZeroMQ reconnects by itself, so a lost peer can
    be recognized only by the absence of messages: `last_heard_s` is the loop's clock at the last message.
    """

    def __init__(
        self,
        address: str,
        *,
        handler: Callable[[Any], None],
        max_message_bytes: int = 64 << 20,
        curve: CurveClient | None = None,
    ) -> None:
        """With `curve` the socket is reopened when keys change; `reopened` is then called.

        Pending requests are sent again; one-way messages of both sides may be lost. Raises ConfigError for a
        malformed address.
        """
        self._handler = handler
        self._rids = itertools.count(1)
        self._pending: dict[int, tuple[Any, asyncio.Future[Any]]] = {}
        self._is_closed = False
        self.address = address
        self.num_bad_frames = 0
        self.num_dropped = 0
        """Messages that were not sent, because the peer did not read the ones before."""
        self.last_heard_s = asyncio.get_running_loop().time()
        self._max_message_bytes = max_message_bytes
        # With a fixed routing id, a TCP reconnect loses neither our registration nor replies in flight.
        self._routing_id = uuid.uuid4().bytes
        self._curve = curve
        if curve is not None:
            curve.start(address, reopen=self._reopen)
        self._pump = self._open()

    def _open(self) -> Pump:
        socket = connection_socket(zmq.DEALER, max_message_bytes=self._max_message_bytes)
        socket.set(zmq.ROUTING_ID, self._routing_id)
        socket.set(zmq.RECONNECT_IVL, 100)
        socket.set(zmq.RECONNECT_IVL_MAX, 2_000)
        if "[" in self.address:
            socket.set(zmq.IPV6, 1)
        if self._curve is not None:
            self._curve.protect(socket)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            if self._curve is not None:
                self._curve.close()
            socket.close()
            raise ConfigError(
                f"cannot connect to {self.address!r} ({error.strerror}): want tcp://host:port"
            ) from None
        return Pump(socket, self._on_frames)

    def _reopen(self) -> None:
        if self._is_closed:
            return
        if self._curve is not None:
            self._curve.stop()
        self._pump.close()
        self._pump = self._open()
        self.resend_pending()
        self.reopened()

    def reopened(self) -> None:
        """Called when the socket was reopened; one-way messages of both sides may be lost."""

    def move(self, address: str) -> None:
        """Connects to another address, at which the peer was restarted."""
        self.address = address
        self._reopen()

    def send(self, message: Any, *, rid: int = 0) -> None:
        """Queues a message, one-way without a `rid`; drops it if the peer does not read earlier ones, or if
        the link is closed."""
        if self._is_closed:
            return
        try:
            self._pump.send(encode(message, rid=rid))
        except zmq.Again:
            self.num_dropped += 1
            log_at_powers_of_2(
                self.num_dropped,
                "%s does not read: %s dropped (%d so far)",
                self.address,
                type(message).__name__,
            )

    def new_rid(self) -> int:
        """The id of a request that may be sent several times: a late reply to any of them is its reply."""
        return next(self._rids)

    async def call(self, message: Any, *, timeout_s: float, rid: int = 0) -> Any:
        """Sends a request and returns its reply. `rid`: of `new_rid`; 0: another one.

        Raises DeadlineError without a reply in time, PeerLostError when the link is or gets closed,
        RefusedError for `Refused`, RunFinishedError for `JobFinished`, ArealError for `JobFailed`.
        """
        if self._is_closed:
            raise self._closed_error()
        rid = rid or self.new_rid()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[rid] = (message, future)
        try:
            self.send(message, rid=rid)
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            raise DeadlineError(
                f"{self.address} did not reply to {type(message).__name__} within {timeout_s:g} s"
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
            self.send(message, rid=rid)

    def close(self) -> None:
        """Closes the socket; pending calls raise PeerLostError."""
        self._is_closed = True
        if self._curve is not None:
            self._curve.close()
        self._pump.close()
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(self._closed_error())

    def _closed_error(self) -> PeerLostError:
        return PeerLostError(f"link to {self.address} was closed")

    def _on_frames(self, frames: list[bytes]) -> None:
        self.last_heard_s = asyncio.get_running_loop().time()
        try:
            message, rid = decode(frames)
        except WireError as error:
            self.num_bad_frames += 1
            log_at_powers_of_2(
                self.num_bad_frames, "bad frame from %s refused: %s (%d so far)", self.address, error
            )
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
