"""uvicorn as the HTTP server of every plane, with additional limits for which it has no settings.

    connection: HEAD -> (BODY) -> RESPONSE -> idle (keep-alive) -> HEAD ...

* A head that takes longer than `_HEAD_TIMEOUT_S` ends the connection; uvicorn would wait forever.
* What a request sends in addition to its body (headers, chunk sizes, trailers) is bounded while it arrives;
  httptools would collect a header of any length.
* Few requests may wait behind the one that is being handled (HTTP pipelining, which no client of ours does).
  uvicorn keeps as many as arrive, at several kilobytes of memory each.
* TLS handshakes are bounded in number and time; a connection is counted only after its handshake.
* With `write_timeout_s`, a client that does not read its response ends its connection.
* A response's head leaves with the first piece of its body, if that follows at once: uvicorn would make two
  system calls, and the client would wake up twice.
* A request's `scope["state"][ON_DISCONNECT]` calls back when the client has disconnected, for applications to
  which a task that waits for it costs too much.
* At `max_connections`, the oldest connection that has no complete request or does not read its response is
  closed. uvicorn's own limit would respond with 503 to every request, /livez included, for as long as one
  client holds connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from areal_like.http.access import MAX_HEAD_BYTES
from areal_like.http.guard import ADMITTED, HAS_ARRIVED

ON_DISCONNECT = "on_disconnect"
"""Name in `scope["state"]` of a function that takes a function: the latter is called when the client has
disconnected before it had the whole response. One for each request, which must have read its body."""
_TICK_S = 1.0
"""Interval at which the `Date` of responses is updated."""
_HEAD_TIMEOUT_S = 10.0
_HANDSHAKE_TIMEOUT_S = 5.0
_KEEP_ALIVE_S = 5
_BACKLOG = 128
"""Connections that the kernel holds until they are accepted. All of them may be accepted in one turn of the
event loop, before the oldest are closed, so the number also bounds file descriptors."""
_MAX_PIPELINED = 8
"""Requests of one connection that may wait for the response to an earlier one."""
_OVERHEAD_PER_BODY_BYTE = 8
"""Bytes of chunk sizes for each byte of a body; chunks of one byte need five."""
_JOINED_BYTES = 1 << 16
"""A longer piece of a body is not copied behind the head."""


class HttpConfig(uvicorn.Config):
    """uvicorn's settings for one plane."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_connections: int,
        shutdown_s: int | None = None,
        keep_alive_s: int = _KEEP_ALIVE_S,
        write_timeout_s: float | None = None,
        backlog: int = _BACKLOG,
        certificate: str = "",
        private_key: str = "",
    ) -> None:
        """`shutdown_s`: longest wait for open responses at the end. `keep_alive_s`: how long a connection may
        be idle. `write_timeout_s`: longest time without progress of a client that reads; None: no limit.
        `backlog`: connections that wait to be accepted, which bounds file descriptors too. With `certificate`
        and `private_key`, the names of PEM files, the plane speaks TLS."""
        super().__init__(
            app,
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            loop="asyncio",
            # Warnings are about malformed requests: any client could fill the log with them.
            log_level="error",
            log_config=None,
            access_log=False,
            backlog=backlog,
            timeout_keep_alive=keep_alive_s,
            timeout_graceful_shutdown=shutdown_s,
            server_header=False,
            proxy_headers=False,
            ssl_certfile=certificate or None,
            ssl_keyfile=private_key or None,
        )
        self.max_connections = max_connections
        self.write_timeout_s = write_timeout_s


