"""The HTTP/1.1 client of a router: a request to a rollout server, with as little work for each as it takes.

    connection = client.idle(url) or await client.connect(url)
    await connection.ask(...)    a request; returns when the response is there, or its head
    connection.give_up()         ends that with TimeoutError
    connection.release()         idle again if all is well and at its end, else closed

aiohttp's client needs five times as much CPU time for a request, and httpcore's far more than that. The
parser is that of the servers (httptools, which is llhttp), without leniency. Heads, chunk sizes and buffers
have bounds. Only connection attempts are limited in time here: whoever asks limits the rest.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import httptools

from areal_like.http.access import MAX_HEAD_BYTES
from areal_like.http.guard import Headers

CONNECT_TIMEOUT_S = 5.0
KEEP_ALIVE_S = 30.0
"""How long idle connections are kept: less than rollout servers keep theirs."""
WHOLE_BYTES = 4 << 20
"""A response of known length is whole when `ask` returns it, up to this length."""
_BUFFERED_BYTES = 1 << 17
"""Of a response that is read in pieces; more is not taken from the network."""
_OVERHEAD_PER_BODY_BYTE = 8
"""Bytes of chunk sizes for each byte of a body; chunks of one byte need five."""
_HAPPY_EYEBALLS_S = 0.25
_JOINED_BYTES = 1 << 16
"""A longer body is not copied behind its head."""
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods of requests that have no `Content-Length` without a body."""


class ConnectError(OSError):
    """There is no connection, so nothing was sent."""


class ResponseError(OSError):
    """The response broke off, or is malformed."""


@dataclass(eq=False)
class _Origin:
    """A server, by its URL."""

    host: str
    port: int
    name: bytes
    """In the header `Host`."""
    tls: ssl.SSLContext | None
    connections: set[Connection] = field(default_factory=set)
    idle: list[Connection] = field(default_factory=list)
    """Those that are not used; the one that was used last comes last."""


class ServerClient:
    """The connections to all servers. Enter it with `async with`, in the event loop."""

    def __init__(self, *, tls: ssl.SSLContext | None) -> None:
        """`tls`: for URLs with https; None: the system's certificate authorities."""
        self._tls = tls
        self._origins: dict[str, _Origin] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._sweep()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        for origin in self._origins.values():
            for connection in origin.idle:
                connection.transport.abort()

    def idle(self, url: str) -> Connection | None:
        """A connection that is not used, until `release`."""
        origin = self._origins.get(url)
        while origin is not None and origin.idle:
            if not (connection := origin.idle.pop()).transport.is_closing():
                return connection
        return None

    async def connect(self, url: str) -> Connection:
        """A new connection. Raises ConnectError."""
        origin = self._origins.get(url)
        if origin is None:
            try:
                origin = self._origins[url] = self._origin_of(url)
            except ValueError as error:
                raise ConnectError(f"{url}: {error}") from None
        made = Connection(origin)
        origin.connections.add(made)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: made,
                    origin.host,
                    origin.port,
                    ssl=origin.tls,
                    happy_eyeballs_delay=_HAPPY_EYEBALLS_S,
                )
        except BaseException as error:
            origin.connections.discard(made)
            if isinstance(error, OSError | UnicodeError):  # TimeoutError is one; a host that is no name
                raise ConnectError(f"{url}: {error or type(error).__name__}") from None
            raise
        return made

    def _origin_of(self, url: str) -> _Origin:
        parts = urlsplit(url)
        if not parts.hostname or not parts.port:
            raise ValueError("no host and port")
        tls = None
        if parts.scheme == "https":
            tls = self._tls = self._tls or ssl.create_default_context()
        return _Origin(parts.hostname, parts.port, parts.netloc.encode("ascii"), tls)

    def _sweep(self) -> None:
        """Closes connections that have been idle for long."""
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(KEEP_ALIVE_S / 2, self._sweep)
        for url, origin in list(self._origins.items()):
            while origin.idle and origin.idle[0].idle_since_s < loop.time() - KEEP_ALIVE_S / 2:
                origin.idle.pop(0).transport.abort()
            if not origin.connections:
                del self._origins[url]


