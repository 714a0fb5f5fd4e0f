"""The router's HTTP client against a server that a test plays byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from rollout_server.router import client as client_module
from rollout_server.router.client import ConnectError, Connection, ResponseError, ServerClient
from tests.support import moved_clock
from tests.support.moved_clock import advance

OK = b"HTTP/1.1 200 OK\r\n"


@dataclass(eq=False)
class Played:
    """A server that sends the next of its answers after each request."""

    answers: list[bytes]
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    num_ended: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((line for line in head.split(b"\r\n") if b"content-length" in line), b":0")
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(int(length.partition(b":")[2])))
                answer = self.answers.pop(0)
                writer.write(answer)
                await writer.drain()
                if not answer or answer.endswith(b"END"):
                    break
        self.num_ended += 1
        writer.close()


@contextlib.asynccontextmanager
async def playing(*answers: bytes) -> AsyncIterator[tuple[Played, ServerClient, str]]:
    played = Played(list(answers))
    server = await asyncio.start_server(played.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with ServerClient(tls=None) as client:
        try:
            yield played, client, url
        finally:
            server.close()
            for writer in played.writers:
                writer.transport.abort()
            await asyncio.sleep(0.02)  # both sides notice


async def asked(
    client: ServerClient, url: str, method: str = "POST", target: bytes = b"/a?b=1", body: bytes = b"{}"
) -> Connection:
    connection = client.idle(url) or await client.connect(url)
    await connection.ask(method, target, headers=[(b"x-a", b"1")], body=body)
    return connection


def run(body: Coroutine[Any, Any, None]) -> None:
    moved_clock.run(body)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_requests_follow_one_another_on_one_connection() -> None:
    whole = OK + b"Content-Length: 2\r\nX-B: 2\r\n\r\nab"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"

    async def body() -> None:
        async with playing(whole, empty, whole) as (played, client, url):
            for status, content in ((200, b"ab"), (204, b""), (200, b"ab")):
                connection = await asked(client, url)
                assert (connection.status, connection.is_complete) == (status, True)
                assert connection.content() == content
                assert status == 204 or (b"x-b", b"2") in connection.headers
                connection.release()
            host = url.removeprefix("http://").encode()
            request = b"POST /a?b=1 HTTP/1.1\r\nhost: " + host + b"\r\nx-a: 1\r\ncontent-length: 2\r\n\r\n"
            assert played.heads == 3 * [request] and played.bodies == 3 * [b"{}"]
            assert played.num_connections == 1

    run(body())


def test_idle_connections_close_before_the_server_s_end() -> None:
    whole = OK + b"Content-Length: 0\r\n\r\n"

    async def body() -> None:
        async with playing(whole, whole) as (played, client, url):
            (await asked(client, url)).release()
            advance(client_module.KEEP_ALIVE_S + 1.0)
            await until(lambda: played.num_ended == 1)
            assert client.idle(url) is None
            (await asked(client, url)).release()
            assert played.num_connections == 2

    run(body())


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
    ],
)
def test_connections_that_are_not_used_again(answer: bytes) -> None:
    async def body() -> None:
        async with playing(answer) as (played, client, url):
            connection = await asked(client, url)
            assert (connection.status, connection.content()) == (200, b"ab")
            connection.release()
            assert client.idle(url) is None
            await until(lambda: played.num_ended == 1)

    run(body())


def test_data_without_a_request_ends_the_connection() -> None:
    async def body() -> None:
        served: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(writer)
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(OK + b"Content-Length: 0\r\n\r\n")

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with ServerClient(tls=None) as client:
            connection = await asked(client, url)
            connection.release()
            await asyncio.sleep(0.02)
            served[0].write(OK + b"Content-Length: 5\r\n\r\nwrong")
            await until(connection.transport.is_closing)
            assert client.idle(url) is None
        server.close()
        served[0].transport.abort()
        await asyncio.sleep(0.02)

    run(body())


def test_a_response_to_head_has_no_body() -> None:
    async def body() -> None:
        async with playing(OK + b"Content-Length: 99\r\n\r\n") as (played, client, url):
            connection = await asked(client, url, "HEAD", body=b"")
            assert connection.is_complete and (b"content-length", b"99") in connection.headers
            assert b"content-length" not in played.heads[0] and connection.content() == b""
            connection.release()
            assert client.idle(url) is None

    run(body())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le" + b"END",
        OK + b"Content-Length: 100\r\n\r\nhalf END",
        OK + b"\r\nits end is the connection's END",
        OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"SSH-2.0-x\r\n",
        OK + b"Content-Length: 2\r\n\r\nab" + OK + b"Content-Length: 1\r\n\r\nc",
        OK + b"X: " + b"x" * (70 << 10) + b"\r\nContent-Length: 0\r\n\r\n",
        OK + b"X: " + b"x" * (70 << 10),
        OK + 9000 * b"X: y\r\n" + b"\r\n",
        OK + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_responses_that_are_none(answer: bytes) -> None:
    async def body() -> None:
        async with playing(answer) as (_, client, url):
            with pytest.raises(ResponseError):
                await asked(client, url)
            assert client.idle(url) is None

    run(body())


def test_a_response_in_pieces() -> None:
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    endings = {
        b"2\r\nde\r\n0\r\n\r\n": b"abcde",
        b"2\r\nde\r\n0\r\nX-Trailer: 1\r\n\r\n": None,
        b"2\r\ndEND": None,
        b"zz\r\n": None,
        b"1;x=" + b"y" * (70 << 10) + b"\r\n": None,
    }

    async def whole(connection: Connection) -> bytes:
        return b"".join([piece async for piece in connection.pieces()])

    async def body() -> None:
        for ending, content in endings.items():
            async with playing(chunked + ending) as (_, client, url):
                try:
                    connection = await asked(client, url)
                    assert await whole(connection) == content
                except ResponseError:
                    assert content is None, ending

    run(body())


def test_no_more_is_buffered_than_is_taken() -> None:
    size = 8 << 20

    async def body() -> None:
        async with playing(OK + b"Content-Length: %d\r\n\r\n" % size + bytes(size)) as (_, client, url):
            connection = await asked(client, url)
            assert not connection.is_complete
            for _ in range(20):
                await asyncio.sleep(0.005)
            sizes = [len(piece) async for piece in connection.pieces()]
            assert sum(sizes) == size and max(sizes) < 1 << 20
            connection.release()
            assert client.idle(url) is connection

    run(body())


def test_a_request_that_is_given_up_ends_its_connection() -> None:
    async def body() -> None:
        async with playing(OK + b"Content-Length: 2\r\n\r\n1") as (played, client, url):
            connection = await client.connect(url)
            asking = asyncio.ensure_future(connection.ask("GET", b"/", headers=[], body=b""))
            await until(lambda: len(played.heads) == 1)
            assert not asking.done()
            connection.give_up()
            with pytest.raises(TimeoutError):
                await asking
            connection.release()
            await until(lambda: played.num_ended == 1)

    run(body())


def test_a_head_is_one_request() -> None:
    async def body() -> None:
        async with playing() as (played, client, url):
            connection = await client.connect(url)
            for target, value in (
                (b"/a b", b""),
                (b"a", b""),
                (b"/\r\n", b""),
                (b"/", b"1\r\nx: 2"),
                (b"/", b"\n"),
            ):
                with pytest.raises(ValueError, match="characters"):
                    await connection.ask("GET", target, headers=[(b"x", value)], body=b"")
            assert not played.heads

    run(body())


def test_servers_without_a_connection() -> None:
    async def body() -> None:
        async with ServerClient(tls=None) as client:
            listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            port = listener.sockets[0].getsockname()[1]
            listener.close()
            for address in (f"127.0.0.1:{port}", "127.0.0.1:99999", ":1", f"{'x' * 99}.example:1"):
                with pytest.raises(ConnectError):
                    await client.connect(f"http://{address}")

    run(body())
