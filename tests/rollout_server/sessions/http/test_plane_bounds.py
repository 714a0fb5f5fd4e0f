"""Bounds of the HTTP plane of sessions: floods, bodies, slow clients, addresses, open files."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from areal_like.errors import ConfigError
from areal_like.http import server as http_server
from areal_like.http.access import Reason
from rollout_server.sessions.http import plane
from rollout_server.sessions.open_session import OpenSession
from tests.support.ports import held_port
from tests.support.session_plane import CHAT, MAX_BODY_BYTES, PlaneServer, get_answer, talk
from tests.support.waiting import HANG_LIMIT_S

NUM_REQUESTS, NUM_CONNECTIONS = 10_000, 500


@pytest.fixture(scope="module")
def server() -> Iterator[PlaneServer]:
    """A plane without keys, with room for few samples."""
    with PlaneServer({"rollout": {"max_running": 4, "queue_samples": 4}}).serving() as serving:
        yield serving


def head_of(session: OpenSession, route: str, *lines: str) -> bytes:
    """The head of a request with the session's key, without its end."""
    start = (f"POST /sessions/{session.id}/{route} HTTP/1.1", "Host: localhost")
    return "\r\n".join((*start, f"Authorization: Bearer {session.api_key}", *lines, "")).encode()


@pytest.mark.parametrize(
    ("route", "most"),
    [("v1/chat/completions", MAX_BODY_BYTES), ("reward", 1 << 16), ("v1/end", 1 << 16)],
)
def test_a_larger_body_is_not_read(server: PlaneServer, route: str, most: int) -> None:
    session, port = server.add(), server.port_of(external=True)
    for lines, body in (
        ([f"Content-Length: {most + 1}"], b""),
        (["Transfer-Encoding: chunked"], b"%x\r\n" % (most + 1) + b" " * (most + 1)),
    ):
        answer = talk(port, head_of(session, route, *lines) + b"\r\n", body)
        assert answer.startswith(b"HTTP/1.1 413") and b'"invalid_request_error"' in answer
        assert b"x-should-retry: false" in answer
    key = {"Authorization": f"Bearer {session.api_key}"}
    body = CHAT.rstrip(b"}") + b', "x": "' + b"y" * (most - len(CHAT) - 9) + b'"}'
    wanted = 400 if route == "reward" else 200
    assert server.ask("POST", f"/sessions/{session.id}/{route}", body, headers=key)[0] == wanted


def test_slow_clients_are_ended(server: PlaneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "_BODY_TIMEOUT_S", 0.5)
    with PlaneServer().serving() as fresh:
        port = fresh.port_of(external=True)
        body = talk(port, head_of(fresh.add(), "v1/chat/completions", "Content-Length: 999") + b"\r\n ")
        assert body.startswith(b"HTTP/1.1 408") and b"x-should-retry" not in body
        monkeypatch.setattr(http_server, "_HEAD_TIMEOUT_S", 0.5)
        assert talk(port, b"GET /sessions HTTP/1.1\r\nx: y\r\n") == b""
        assert fresh.refused == {Reason.SLOW: 1}


def test_silent_connections_do_not_keep_others_out(server: PlaneServer) -> None:
    session, port = server.add(), server.port_of(external=False)
    key = {"Authorization": f"Bearer {session.api_key}"}
    starts = (b"", b"GET /ses", head_of(session, "end", "Content-Length: 9") + b"\r\n", b"x")
    silent = []
    try:
        for index in range(300):
            silent.append(socket.create_connection(("127.0.0.1", port)))
            silent[-1].sendall(starts[index % 4])
            if index % 50 == 49:
                path = f"/sessions/{session.id}/v1/chat/completions"
                assert server.ask("POST", path, CHAT, external=False, headers=key)[0] == 200
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("external", [True, False])
def test_one_session_leaves_connections_to_others(server: PlaneServer, external: bool) -> None:
    """However many requests of it wait, as repetitions of one, and however many bodies are on their way."""
    many, other, port = server.add(), server.add(), server.port_of(external=external)
    head = (
        head_of(many, "v1/chat/completions", f"Content-Length: {len(CHAT)}", "Idempotency-Key: x") + b"\r\n"
    )

    async def body() -> None:
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(64)]
        for number, (_, writer) in enumerate(connections):
            writer.write(head + (CHAT if number < 40 else CHAT[:-1]))
        async with asyncio.timeout(HANG_LIMIT_S):
            while many.num_requests < 64:
                await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(talk, port, head + CHAT)
        assert answer.startswith(b"HTTP/1.1 429") and b'"too_many_requests"' in answer
        assert b"retry-after: 1\r\n" in answer and b"x-should-retry" not in answer
        key = {"Authorization": f"Bearer {other.api_key}"}
        status, *_ = await asyncio.to_thread(
            server.ask, "GET", f"/sessions/{other.id}/v1/models", None, key, external=external
        )
        assert status == 200
        server.policy.open.set()
        for reader, writer in connections[:40]:
            assert (await get_answer(reader))[0] == 200
            writer.close()
        for _, writer in connections[40:]:
            writer.close()
        async with asyncio.timeout(HANG_LIMIT_S):
            while many.num_requests:
                await asyncio.sleep(0.01)
        key = {"Authorization": f"Bearer {many.api_key}"}
        path = f"/sessions/{many.id}/v1/models"
        assert (await asyncio.to_thread(server.ask, "GET", path, None, key, external=external))[0] == 200

    before = server.refused[Reason.BUSY]
    server.policy.open.clear()
    try:
        asyncio.run(body())
    finally:
        server.policy.open.set()
    assert many.num_calls == 1 and server.refused[Reason.BUSY] == before + 1


