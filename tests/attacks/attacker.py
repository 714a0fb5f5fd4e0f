"""What an attacker connects with: ZeroMQ with or without a stolen key, raw TCP, HTTP."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import zmq

from areal_like.security.keys import Identity
from areal_like.wire.codec import decode, encode
from tests.support.waiting import HANG_LIMIT_S

NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""The first bytes of a ZeroMQ peer without keys."""
NULL_READY = b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
"""Its second message."""
PING = b"\x04\x07\x04PING\x00\x00"
"""A heartbeat that wants an answer."""
_MAX_UNSENT = 20
"""Messages that are lost when the attacker leaves: he waits until the others are in the connection."""
_PIECE = b" " * (1 << 20)


class Attacker:
    """A ZeroMQ connection: without a key, or with the keys of `identity` to a server with `server_key`."""

    def __init__(
        self, address: str, *, identity: Identity | None = None, server_key: str = "", route: bytes = b""
    ) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDTIMEO, 20_000)
        self._socket.set(zmq.SNDHWM, _MAX_UNSENT)
        self._socket.set(zmq.ROUTING_ID, route or secrets.token_bytes(16))
        if identity is not None:
            self._socket.set(zmq.CURVE_SERVERKEY, server_key.encode())
            self._socket.set(zmq.CURVE_PUBLICKEY, identity.public.encode())
            self._socket.set(zmq.CURVE_SECRETKEY, identity.secret.encode())
        self._socket.connect(address)
        self._rids = itertools.count(1)
        self.inbox: list[Any] = []
        """Received messages that are not the reply to `call`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Any, *, rid: int = 0) -> None:
        self.send_frames(encode(message, rid=rid))

    def send_frames(self, frames: list[bytes]) -> None:
        """Raises zmq.Again if the connection takes nothing for 20 s."""
        self._socket.send_multipart(frames)

    def try_send(self, frames: list[bytes]) -> None:
        """Sends unless the connection was refused, or takes nothing now."""
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)

    def call(self, message: Any, *, timeout_s: float = HANG_LIMIT_S) -> Any:
        """The reply; None if there is none in time."""
        rid = next(self._rids)
        self.send(message, rid=rid)
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            for received, received_rid in self._receive(left_s):
                if received_rid == rid:
                    return received
                self.inbox.append(received)
        return None

    def next_message(self, *, timeout_s: float = HANG_LIMIT_S) -> Any:
        """The next message that arrives; None if there is none in time."""
        return next((message for message, _ in self._receive(timeout_s)), None)

    def received(self, *, wait_s: float) -> list[Any]:
        """Everything that arrives until nothing has arrived for `wait_s`."""
        while found := [message for message, _ in self._receive(wait_s)]:
            self.inbox += found
        return self.inbox

    def _receive(self, wait_s: float) -> Iterator[tuple[Any, int]]:
        if self._socket.poll(round(wait_s * 1000)):
            yield decode(self._socket.recv_multipart())


def request(
    address: str, method: str, path: str, *, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of an HTTP request to `host:port`."""
    connection = http.client.HTTPConnection(address)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(1 << 20)
    finally:
        connection.close()


def bytes_accepted(address: str, path: str, *, num_bytes: int, chunked: bool, headers: dict[str, str]) -> int:
    """Bytes of a POST's body that can be sent before the server closes the connection."""
    connection = http.client.HTTPConnection(address)
    connection.putrequest("POST", path)
    name, value = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(num_bytes))
    for key, text in (headers | {name: value}).items():
        connection.putheader(key, text)
    num_sent = 0
    try:
        connection.endheaders()
        while num_sent < num_bytes:
            connection.send(b"100000\r\n" + _PIECE + b"\r\n" if chunked else _PIECE)
            num_sent += len(_PIECE)
    except OSError:
        pass
    finally:
        connection.close()
    return num_sent


def exchange(port: int, sent: bytes, *, wait_s: float) -> bytes:
    """Sends raw bytes over TCP; returns what arrives until the server closes, or is silent for `wait_s`."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=wait_s)
    with connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def leave_with_pings(port: int) -> None:
    """Sends more small messages than a queue holds and heartbeats behind them, then resets the connection.

    In libzmq 4.3.5 this ends a process that has accepted the connection.
    """
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            connection.sendall(NULL_GREETING + NULL_READY)
            time.sleep(0.05)
            connection.sendall(b"\x00\x01x" * 2600 + 3 * PING)
            time.sleep(0.003)


class Tap:
    """A relay between one client and a server, which records what the client sends."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sent = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._relay, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._thread.join()
        assert not self._thread.is_alive()

    def _relay(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._port))
            self._connections += [client, server]
            back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
            back.start()
            self._copy(client, server, record=True)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket, *, record: bool = False) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if record:
                    self.sent += piece
                target.sendall(piece)


class Trap:
    """A listening socket whose address the attacker gives to others; it keeps what they send."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port = int(self._listener.getsockname()[1])
        self.heard: list[bytes] = []
        """What each connection has sent."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()
        assert not self._thread.is_alive()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                connection.sendall(NULL_GREETING[:12] + b"CURVE".ljust(20, b"\0") + b"\x01" + bytes(31))
                number = len(self.heard)
                self.heard.append(b"")
                while piece := connection.recv(1 << 16):
                    self.heard[number] += piece