class HttpServer(uvicorn.Server):
    """uvicorn on sockets that are bound already, without its signal handlers: the process owns signals."""

    config: HttpConfig

    def __init__(self, config: HttpConfig) -> None:
        self._waking: asyncio.Future[None] | None = None
        super().__init__(config)
        self._handshakes: list[BoundedHttp] = []
        """Connections in a TLS handshake, and some that have ended since."""

    @property
    def should_exit(self) -> bool:
        """Set it to end `serve`."""
        return self._should_exit

    @should_exit.setter
    def should_exit(self, should_exit: bool) -> None:
        self._should_exit = should_exit
        if self._waking is not None and not self._waking.done():
            self._waking.set_result(None)

    async def main_loop(self) -> None:
        """Until `should_exit`. uvicorn's own method looks at it ten times a second, which is most of what an
        idle process costs; if another thread sets it, it is seen after a second."""
        loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            self._waking = loop.create_future()
            await asyncio.wait([self._waking], timeout=_TICK_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does not install any handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections. uvicorn's own method has no setting for handshakes."""
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        self.servers = [
            await loop.create_server(
                self._connection,
                sock=listening,
                backlog=self.config.backlog,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S if tls else None,
            )
            for listening in sockets or ()
        ]
        self.started = True

    def _connection(self) -> BoundedHttp:
        """A connection that is being accepted; an exception closes it."""
        made = BoundedHttp(config=self.config, server_state=self.server_state, app_state={})
        if self.config.ssl:
            self._handshakes = [other for other in self._handshakes if other.is_in_handshake]
            if len(self._handshakes) >= self.config.max_connections:
                raise ConnectionRefusedError("too many TLS handshakes")
            self._handshakes.append(made)
        return made


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    config: HttpConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._opened_s = self.loop.time()
        self._was_admitted = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._has_begun = False
        """True if a request has begun in the bytes that are being parsed."""
        self._num_body_bytes = 0
        self._num_other_bytes = 0
        """Bytes of this request outside its body."""
        self._on_disconnect: Callable[[], None] | None = None

    @property
    def is_in_handshake(self) -> bool:
        """True until the TLS handshake has completed or timed out."""
        return self.transport is None and self.loop.time() < self._opened_s + _HANDSHAKE_TIMEOUT_S

    @property
    def is_idle(self) -> bool:
        """True while no complete request waits for its response, or while the peer does not read."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return True
        return bool(self.flow.write_paused)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Closes another connection if there are too many."""
        super().connection_made(transport)
        self._start_head_timer()
        if len(self.connections) > self.config.max_connections:
            others = cast("list[BoundedHttp]", [other for other in self.connections if other is not self])
            idle = [other for other in others if other.is_idle]
            oldest = min(idle, key=lambda other: (other._was_admitted, other._opened_s), default=self)
            self.connections.discard(oldest)
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        if self._on_disconnect is not None:
            self._on_disconnect()

    def pause_writing(self) -> None:
        """The client has not yet read much of the response."""
        super().pause_writing()
        self._stop_write_timer()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """The client has read most of the buffered response."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parses, then ends the connection if the request has too many bytes outside its body."""
        before = self._num_body_bytes
        self._has_begun = False
        super().data_received(data)
        if self._is_in_head and self._has_begun:
            self._start_head_timer()
        if not self._has_begun:
            self._num_other_bytes += len(data) - (self._num_body_bytes - before)
        if self._num_other_bytes > MAX_HEAD_BYTES + _OVERHEAD_PER_BODY_BYTE * self._num_body_bytes:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._has_begun = self._is_in_head = True
        self._num_body_bytes = self._num_other_bytes = 0
        self.scope["state"][ON_DISCONNECT] = self._watch

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuses trailers: uvicorn would add them to the headers that the access rules have checked."""
        if not self._is_in_head:
            raise ValueError("trailers are not accepted")
        name = name.lower()
        if name == b"expect":
            super().on_header(name, value)
        else:  # as there, with one call less for each header
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The end of the head."""
        self._is_in_head = False
        self._stop_head_timer()
        if len(self.pipeline) >= _MAX_PIPELINED:
            self.transport.abort()
            raise ValueError("too many requests at once")  # ends the parsing of what has arrived
        super().on_headers_complete()
        self.cycle.transport = cast("asyncio.Transport", _ResponseWriter(self.transport, self.loop))

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.cycle.scope["state"][HAS_ARRIVED] = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._on_disconnect = None
        self._was_admitted |= self.cycle.scope.get("state", {}).get(ADMITTED, False)
        super().on_response_complete()

    def _watch(self, call: Callable[[], None]) -> None:
        self._on_disconnect = call
        if self.transport.is_closing():
            self.loop.call_soon(call)
        else:
            self.flow.resume_reading()  # or its end would not be noticed

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self.transport.abort)

    def _start_write_timer(self) -> None:
        if self.config.write_timeout_s is not None:
            unsent = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self.config.write_timeout_s, self._check_unsent, unsent)

    def _check_unsent(self, before: int) -> None:
        """Ends the connection unless the client has read something meanwhile."""
        if self.transport.get_write_buffer_size() < before:
            self._start_write_timer()
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _ResponseWriter:
    """The part of a transport that uvicorn uses for a response; the first write waits for the next."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._first: bytes | None = b""
        """What waits; None once something was written."""
        self._writing: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        if self._first is None:
            self._transport.write(data)
        elif self._writing is None:
            self._first = data
            self._writing = self._loop.call_soon(self._flush)
        elif len(data) > _JOINED_BYTES:
            self._flush()
            self._transport.write(data)
        else:
            self._first += data
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        first, self._first = self._first, None
        if self._writing is not None:
            self._writing.cancel()
        if first:
            self._transport.write(first)
