"""How responses leave an HTTP server, and how an application hears that its client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from areal_like.http.server import ON_DISCONNECT, HttpConfig, HttpServer
from areal_like.wire.sockets import bound_socket

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = bytes(200_000)


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[tuple[HttpServer, int]]:
    server = HttpServer(HttpConfig(app, max_connections=16))
    listener = bound_socket("127.0.0.1", 0)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server, int(listener.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        await task


async def send(send: Send, *pieces: bytes, length: int | None = None) -> None:
    headers = [(b"content-length", b"%d" % length)] if length is not None else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_a_head_leaves_with_its_body() -> None:
    writes: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send_message: Send) -> None:
        if scope["path"] == "/long":
            await send(send_message, LONG, length=len(LONG))
        else:
            await send(send_message, b"ab", b"cd", length=4)

    async def body() -> None:
        async with serving(app) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.02)
            (connection,) = server.server_state.connections
            write = connection.transport.write

            def noted(data: bytes | bytearray | memoryview[Any]) -> None:
                writes.append(bytes(data))
                write(data)

            connection.transport.write = noted  # type: ignore[method-assign]
            for _ in range(2):
                writer.write(REQUEST)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 OK\r\n") and await reader.readexactly(4) == b"abcd"
            sent = [one for one in writes if one]
            assert [one.endswith((b"\r\n\r\nab", b"cd")) for one in sent] == 4 * [True]
            writer.write(REQUEST.replace(b"/ ", b"/long ").replace(b"GET", b"HEAD"))
            assert b"content-length: 200000" in await reader.readuntil(b"\r\n\r\n")
            writer.write(REQUEST.replace(b"/ ", b"/long "))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(LONG)) == LONG
            writer.close()

    asyncio.run(body())


def test_the_head_of_a_stream_does_not_wait() -> None:
    async def body() -> None:
        go_on = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send_message: Send) -> None:
            await send_message({"type": "http.response.start", "status": 200, "headers": []})
            await go_on.wait()
            await send_message({"type": "http.response.body", "body": b"late"})

        async with serving(app) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            await reader.readuntil(b"\r\n\r\n")
            go_on.set()
            assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"
            writer.close()

    asyncio.run(body())


def test_an_application_hears_that_its_client_has_gone() -> None:
    async def body() -> None:
        gone: list[str] = []
        entered, leave = asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send_message: Send) -> None:
            while (await receive())["more_body"]:
                pass
            scope["state"][ON_DISCONNECT](lambda: gone.append(scope["path"]))
            if scope["path"] != "/short":
                entered.set()
                await leave.wait()
            await send(send_message, b"a", length=1)

        async with serving(app) as (_, port):
            for path in (b"/short", b"/long", b"/late"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                large = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n" % path
                writer.write(large + LONG)
                if path == b"/short":
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                else:
                    await entered.wait()
                    entered.clear()
                writer.close()
                await writer.wait_closed()
                await asyncio.sleep(0.05)
            assert gone == ["/long", "/late"]
            leave.set()

    asyncio.run(body())


def test_a_server_ends_at_once() -> None:
    async def body() -> float:
        async def app(scope: Scope, receive: Receive, send_message: Send) -> None:
            await send(send_message, length=0)

        async with serving(app) as (server, _):
            begun_s = time.monotonic()
            server.should_exit = True
            while server.servers[0].is_serving():
                await asyncio.sleep(0.001)
            return time.monotonic() - begun_s

    assert asyncio.run(body()) < 0.5
