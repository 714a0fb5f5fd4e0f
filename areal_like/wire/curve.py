"""Encryption and authentication of ZeroMQ connections: CURVE, with ZAP deciding which keys may connect.

`CurveServer` belongs to a `Listener`. It responds to libzmq's ZAP requests in the daemon's own event loop, so
it cannot end while the daemon keeps running, and each listener has its own zmq.Context, because libzmq knows
one ZAP handler for each context. The User-Id that it gives to a connection is the peer's public key and the
name of that key; every message carries it, so a key can be refused on a connection that is already open.

`CurveClient` belongs to a `Link`. It chooses which key to expect of the server, and reopens the socket after
a failed handshake (libzmq does not if the server refused the key) and when keys have changed:

    CONNECTING -> handshake -> CONNECTED -> (own key renewed, server's key revoked) -> CONNECTING
        `-> handshake failed -> after a pause: CONNECTING, expecting the server's next possible key

Left out: a limit on handshakes per address, because every peer may be behind one address.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import uuid
from collections.abc import Callable, Collection

import zmq
from zmq.utils import z85

from areal_like.errors import ArealError, ConfigError
from areal_like.security.keyring import PUBLIC_LENGTH, Keyring
from areal_like.security.keys import AllowedKey, KeyRole
from areal_like.wire.pump import Pump, log_at_powers_of_2

log = logging.getLogger(__name__)

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"areal"
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_MAX_ANSWERS, _MAX_ANSWERED_KEYS = 16, 1024
_BIND_AGAIN_S = 0.02
_BIND_TIMEOUT_S = 10.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 0.5


class _Monitor:
    """Calls `on_event` with events of a socket's connections. Close it before the socket."""

    def __init__(self, socket: zmq.Socket[bytes], events: int, on_event: Callable[[int], None]) -> None:
        address = f"inproc://monitor-{uuid.uuid4().hex}"
        socket.monitor(address, events)
        pair = socket.context.socket(zmq.PAIR)
        # libzmq's I/O thread blocks while it cannot send an event, and so do all connections. So the queue
        # has no limit, and it exists until the socket sends no more events.
        pair.set(zmq.RCVHWM, 0)
        pair.set(zmq.LINGER, 0)
        pair.connect(address)
        self._socket = socket
        self._pump = Pump(pair, lambda frames: on_event(struct.unpack_from("=H", frames[0])[0]))

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.monitor(None, 0)
        self._pump.close()


