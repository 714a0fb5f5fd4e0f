"""The router over real sockets in one event loop: what it passes on, to whom, and what hostile peers get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import aiohttp
import pytest

from rollout_server.router.table import MAX_CLAIMS
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.router_plane import Arrived, PlayedServer, Router, routed, session_of

CHAT = "/sessions/1-0-1/v1/chat/completions"


def run(body: Coroutine[Any, Any, None]) -> None:
    moved_clock.run(body)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def advance_until(condition: Any, *, seconds: float = 0.5) -> None:
    """Moves the clock in steps, as pauses follow one another."""
    while not condition():
        advance(seconds)
        await asyncio.sleep(0.005)


def saying(text: str) -> Any:
    async def handle(one: Arrived) -> None:
        await one.answer(200, {"text": text})

    return handle


def moved(url: str = "") -> Any:
    """A server that does not have the session."""

    async def handle(one: Arrived) -> None:
        if url:
            await one.refuse(421, "session_elsewhere", f"x-areal-server: {url}\r\n")
        else:
            await one.refuse(503, "session_moved", "retry-after: 1\r\n")

    return handle


def test_a_claim_and_its_session_have_one_address() -> None:
    async def claims(one: Arrived) -> None:
        if one.target == "/sessions":
            await one.answer(200, session_of(b, "7-0-1", api_key="secret"))
        else:
            await one.answer(200, {"text": "from b"}, "x-kept: 1\r\nConnection: x-hop\r\nx-hop: 1\r\n")

    a, b = PlayedServer("a", saying("from a")), PlayedServer("b", claims)

    async def body() -> None:
        async with routed(a, b) as router:
            router.list(b, num_waiting=1)
            router.list(a)
            status, session, _ = await router.ask("POST", "/sessions", {"wait_s": 9, "name": "me"}, key="job")
            assert status == 200 and session["base_url"] == f"{router.url}/sessions/7-0-1/v1"
            assert session["api_key"] == "secret" and json.loads(b.arrived[0].body)["name"] == "me"
            assert b.arrived[0].header("authorization") == "Bearer job"
            assert b.arrived[0].header("x-areal-client") == "127.0.0.1"
            path = "/sessions/7-0-1/v1/chat/completions?beta=true"
            headers = {"x_api_key": "secret", "Connection": "keep-alive, x-hop", "x_hop": "1", "x_own": "2"}
            headers |= {"x_areal_client": "1.2.3.4", "Cookie": "a=b"}
            for _ in range(3):
                status, answer, told = await router.ask("POST", path, {"a": 1}, key="other", **headers)
                assert (status, answer) == (200, {"text": "from b"})
                assert told["x-kept"] == "1" and "x-hop" not in told
            assert not a.arrived and len(b.arrived) == 4
            one = b.arrived[-1]
            assert (one.method, one.target, json.loads(one.body)) == ("POST", path, {"a": 1})
            assert one.header("host") == b.url.removeprefix("http://")
            assert (one.header("authorization"), one.header("x-api-key")) == ("Bearer other", "secret")
            assert (one.header("x-own"), one.header("cookie")) == ("2", "a=b")
            names = {name for name, _ in one.headers}
            assert not names & {"x-hop", "x-areal-client", "connection", "keep-alive"}
            assert router.counted('router_requests_total{outcome="passed"}') == 4

    run(body())


def test_a_group_is_of_one_server() -> None:
    async def claims(one: Arrived) -> None:
        sessions = [session_of(a, f"7-{number}-1") for number in range(3)]
        await one.answer(200, {"sessions": sessions, "group": 7})

    a = PlayedServer("a", claims)

    async def body() -> None:
        async with routed(a) as router:
            _, group, _ = await router.ask("POST", "/sessions", {"group": True})
            assert [one["base_url"] for one in group["sessions"]] == [
                f"{router.url}/sessions/7-{number}-1/v1" for number in range(3)
            ]
            assert {one.server for one in router.table.sessions.values()} == {"a"}

    run(body())


def test_a_request_of_a_dead_server_is_continued() -> None:
    """It is marked as a repetition, because the dead server may have sampled its turn."""

    async def dies(one: Arrived) -> None:
        await a.kill()

    a, b = PlayedServer("a", dies), PlayedServer("b", moved())

    async def body() -> None:
        async with routed(a, b) as router:
            router.table.learn("1-0-1", router.table.servers["a"], b"")
            asked = asyncio.ensure_future(router.ask("POST", CHAT, {"a": 1}))
            await until(lambda: a.arrived)
            b.handle = moved(a.url)  # its lease has not expired yet
            await advance_until(lambda: len(b.arrived) >= 4)
            b.handle = moved()  # now it has
            await advance_until(lambda: len(b.arrived) >= 6)
            assert not asked.done()
            b.handle = saying("continued")
            await advance_until(asked.done)
            status, answer, _ = asked.result()
            assert (status, answer) == (200, {"text": "continued"})
            assert not any(name == "x-stainless-retry-count" for name, _ in a.arrived[0].headers)
            assert b.arrived[-1].header("x-stainless-retry-count") == "1"
            assert json.loads(b.arrived[-1].body) == {"a": 1}
            assert router.counted('router_retries_total{reason="moved"}') >= 2
            assert router.table.sessions["1-0-1"].server == "b"

    run(body())


def test_a_hung_server_is_given_up_when_no_buffer_hears_from_it() -> None:
    async def hangs(one: Arrived) -> None:
        await asyncio.Event().wait()

    a, b = PlayedServer("a", hangs), PlayedServer("b", saying("continued"))

    async def body() -> None:
        async with routed(a, b) as router:
            router.table.learn("1-0-1", router.table.servers["a"], b"")
            asked = asyncio.ensure_future(router.ask("POST", CHAT, {}))
            await until(lambda: a.arrived)
            advance(60.0)
            router.list(a, b)
            await asyncio.sleep(0.02)
            assert not asked.done(), "a turn may take as long as it takes"
            assert router.forwarding.waits()["router: responses of a to 1 requests"] >= 60.0
            advance(11.0)
            router.list(a, silent_s=11.0)
            router.list(b)
            assert (await asked)[1] == {"text": "continued"}

    run(body())


def test_events_are_passed_on_as_they_arrive() -> None:
    pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def streams(one: Arrived) -> None:
        one.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        while piece := await pieces.get():
            one.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await one.writer.drain()

    a = PlayedServer("a", streams)

    async def body() -> None:
        async with routed(a) as router, aiohttp.ClientSession() as client:
            url, headers = f"{router.url}/sessions/1-0-1/v1/watch", {"x-api-key": "k"}
            async with client.post(url, json={"stream": True}, headers=headers) as response:
                for number in range(3):
                    pieces.put_nowait(b"data: %d\n\n" % number)
                    assert await response.content.readuntil(b"\n\n") == b"data: %d\n\n" % number
                assert response.headers["Content-Type"] == "text/event-stream"
                assert router.forwarding.num_streams == 1
                response.close()
            pieces.put_nowait(b"")
            await until(lambda: a.num_ended == 1)
            await until(lambda: router.forwarding.num_streams == 0)

    run(body())


def test_a_client_that_leaves_ends_its_request_at_the_server() -> None:
    async def hangs(one: Arrived) -> None:
        pass

    a = PlayedServer("a", hangs)

    async def body() -> None:
        async with routed(a) as router:
            asked = asyncio.ensure_future(router.ask("POST", "/sessions/1-0-1/v1/watch", {}))
            await until(lambda: a.arrived)
            asked.cancel()
            await until(lambda: a.num_ended == 1)
            await until(lambda: router.forwarding.num_pending == 0)
            assert router.counted('router_requests_total{outcome="gone"}') == 1

    run(body())


def test_a_stream_that_breaks_off_is_not_completed() -> None:
    async def breaks(one: Arrived) -> None:
        one.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n")
        await one.writer.drain()
        await asyncio.sleep(0.02)
        raise EOFError

    a = PlayedServer("a", breaks)

    async def body() -> None:
        async with routed(a) as router:
            with pytest.raises(aiohttp.ClientError):
                await router.ask("POST", CHAT, {})
            await until(lambda: router.counted('router_requests_total{outcome="broken"}') == 1)

    run(body())


def test_a_half_response_is_asked_for_again() -> None:
    async def breaks(one: Arrived) -> None:
        if len(a.arrived) > 1:
            return await one.answer(200, {"text": "whole"})
        one.writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"text": ')
        await one.writer.drain()
        raise EOFError

    a = PlayedServer("a", breaks)

    async def body() -> None:
        async with routed(a) as router:
            asked = asyncio.ensure_future(router.ask("POST", CHAT, {}))
            await advance_until(asked.done)
            assert asked.result()[1] == {"text": "whole"}
            assert a.arrived[1].header("x-stainless-retry-count") == "1"

    run(body())


def test_what_an_ending_server_cancels_goes_on_elsewhere() -> None:
    async def cancels(one: Arrived) -> None:
        await one.refuse(503, "session_moved", "content-type: application/json\r\n")

    async def fails(one: Arrived) -> None:
        await one.refuse(500, "engine_error", "content-type: application/json\r\n")

    a, b = PlayedServer("a", cancels), PlayedServer("b", saying("continued"))

    async def body() -> None:
        async with routed(a, b) as router:
            router.table.learn("1-0-1", router.table.servers["a"], b"")
            assert (await router.ask("POST", CHAT, {}))[1] == {"text": "continued"}
            assert b.arrived[0].header("x-stainless-retry-count") == "1"
            b.handle = fails
            assert (await router.ask("POST", CHAT, {}))[1]["error"]["code"] == "engine_error", "the agent's"

    run(body())


def test_claims_when_nobody_or_nothing_is_there() -> None:
    a = PlayedServer("a", moved())

    async def none(one: Arrived) -> None:
        await one.refuse(429, "no_session_waits", "retry-after: 5\r\n")

    async def body() -> None:
        async with routed() as router:
            status, answer, told = await router.ask("POST", "/sessions", {})
            assert (status, answer["error"]["code"], told["retry-after"]) == (503, "no_server", "5")
            for path, wanted in (("/health", 503), ("/readyz", 503), ("/livez", 200)):
                async with router.client.get(f"{router.url}{path}") as response:
                    assert response.status == wanted
            await a.start()
            a.handle = none
            router.list(a)
            status, answer, told = await router.ask("POST", "/sessions", {"wait_s": 0})
            assert (status, answer["error"]["code"], told["retry-after"]) == (429, "no_session_waits", "5")
            for wrong in (b"[]", b"{", b'{"wait_s": 1e9}', b'{"wait_s": NaN}', b'{"wait_s": "3"}'):
                assert (await router.ask("POST", "/sessions", wrong))[0] == 400
            router.table.num_claims = MAX_CLAIMS
            status, answer, told = await router.ask("POST", "/sessions", {"wait_s": 30})
            assert (status, answer["error"]["code"], told["retry-after"]) == (429, "no_session_waits", "5")
            router.table.num_claims = 0
            for code in ("agent_slowed", "agent_refused"):
                a.handle = lambda one, code=code: one.refuse(429, code, "retry-after: 7\r\n")
                status, answer, told = await router.ask("POST", "/sessions", {"wait_s": 30})
                assert (answer["error"]["code"], told["retry-after"]) == (code, "7"), "the agent must hear it"
            a.handle = lambda one: one.refuse(410, "job_over")
            assert (await router.ask("POST", "/sessions", {}))[0] == 410
            await a.kill()
            asked = asyncio.ensure_future(router.ask("POST", "/sessions", {"wait_s": 1}))
            await advance_until(asked.done)
            assert asked.result()[0] == 410, "the servers have ended with the job"

    run(body())


def test_a_flood_of_claims_is_bounded_and_ends_with_the_router() -> None:
    async def waits(one: Arrived) -> None:
        await asyncio.Event().wait()

    a = PlayedServer("a", waits)

    async def body() -> None:
        async with routed(a) as router:
            claims = [
                asyncio.ensure_future(router.ask("POST", "/sessions", {"wait_s": 30})) for _ in range(50)
            ]
            await until(lambda: len(a.arrived) == 50)
            assert router.table.servers["a"].num_claims == 50
            claims[0].cancel()
            await until(lambda: router.table.num_claims == 49)
            router.forwarding.close()
            for status, answer, _ in await asyncio.gather(*claims[1:]):
                assert (status, answer["error"]["code"]) == (503, "no_server")
            assert router.table.num_claims == router.table.servers["a"].num_claims == 0

    run(body())


def test_a_router_that_ends_answers_every_request() -> None:
    """Also those that wait for a server to respond, and those that wait for a server."""

    async def hangs(one: Arrived) -> None:
        await asyncio.Event().wait()

    a, b = PlayedServer("a", hangs), PlayedServer("b", moved())

    async def body() -> None:
        async with routed(a, b) as router:
            router.table.learn("1-0-1", router.table.servers["a"], b"")
            router.table.learn("2-0-1", router.table.servers["b"], b"")
            hung = asyncio.ensure_future(router.ask("POST", CHAT, {}))
            await until(lambda: a.arrived)
            router.list(b)
            waiting = asyncio.ensure_future(router.ask("POST", CHAT.replace("1-0-1", "2-0-1"), {}))
            await until(lambda: b.arrived)
            router.forwarding.close()
            await advance_until(waiting.done)
            assert not hung.done(), "its turn may still be sampled"
            router.forwarding.give_up()
            for asked in (hung, waiting):
                status, answer, told = await asked
                assert (status, answer["error"]["code"]) == (503, "session_moved")
                assert "router is ending" in answer["error"]["message"] and told["retry-after"] == "1"

    run(body())


def test_the_counts_are_those_of_all_servers() -> None:
    async def counts(one: Arrived) -> None:
        await one.answer(200, {"waiting": 3, "open": 4})

    async def lies(one: Arrived) -> None:
        await one.answer(200, ["many"])

    servers = [PlayedServer("a", counts), PlayedServer("b", counts), PlayedServer("c", lies)]

    async def body() -> None:
        async with routed(*servers) as router:
            assert (await router.ask("GET", "/sessions"))[1] == {"waiting": 6, "open": 8}

    run(body())


async def refused_paths(router: Router, server: PlayedServer) -> None:
    for path in (
        "//evil.example/sessions/1-0-1/v1/models",
        "/sessions//v1/models",
        "/sessions/1-0-1/../../status",
        "/sessions/1-0-1/v1/%2e%2e/%2e%2e/metrics",
        "/sessions/1-0-1/v1/..%2f..%2fmetrics",
        "/sessions/1-0-1/v1//models",
        "/sessions/1-0-1/v1/a\\..\\b",
        "/sessions/..%2f/v1/models",
        "/sessions/%31-0-1%2f..%2f../v1/x",
        "/sessions/1-0-1/v1/mod%0d%0aels",
        "/sessions/1-0-1/v1/models?a=%00\x7f",
        "/sessions/" + 100 * "1" + "/v1/models",
        "/control/drain",
        "/metrics",
        "/status",
    ):
        head = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer k\r\nConnection: close\r\n\r\n"
        )
        answer = await router.talk(head.encode("latin-1"))
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400", b"HTTP/1.1 401")), (path, answer)
    assert not server.arrived


async def refused_heads(router: Router, server: PlayedServer) -> None:
    begin = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer k\r\n"
    for head in (
        "Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}abc",
        "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "Content-Length : 2\r\n\r\n{}",
        "Content-Length: +2\r\n\r\n{}",
        "X: a\nContent-Length: 2\r\n\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n",
        "Origin: http://evil.example\r\nContent-Length: 2\r\n\r\n{}",
    ):
        answer = await router.talk((begin + head).encode())
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403")), (head, answer)
    evil = begin.replace("127.0.0.1", "evil.example") + "Content-Length: 2\r\n\r\n{}"
    assert (await router.talk(evil.encode())).startswith(b"HTTP/1.1 421")
    keyless = begin.replace("Authorization: Bearer k\r\n", "") + "Content-Length: 2\r\n\r\n{}"
    assert (await router.talk(keyless.encode())).startswith(b"HTTP/1.1 401")
    long = begin + f"X: {'x' * (65 << 10)}\r\nContent-Length: 2\r\n\r\n{{}}"
    assert not (await router.talk(long.encode())).startswith(b"HTTP/1.1 2")
    assert not server.arrived


def test_hostile_requests_reach_no_server() -> None:
    a = PlayedServer("a", saying("no"))

    async def body() -> None:
        async with routed(a) as router:
            await refused_paths(router, a)
            await refused_heads(router, a)
            huge = await router.ask("POST", CHAT, b"x" * (1 << 20))
            assert huge[0] == 413 and "bytes accepted here" in huge[1]["error"]["message"]
            head = f"POST /sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {1 << 40}\r\n\r\n"
            assert (await router.talk(head.encode())).startswith(b"HTTP/1.1 413")
            assert not a.arrived and not router.table.sessions

    run(body())


def test_that_a_session_is_over_only_its_server_knows() -> None:
    """A session without a journal is unknown to the other servers."""
    a, b, c = (PlayedServer(name, lambda one: one.refuse(410, "session_gone")) for name in "abc")

    async def body() -> None:
        async with routed(a, b, c) as router:
            b.handle = saying("here")
            for _ in range(3):
                assert (await router.ask("POST", CHAT, {}))[1] == {"text": "here"}
            b.handle = lambda one: one.refuse(410, "session_gone")
            num_asked = len(a.arrived) + len(c.arrived)
            assert (await router.ask("POST", CHAT, {}))[0] == 410
            assert len(a.arrived) + len(c.arrived) == num_asked, "its own server has said so"
            assert not router.table.sessions
            assert (await router.ask("POST", CHAT, {}))[0] == 410
            assert len(a.arrived) + len(c.arrived) >= num_asked + 2, "all are asked"

    run(body())


def test_what_a_hostile_server_says_is_not_followed() -> None:
    async def told(one: Arrived) -> None:
        await one.answer(200, {"text": "stolen"})

    evil = PlayedServer("evil", told)
    a = PlayedServer("a", moved())

    async def body() -> None:
        await evil.start()
        async with routed(a) as router:
            for status in (301, 302, 303, 307, 308):
                a.handle = lambda one, status=status: one.answer(status, {}, f"Location: {evil.url}/x\r\n")
                found = await router.ask("POST", CHAT, {})
                assert found[0] == 502 and "location" not in found[2]
            a.handle = moved(evil.url)
            asked = asyncio.ensure_future(router.ask("POST", CHAT, {}))
            await advance_until(asked.done)
            assert (asked.result()[0], asked.result()[1]["error"]["code"]) == (503, "session_moved")
            assert not evil.arrived
            for lie in (b"[]", b"{", b'{"id": "../x", "api_key": "k"}', b'{"id": "1-0-1"}', b"1"):
                a.handle = lambda one, lie=lie: one.answer(200, lie)
                asked = asyncio.ensure_future(router.ask("POST", "/sessions", {"wait_s": 1}))
                await advance_until(asked.done)
                assert asked.result()[0] == 503
                advance(10.0)
            a.handle = lambda one: one.refuse(401, "invalid_api_key")
            assert (await router.ask("POST", "/sessions/made-up/v1/chat/completions", {}))[0] == 401
            assert not router.table.sessions
        await evil.kill()

    run(body())