class Connection(asyncio.Protocol):
    """A connection to a server, and the response to the request that was sent last."""

    transport: asyncio.Transport

    def __init__(self, origin: _Origin) -> None:
        self.idle_since_s = 0.0
        self.status = 0
        """0: no response has arrived."""
        self.headers: Headers = []
        """Names in lower case."""
        self.length: int | None = None
        """Of the body; None if the head does not say it."""
        self.is_complete = True
        self._origin = origin
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._is_usable = True
        """True if another request can be sent after the response."""
        self._is_head = False
        """True if the request has the method HEAD, whose responses have no body."""
        self._pieces: list[bytes] = []
        self._num_pending = self._num_body_bytes = self._num_other_bytes = 0
        self._is_reading = True
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def ask(self, method: str, target: bytes, *, headers: Headers, body: bytes) -> None:
        """Sends a request, and waits for the response: the whole if it says its length and is not longer than
        WHOLE_BYTES, else its head. `headers`: without those of the connection. Raises ResponseError, and
        TimeoutError after `give_up`."""
        lines = [b"%b %b HTTP/1.1" % (method.encode("ascii"), target), b"host: " + self._origin.name]
        lines += [b"%b: %b" % header for header in headers]
        if body or method not in _BODILESS:
            lines.append(b"content-length: %d" % len(body))
        head = b"\r\n".join([*lines, b"", b""])
        if not _TARGET.fullmatch(target) or not head.count(b"\n") == head.count(b"\r") == len(lines) + 1:
            raise ValueError("a target or a header has characters of another request")
        self._is_head = method == "HEAD"
        self.status, self.headers, self.length = 0, [], None
        self._pieces, self._num_pending, self._num_body_bytes, self._num_other_bytes = [], 0, 0, 0
        self.is_complete = self._is_usable = False
        if len(body) <= _JOINED_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        while not self.is_complete and (not self.status or self._is_short or self._error):
            await self._more()

    async def pieces(self) -> AsyncIterator[bytes]:
        """What arrives of the body. Raises as `ask`."""
        while self._pieces or not self.is_complete:
            if self._pieces:
                yield self.content()
            else:
                await self._more()

    def content(self) -> bytes:
        """What has arrived of the body and was not taken yet."""
        pieces, self._pieces, self._num_pending = self._pieces, [], 0
        if not self._is_reading:
            self._is_reading = True
            self.transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def give_up(self) -> None:
        """Ends the wait for more of the response with TimeoutError."""
        self._fail(TimeoutError())

    def release(self) -> None:
        """Makes the connection idle, or closes it if it cannot be used again."""
        self._pieces = []
        if self.is_complete and self._is_usable and self._is_reading and not self.transport.is_closing():
            self.idle_since_s = self._loop.time()
            self._origin.idle.append(self)
        else:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Parses, and ends the connection after anything that is no response."""
        if self.is_complete:
            self._fail(ResponseError("the server sent something without a request"))
            return
        num_body_bytes = self._num_body_bytes
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.is_complete = False
            self._fail(ResponseError(f"the response is malformed: {error.__context__ or error}"))
            return
        self._num_other_bytes += len(data) - (self._num_body_bytes - num_body_bytes)
        if self._num_other_bytes > MAX_HEAD_BYTES + _OVERHEAD_PER_BODY_BYTE * self._num_body_bytes:
            self.is_complete = False
            self._fail(ResponseError("the response has too much besides its body"))
        elif self.is_complete or (self.status and not self._is_short):
            if self._num_pending > _BUFFERED_BYTES and not self.is_complete:
                self._is_reading = False
                self.transport.pause_reading()
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._origin.connections.discard(self)
        self._fail(ResponseError("the connection broke"))

    def on_message_begin(self) -> None:
        if self.status:
            raise ValueError("more than one response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            raise ValueError("trailers are not accepted")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        given = dict(self.headers)
        if (length := given.get(b"content-length")) is not None:
            self.length = int(length)
        if self.status < 200:  # another response would follow, and be taken for that to the next request
            raise ValueError(f"an interim response with status {self.status}")
        if self._is_head:  # the parser waits for a body: the connection is not used again
            self.is_complete = True
        elif not given.keys() & {b"content-length", b"transfer-encoding"} and self.status not in (204, 304):
            raise ValueError("its end could not be told from a broken connection")

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._num_pending += len(body)
        self._num_body_bytes += len(body)

    def on_message_complete(self) -> None:
        if not self._is_head:
            self.is_complete = True
            # A server that has responded early may not read the rest of the request.
            is_sent = not self.transport.get_write_buffer_size()
            self._is_usable = is_sent and self._parser.should_keep_alive()

    @property
    def _is_short(self) -> bool:
        return self.length is not None and self.length <= WHOLE_BYTES

    async def _more(self) -> None:
        """Returns when there may be more. Raises as `ask`."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: OSError) -> None:
        self._is_usable = False
        self._error = self._error or error
        self.transport.abort()
        self._wake()