class CurveServer:
    """CURVE authentication for one Listener: which keys connect, and whose messages are accepted."""

    def __init__(
        self, keyring: Keyring, *, roles: Collection[KeyRole], on_failure: Callable[[ArealError], None]
    ) -> None:
        """Only keys of `roles` may connect. `on_failure` ends the daemon when it can no longer listen."""
        self._keyring = keyring
        self._roles = frozenset(roles)
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._socket: zmq.Socket[bytes] | None = None
        self._endpoint = ""
        self._is_unbound = False
        """True while the socket is bound again with a renewed key."""
        self._zap: Pump | None = None
        self._monitor: _Monitor | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._identity = keyring.identity
        self._num_answered: dict[str, int] = {}
        self.num_refused_handshakes = 0
        """Connections that were refused: no key, an unknown key, or no CURVE."""
        self.num_refused_frames = 0
        """Messages that were refused because of their sender's key."""
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(
            io_threads=int(zmq.Context.instance().get(zmq.IO_THREADS))
        )
        """Context of the listener's socket."""

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Makes a socket of `context` accept only allowed keys. Call it before the socket is bound."""
        self._socket = socket
        zap = self.context.socket(zmq.ROUTER)
        zap.set(zmq.LINGER, 0)
        zap.bind(_ZAP_ADDRESS)
        self._zap = Pump(zap, self._answer_or_fail)
        self._monitor = _Monitor(socket, _FAILED, self._on_failed_handshake)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self._identity.secret.encode())
        socket.set_string(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.decode())
        # Without this, libzmq admits everyone while nothing responds to its ZAP requests.
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def bound(self) -> None:
        """Records the bound endpoint and starts following key changes. Call it after the socket is bound."""
        assert self._socket is not None
        self._endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._unsubscribe = self._keyring.subscribe(self._on_refresh)

    def sender(self, user_id: str) -> AllowedKey | None:
        """The key of a message's sender; None if it is no longer valid. Counts refused messages."""
        key = self._keyring.sender(user_id[:PUBLIC_LENGTH])
        if key is None or key.role not in self._roles:
            self.count_refused_frame(f"the key {user_id[PUBLIC_LENGTH:]!r} is revoked or has expired")
            return None
        return key

    def may_answer(self, user_id: str) -> bool:
        """True for the first few refused messages of each key; later ones get no reply, so that replies
        cannot pile up."""
        while len(self._num_answered) >= _MAX_ANSWERED_KEYS and user_id not in self._num_answered:
            del self._num_answered[next(iter(self._num_answered))]
        self._num_answered[user_id] = self._num_answered.get(user_id, 0) + 1
        return self._num_answered[user_id] <= _MAX_ANSWERS

    def is_replaced(self, user_id: str) -> bool:
        """True if the sender's key has expired because a newer one has replaced it."""
        name = user_id[PUBLIC_LENGTH:]
        return any(self._keyring.is_named(name, role) for role in self._roles)

    def count_refused_frame(self, reason: str) -> None:
        """Counts a message that was refused because of its sender's key, and logs some of them."""
        self.num_refused_frames += 1
        log_at_powers_of_2(self.num_refused_frames, "message refused: %s (%d so far)", reason)

    def stop(self) -> None:
        """Stops admitting peers. Call it before the socket is closed, and `context.term()` after that."""
        self._unsubscribe()
        self._unsubscribe = lambda: None
        for part in (self._monitor, self._zap):
            if part is not None:
                part.close()
        self._monitor = self._zap = self._socket = None

    def _answer_or_fail(self, frames: list[bytes]) -> None:
        try:
            self._on_zap_request(frames)
        except Exception as error:  # the loop would only log it, and no peer could connect any more
            self._on_failure(ArealError(f"keys cannot be checked any more: {error!r}"))

    def _on_zap_request(self, frames: list[bytes]) -> None:
        # [route, "", version, request id, domain, address, routing id, mechanism, public key]
        if len(frames) != 9 or frames[7] != b"CURVE" or len(frames[8]) != 32:
            self._answer_zap(frames, status=b"400", text=b"CURVE only")
            return
        public = str(z85.encode(frames[8]).decode())  # type: ignore[no-untyped-call]
        key = self._keyring.sender(public)
        if key is None or key.role not in self._roles:
            if (self.num_refused_handshakes + 1).bit_count() == 1:
                whose = "an unknown key" if key is None else f"the key {key.name} of role {key.role.value}"
                log.warning("a connection from %s with %s was refused", _printable(frames[5]), whose)
            self._answer_zap(frames, status=b"400", text=b"key refused")
            return
        self._answer_zap(frames, status=b"200", text=b"OK", user_id=(public + key.name).encode())

    def _answer_zap(self, frames: list[bytes], *, status: bytes, text: bytes, user_id: bytes = b"") -> None:
        assert self._zap is not None
        self._zap.send([*frames[:4], status, text, user_id, b""])

    def _on_failed_handshake(self, event: int) -> None:
        self.num_refused_handshakes += 1
        if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            log_at_powers_of_2(
                self.num_refused_handshakes,
                "a connection without a key, or to another key than this daemon's, was refused (%d so far)",
            )

    def _on_refresh(self) -> None:
        if self._keyring.identity == self._identity or self._socket is None:
            return
        self._identity = self._keyring.identity
        # libzmq copies a socket's options when it is bound. Unbinding closes the open connections: the peers
        # reconnect, and resend what was lost, as after a restart of this daemon.
        self._socket.set(zmq.CURVE_SECRETKEY, self._identity.secret.encode())
        if not self._is_unbound:  # otherwise `_bind_again` of the renewal before this one binds it
            self._is_unbound = True
            self._socket.unbind(self._endpoint)
            self._bind_again(until_s=self._loop.time() + _BIND_TIMEOUT_S)

    def _bind_again(self, *, until_s: float) -> None:
        if self._socket is None or self._socket.closed:
            return
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            # libzmq closes the old socket in its own thread, some time after `unbind` has returned.
            if self._loop.time() < until_s:
                self._loop.call_later(_BIND_AGAIN_S, lambda: self._bind_again(until_s=until_s))
                return
            self._on_failure(
                ArealError(f"cannot bind {self._endpoint} again with the renewed key: {error.strerror}")
            )
            return
        self._is_unbound = False
        log.info("listening at %s with the renewed key", self._endpoint)