@pytest.mark.parametrize("asked", ["claims", "wrong keys"])
def test_10000_requests_at_once(server: PlaneServer, asked: str) -> None:
    """Each is answered, the memory stays bounded, and an open session goes on meanwhile."""
    num_requests = NUM_REQUESTS if asked == "claims" else NUM_REQUESTS // 10  # each needs a connection
    session, port = server.add(), server.port_of(external=True)
    request = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    if asked == "wrong keys":
        request = head_of(session, "end", "Content-Length: 2").replace(b"Bearer ", b"Bearer x") + b"\r\n{}"
    statuses: Counter[Any] = Counter()

    async def ask_repeatedly(left: Iterator[int]) -> None:
        writer = None
        for _ in left:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            status, headers, _ = await get_answer(reader)
            statuses[status, headers.get("retry-after")] += 1
            if headers.get("connection") == "close":
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async def go_on(flood: asyncio.Future[Any]) -> int:
        """Requests of the open session on one connection, one after the other; their number."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chat = head_of(session, "v1/chat/completions", f"Content-Length: {len(CHAT)}") + b"\r\n" + CHAT
        num_answered = 0
        while not flood.done():
            writer.write(chat)
            status, _, _ = await get_answer(reader)
            assert status == 200
            num_answered += 1
        writer.close()
        return num_answered

    async def body() -> int:
        left = iter(range(num_requests))
        flood = asyncio.gather(*(ask_repeatedly(left) for _ in range(NUM_CONNECTIONS)))
        num_answered = await go_on(flood)
        await flood
        return num_answered

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_answered = asyncio.run(asyncio.wait_for(body(), HANG_LIMIT_S))
    assert statuses == {((429, "5") if asked == "claims" else (401, None)): num_requests}
    assert num_answered >= max(1, num_requests // NUM_CONNECTIONS // 4), (
        "the open session had less than its turn"
    )
    # Of the clients in this process, too.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_an_address_in_use_is_a_mistake_of_the_user() -> None:
    with held_port() as port:
        message = f"port {port} .*in use.*set sessions.port to a port that is free"
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=message):
            start({"sessions": {"port": port - 1}})  # the plane is that of server 1
        with PlaneServer({"sessions": {"port": port - 1}}).serving() as server:
            assert server.plane.external_url == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sessions": {"host": "0.0.0.0"}}, "sessions.host=0.0.0.0 is not a loopback address"),
        (
            {"sessions": {"host": "192.0.2.1"}, "security": {"insecure": True}},
            "set sessions.host to an address",
        ),
        ({"sessions": {"port": 65535}}, "65535 . 1 .this server's number. is above 65535"),
        ({"rollout": {"max_episodes": 10_000_000}}, "sessions need .* open files.*ulimit -n"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(settings)


def start(settings: dict[str, Any]) -> None:
    """Raises what the start of a plane raises."""
    with PlaneServer(settings).serving():
        pass


def test_all_addresses_are_shown_by_name() -> None:
    with PlaneServer({"sessions": {"host": "0.0.0.0"}, "security": {"insecure": True}}).serving() as server:
        assert server.plane.external_url.startswith(f"http://{socket.gethostname()}:")
    with PlaneServer({"sessions": {"advertise_host": "gpu7.cluster"}}).serving() as server:
        assert server.plane.external_url.startswith("http://gpu7.cluster:")
        assert server.ask("GET", "/sessions", headers={"Host": "gpu7.cluster"})[0] == 200
