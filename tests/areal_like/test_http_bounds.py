"""Bounds of connections to an HTTP server: floods, pipelines, slow clients, long heads, trailers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from areal_like.http import server
from areal_like.http.access import PROBE_PATHS, AccessRules, host_names, single_key
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.wire.sockets import bound_socket
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

MAX_CONNECTIONS = 16
HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
PROBE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def livez(_: Request) -> Response:
    return PlainTextResponse("ok")


async def echo(request: Request) -> Response:
    return Response(await request.body())


async def slow(request: Request) -> Response:
    request.app.state.entered.set()
    await request.app.state.leave.wait()
    return PlainTextResponse("done")


async def large(_: Request) -> Response:
    return Response(bytes(16 << 20))


def application() -> Starlette:
    """`/slow` sets `state.entered` and waits for `state.leave`."""
    app = Starlette(
        routes=[
            Route("/livez", livez),
            Route("/large", large),
            Route("/echo", echo, methods=["POST"]),
            Route("/slow", slow),
        ]
    )
    app.state.entered, app.state.leave = asyncio.Event(), asyncio.Event()
    return app


@asynccontextmanager
async def serving(
    *, app: Starlette | None = None, body_timeout_s: float = HANG_LIMIT_S, **options: Any
) -> AsyncIterator[int]:
    """A server with small bounds, and these of HttpConfig; yields its port."""
    guard = HttpGuard(
        app or application(),
        AccessRules(
            hosts=host_names("127.0.0.1"),
            role_of=single_key("secret"),
            open_paths=PROBE_PATHS | {"/large"},
        ),
        limits=BodyLimits(max_bytes=1 << 20, timeout_s=body_timeout_s),
    )
    plane = HttpServer(HttpConfig(guard, max_connections=MAX_CONNECTIONS, **options))
    listener = bound_socket("127.0.0.1", 0)
    task = asyncio.create_task(plane.serve(sockets=[listener]))
    while not plane.started:
        await asyncio.sleep(0.01)
    try:
        yield int(listener.getsockname()[1])
    finally:
        plane.should_exit = plane.force_exit = True
        await task


async def talk(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Sends the pieces; returns all that comes back until the server closes, empty after a reset."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def is_open(stranger: socket.socket) -> bool:
    """Reads a byte, if there is one."""
    stranger.setblocking(False)
    try:
        return bool(stranger.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_probe_is_answered_during_a_flood_of_connections() -> None:
    async def body() -> None:
        app = application()
        async with serving(app=app) as port:
            request = HEAD.replace(b"POST /echo", b"GET /slow") + b"Connection: close\r\n\r\n"
            working = asyncio.create_task(talk(port, request))
            await app.state.entered.wait()
            flood: list[socket.socket] = []
            starts = (b"", b"GET /li", b"", HEAD + b"Content-Length: 1000\r\n\r\nx")
            for index in range(200):
                stranger = socket.create_connection(("127.0.0.1", port))
                flood.append(stranger)
                stranger.sendall(starts[index % 4])
                if index % 20 == 0:
                    assert (await talk(port, PROBE)).endswith(b"ok")
            app.state.leave.set()
            assert (await working).endswith(b"done"), "a request that is being answered was closed"
            while sum(map(is_open, flood)) > MAX_CONNECTIONS:  # until the server has closed the others
                await asyncio.sleep(0.01)
            for stranger in flood:
                stranger.close()

    asyncio.run(body())


def test_admitted_connections_are_closed_last() -> None:
    async def body() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def ask() -> bytes:
                writer.write(HEAD + b"Content-Length: 2\r\n\r\nhi")
                return await asyncio.wait_for(reader.readuntil(b"hi"), HANG_LIMIT_S)

            await ask()
            strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            assert (await ask()).startswith(b"HTTP/1.1 200")
            for _, other in (*strangers, (reader, writer)):
                other.transport.abort()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("long header", [b"GET /livez HTTP/1.1\r\nx: ", *[b"y" * 65536] * 200]),
        ("many headers", [b"GET /livez HTTP/1.1\r\n", *[b"x: y\r\n" * 10_000] * 200]),
        ("long path", [b"GET /", *[b"y" * 65536] * 200]),
        ("long chunk extension", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", *[b"y" * 65536] * 200]),
        ("long trailer", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx: ", *[b"y" * 65536] * 200]),
        ("noise", [bytes(range(256)) * 256] * 200),
    ],
)
def test_endless_head_ends_the_connection(name: str, pieces: list[bytes]) -> None:
    async def body() -> bytes:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            num_sent, answer = 0, b""
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    num_sent += 1
                    await asyncio.sleep(0.001)
                answer = await reader.read()
            except ConnectionError:
                pass
            writer.transport.abort()
            assert num_sent < 100, f"{name}: {num_sent} pieces were accepted, and then {answer[:100]!r}"
            assert (await talk(port, PROBE)).endswith(b"ok")
            return answer

    assert b" 200 " not in asyncio.run(body())


def test_trailers_are_refused_and_small_chunks_accepted() -> None:
    async def body() -> None:
        async with serving() as port:
            start = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            answer = await talk(port, start, b"1\r\nx\r\n" * 50_000, b"0\r\n\r\n")
            assert answer.endswith(b"x" * 50_000)
            answer = await talk(port, start + b"1\r\nx\r\n0\r\nHost: evil.example\r\n\r\n")
            assert b" 200 " not in answer

    asyncio.run(body())


def test_slow_head_and_slow_body_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with serving(body_timeout_s=0.5) as port:
            # Sent at once: after a write to a closed connection the response is lost.
            slow_body = await talk(port, HEAD + b"Content-Length: 9\r\n\r\nxxx")
            assert slow_body.startswith(b"HTTP/1.1 408")
            monkeypatch.setattr(server, "_HEAD_TIMEOUT_S", 0.5)
            dripping = talk(port, b"GET /livez HTTP/1.1\r\n", *[b"x: y\r\n"] * 10, pause_s=0.1)
            assert await asyncio.gather(talk(port), dripping) == [b"", b""]

    asyncio.run(body())


def test_stranger_cannot_make_the_server_read_a_body() -> None:
    async def body() -> None:
        async with serving() as port:
            head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
            answer = await talk(port, head + b"Expect: 100-continue\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401"), answer[:100]

    asyncio.run(body())


def test_pipelined_requests_are_bounded() -> None:
    async def body() -> None:
        async with serving() as port:
            few = PROBE.replace(b"Connection: close\r\n", b"")
            assert (await talk(port, 4 * few + PROBE)).count(b" 200 ") == 5
            assert (await talk(port, 2_000 * few)).count(b" 200 ") < 2_000
            assert (await talk(port, PROBE)).endswith(b"ok")

    asyncio.run(body())


def test_connections_that_read_no_response_are_closed() -> None:
    async def body() -> None:
        async with serving() as port:
            strangers = []
            for _ in range(MAX_CONNECTIONS):
                stranger = socket.create_connection(("127.0.0.1", port))
                stranger.sendall(2 * b"GET /large HTTP/1.1\r\n\r\n")
                strangers.append(stranger)
            await asyncio.sleep(0.3)
            assert (await asyncio.wait_for(talk(port, PROBE), HANG_LIMIT_S)).endswith(b"ok")
            for stranger in strangers:
                stranger.close()

    asyncio.run(body())


def test_a_client_that_does_not_read_is_ended() -> None:
    async def body() -> None:
        async with serving(write_timeout_s=100.0) as port:
            idle, slow = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 10) for _ in range(2)]
            for reader, writer in (idle, slow):
                writer.write(b"GET /large HTTP/1.1\r\n\r\n")
                await reader.readexactly(1)
            num_read = 1
            for _ in range(15):  # reads for 225 s, in which the other one is ended
                advance(15)
                num_read += len(await slow[0].readexactly(1 << 20))
            num_read += len(await slow[0].readexactly((16 << 20) - num_read))
            for _ in range(3):  # also if the kernel still took a part of it in the first time limit
                advance(100)
                await asyncio.sleep(0.05)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await idle[0].readexactly(16 << 20)
            for _, writer in (idle, slow):
                writer.transport.abort()

    moved_clock.run(body())


def test_a_connection_without_requests_is_closed() -> None:
    async def body() -> None:
        async with serving(keep_alive_s=100) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):  # in all longer than the limit
                writer.write(PROBE.replace(b"Connection: close\r\n", b""))
                assert await reader.readuntil(b"ok")
                advance(60)
            await asyncio.sleep(0.1)
            assert not reader.at_eof()
            advance(40)
            assert await reader.read() == b""
            writer.close()

    moved_clock.run(body())