class CurveClient:
    """CURVE authentication for one Link: the key to expect of the server, and when to reopen the socket."""

    def __init__(self, keyring: Keyring, *, role: KeyRole, name: str = "") -> None:
        """The server must have a valid key of `role`, and of `name` if it is not empty.

        Raises ConfigError if there is none.
        """
        self._keyring = keyring
        self._role = role
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._address = ""
        self._identity = keyring.identity
        self._server_key = ""
        self._num_failures = 0
        """Failed handshakes since the last successful one."""
        self._monitor: _Monitor | None = None
        self._reopening: asyncio.TimerHandle | None = None
        self._reopen: Callable[[], None] = lambda: None
        self._unsubscribe: Callable[[], None] = lambda: None
        if not keyring.candidates(role, name=name):
            raise ConfigError(
                f"{keyring.directory.path}: public.json has no valid key of role {role.value}"
                + (f" with the name {name!r}" if name else "")
            )

    def start(self, address: str, *, reopen: Callable[[], None]) -> None:
        """Calls `reopen` when the Link has to reopen its socket; `address` is for messages."""
        self._address, self._reopen = address, reopen
        self._unsubscribe = self._keyring.subscribe(self._on_refresh)

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Sets the keys of a socket that is not connected yet, and watches its handshakes."""
        # Without a valid key of the server the handshake must fail: a key without a secret ensures that.
        candidates = self._keyring.candidates(self._role, name=self._name) or [_unusable_key()]
        self._server_key = _turn(candidates, self._num_failures)
        self._identity = self._keyring.identity
        socket.set(zmq.CURVE_SERVERKEY, self._server_key.encode())
        socket.set(zmq.CURVE_PUBLICKEY, self._identity.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, self._identity.secret.encode())
        self._monitor = _Monitor(socket, _FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED, self._on_event)

    def close(self) -> None:
        """Stops watching."""
        self._unsubscribe()
        self._unsubscribe = lambda: None
        self.stop()

    def stop(self) -> None:
        """Stops watching the current socket. Call it before the socket is closed."""
        if self._reopening is not None:
            self._reopening.cancel()
            self._reopening = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if self._num_failures:
                log.info("connected to %s", self._address)
            self._num_failures = 0
            return
        if self._reopening is not None:  # libzmq retries some handshakes by itself
            return
        self._num_failures += 1
        if self._num_failures.bit_count() == 1:
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                why = (
                    f"it refuses this daemon's key {self._identity.name!r}: "
                    "is that key in the public.json of its machine?"
                )
            else:
                why = f"it does not have the expected key of role {self._role.value}, or has ended"
            log.warning("no connection to %s (%d attempts): %s", self._address, self._num_failures, why)
        pause_s = min(_PAUSE_S * 2 ** min(self._num_failures - 1, 8), _LONGEST_PAUSE_S)
        self._reopening = self._loop.call_later(pause_s, self._reopen_with_new_keys)

    def _reopen_with_new_keys(self) -> None:
        self._reopening = None
        self._keyring.refresh()
        if self._monitor is not None:
            self._reopen()

    def _on_refresh(self) -> None:
        is_outdated = (
            self._keyring.identity != self._identity or self._keyring.sender(self._server_key) is None
        )
        if is_outdated and self._reopening is None:
            self._reopening = self._loop.call_later(0, self._reopen_now)

    def _reopen_now(self) -> None:
        self._reopening = None
        self._num_failures = 0
        if self._monitor is not None:
            self._reopen()


def _turn(candidates: list[str], attempt: int) -> str:
    """Alternate attempts use the newest key (the first candidate); those in between cycle through the
    others."""
    newest, *older = candidates
    return older[attempt // 2 % len(older)] if older and attempt % 2 else newest


def _unusable_key() -> str:
    return zmq.curve_keypair()[0].decode()


def _printable(address: bytes) -> str:
    return address[:64].decode("ascii", "replace")
