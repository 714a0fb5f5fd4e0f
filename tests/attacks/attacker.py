"""What an attacker has: sockets of his own, this project's messages, and perhaps a stolen key."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Self

import msgpack
import zmq

from areal_like.config import Config
from areal_like.failures import FailureKind
from areal_like.paths import model_path
from areal_like.security.keys import Identity
from areal_like.wire.codec import WIRE_VERSION, decode, encode
from areal_like.wire.fingerprint import (
    dataset_fingerprint,
    model_fingerprint,
    shared_settings,
    tokenizer_fingerprint,
)
from areal_like.wire.messages.hello import Hello, Role
from areal_like.wire.messages.producer import SampleDone, SampleFailed, Samples, ServerHeartbeat, ServerState
from areal_like.wire.messages.weights import FormGroup, PushChecksums, PushWeights
from areal_like.wire.records import Record
from rollout_server.tasks.base import make_task
from tests.chaos.producer import synthetic

HUGE = (1 << 63) - 1
NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""The first bytes of a ZeroMQ peer without keys."""
NULL_READY = b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
"""Its second message."""
_PIECE = b" " * (1 << 20)


class Attacker:
    """A ZeroMQ connection: without a key, or with the keys of `identity` to a server with `server_key`."""

    def __init__(
        self, address: str, *, identity: Identity | None = None, server_key: str = "", route: bytes = b""
    ) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDTIMEO, 20_000)
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

    def call(self, message: Any, *, timeout_s: float = 10.0) -> Any:
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

    def received(self, *, wait_s: float) -> list[Any]:
        """Everything that arrives until nothing has arrived for `wait_s`."""
        while found := [message for message, _ in self._receive(wait_s)]:
            self.inbox += found
        return self.inbox

    def _receive(self, wait_s: float) -> Iterator[tuple[Any, int]]:
        if self._socket.poll(round(wait_s * 1000)):
            yield decode(self._socket.recv_multipart())


def server_hello(config: Config, name: str, **changes: Any) -> Hello:
    """The hello of a rollout server of this job, with all values right."""
    task = make_task(config.task, seed=config.seed)
    fields: dict[str, Any] = {
        "role": Role.ROLLOUT,
        "name": name,
        "process": secrets.token_hex(16),
        "job": config.name,
        "model": model_fingerprint(model_path(config)),
        "tokenizer": tokenizer_fingerprint(model_path(config)),
        "dataset": dataset_fingerprint(config),
        "settings": shared_settings(config, Role.ROLLOUT),
        "http_address": "",
        "num_train_prompts": task.num_train,
        "num_eval_prompts": task.num_eval,
    }
    return Hello(**(fields | changes))


def rank_hello(config: Config, name: str = "trainer-0", **changes: Any) -> Hello:
    """The hello of a rank of this job's trainer."""
    fields = {"role": Role.TRAINER, "settings": shared_settings(config, Role.TRAINER)}
    return server_hello(config, name, **(fields | changes))


def with_long_name(hello: Hello, *, num_chars: int) -> list[bytes]:
    """The frames of a hello whose name is longer than `encode` allows."""
    body = asdict(hello) | {"role": hello.role.value, "name": "x" * num_chars}
    return [msgpack.packb([WIRE_VERSION, "Hello", 1, body])]


def heartbeat(*, free: int, version: int, leases: tuple[int, ...] = ()) -> ServerHeartbeat:
    """The heartbeat of a server that takes `free` samples."""
    return ServerHeartbeat(
        state=ServerState.SERVING,
        free_samples=free,
        holding_samples=0,
        weights_version=version,
        leases=[*leases],
    )


def forged_samples(*, ticket_id: int = 1, lease_id: int = 1) -> Samples:
    """Samples of nobody's engine, with a high reward."""
    records = [
        Record.of(ticket_id, index, synthetic(ticket_id + 6, index, num_tokens=8, version=0))
        for index in range(4)
    ]
    return Samples(samples=[SampleDone(lease_id=lease_id, record=record) for record in records])


def failure(*, lease_id: int = 1, ticket_id: int = 1, index: int = 0, kind: FailureKind) -> SampleFailed:
    """A sample that could not be made."""
    return SampleFailed(
        lease_id=lease_id,
        ticket_id=ticket_id,
        sample_index=index,
        kind=kind,
        num_tokens=0,
        error="forged",
    )


def forged_push(master_port: int) -> list[Any]:
    """What a trainer sends to a server to change its weights."""
    return [
        FormGroup(
            epoch=1,
            group_name="forged",
            master_address="127.0.0.1",
            master_port=master_port,
            rank=1,
            world_size=2,
            backend="gloo",
            timeout_s=5.0,
            secret="",
        ),
        PushWeights(
            epoch=1,
            group_name="forged",
            version=HUGE,
            step=1,
            update_mode="recompute",
            manifest={"tensors": []},
            integrity="none",
            timeout_s=5.0,
        ),
        PushChecksums(version=HUGE, checksums=[], digests=[]),
    ]


def large_messages(count: int) -> Iterator[list[bytes]]:
    """Messages of 4 MB: a header that never ends, and a frame of zeros behind a good header."""
    header = msgpack.packb([WIRE_VERSION, "Samples", 0])[:-1] + b"\x00\xdd\x00\x40\x00\x00"
    long_header = [header.ljust(4 << 20, b"\x90")]
    return itertools.islice(
        itertools.cycle([long_header, [encode(forged_samples())[0], bytes(4 << 20)]]), count
    )


def request(
    address: str, method: str, path: str, *, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of an HTTP request to `host:port`."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(1 << 20)
    finally:
        connection.close()


def bytes_accepted(address: str, path: str, *, num_bytes: int, chunked: bool, headers: dict[str, str]) -> int:
    """Bytes of a POST's body that can be sent before the server closes the connection."""
    connection = http.client.HTTPConnection(address, timeout=10)
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
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _relay(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._port), timeout=60)
            self._connections += [client, server]
            back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
            back.start()
            self._copy(client, server, record=True)
            back.join(10)

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
        self._thread.join(10)
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
