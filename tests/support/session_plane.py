"""The HTTP plane of sessions in a thread, with the policy of `SessionServer` behind it, and raw requests."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from areal_like.config import from_mapping
from areal_like.http.access import Reason
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.http.elsewhere import Elsewhere, Find
from rollout_server.sessions.http.plane import SessionPlane
from tests.support.keys import keyring
from tests.support.session_server import MAX_CONTEXT, SessionServer

CHAT = b'{"messages": [{"role": "user", "content": "hi"}]}'
MAX_BODY_BYTES = 1 << 20


class PlaneServer(SessionServer):
    """A plane with both listeners. `keys`: the job's directory of keys, if it has any."""

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        keys: Path | None = None,
        find: Find | None = None,
    ) -> None:
        """`find`: says where other sessions are; None: there are none."""
        super().__init__()
        self._find = find
        self.refused: Counter[Reason] = Counter()
        self.keyring: Keyring | None = None if keys is None else keyring(keys, KeyRole.ROLLOUT)
        self._config = from_mapping(
            {"security": {"keys": "" if keys is None else str(keys)}, **(settings or {})}
        )
        self.plane: SessionPlane

    @contextlib.contextmanager
    def serving(self) -> Iterator[Self]:
        """Until the end of the block. Raises ConfigError as `SessionPlane.start`."""
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()

        async def make() -> None:
            find = self._find
            app = session_app(
                self.book,
                model="policy",
                max_context=MAX_CONTEXT,
                idle_timeout_s=60.0,
                has_routers=True,
                elsewhere=None
                if find is None
                else lambda app: Elsewhere(app=app, book=self.book, name="rollout-1", find=find),
            )
            self.plane = SessionPlane(
                config=self._config,
                app=app,
                book=self.book,
                keyring=self.keyring,
                index=1,
                needs_external=True,
                max_body_bytes=MAX_BODY_BYTES,
                on_refused=lambda reason: self.refused.update([reason]),
            )
            await self.plane.start()

        try:
            self.run(make())
            yield self
        finally:
            self.policy.open.set()
            self.run(self.plane.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def port_of(self, *, external: bool) -> int:
        """Of one listener."""
        return int((self.plane.external_url if external else self.plane.internal_url).rpartition(":")[2])

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        external: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """One request on a connection of its own: status, JSON, headers in lower case."""
        port = self.port_of(external=external)
        connection = (
            http.client.HTTPConnection("127.0.0.1", port)
            if tls is None
            else http.client.HTTPSConnection("127.0.0.1", port, context=tls)
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content), {k.lower(): v for k, v in response.getheaders()}


def talk(port: int, *pieces: bytes) -> bytes:
    """Sends raw bytes; returns all that comes back until the server closes, empty after a reset."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
        return received


def read_request(connection: socket.socket) -> None:
    """Reads a whole request. A connection that is closed with unread bytes is reset, and its client may lose
    the response."""
    with connection.makefile("rb") as file:
        num_bytes = 0
        while (line := file.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                num_bytes = int(value)
        file.read(num_bytes)


async def get_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """The next answer of a connection: status, headers in lower case, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body
