"""Large prompts of one client delay neither other sessions nor the server, and end no session late."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from areal_like.http import bodies
from rollout_server.conversation import conversation
from rollout_server.conversation.conversation import LARGE_BYTES
from rollout_server.sessions.http.formats import chat_body
from rollout_server.sessions.open_session import OpenSession
from tests.support.chat_models import APPENDING, jinja_renderer
from tests.support.session_server import SessionServer

LARGE = "x" * LARGE_BYTES


class SlowRenderer:
    """In place of a method of the renderer: large prompts wait until the test lets them go on."""

    def __init__(self, renderer: Any) -> None:
        self.may_go_on = threading.Event()
        self.names: list[str] = []
        """First letters of the large prompts, in the order in which they were rendered."""
        self._render = renderer.render

    def __call__(self, messages: Any, **options: Any) -> list[int]:
        text = messages[-1]["content"]
        if len(text) >= LARGE_BYTES:
            self.names.append(text[0])
            assert self.may_go_on.wait()
        return self._render(messages, **options)  # type: ignore[no-any-return]


@pytest.fixture
def slow(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowRenderer]:
    replaced = SlowRenderer(jinja_renderer(APPENDING))
    monkeypatch.setattr(server.renderer, "render", replaced)
    yield replaced
    replaced.may_go_on.set()


def post(
    server: SessionServer, session: OpenSession, body: Any, route: str = "chat/completions", *, key: str = ""
) -> Any:
    """Status and error message."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request("POST", f"/sessions/{session.id}/v1/{route}", content, {"Idempotency-Key": key})
        response = connection.getresponse()
        answer = json.loads(response.read())
    return response.status, answer.get("error", {}).get("message", "")


def saying(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_a_large_prompt_delays_no_other(server: SessionServer, slow: SlowRenderer) -> None:
    large, small = server.add(), server.add()
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(post, server, large, saying("a" + LARGE))
        server.wait(lambda: slow.names == ["a"])
        assert post(server, small, saying("hi")) == (200, "")
        assert not posted.done()
        slow.may_go_on.set()
        status, message = posted.result()
    assert status == 400 and "leaves no room" in message


def test_sessions_take_turns_with_large_prompts(server: SessionServer, slow: SlowRenderer) -> None:
    """A prompt is parsed, then rendered; before each of the two, one piece of the other's work may come."""
    many, one = server.add(), server.add()
    with ThreadPoolExecutor(5) as pool:
        posted = [pool.submit(post, server, many, saying("a" + LARGE)) for _ in range(4)]
        server.wait(lambda: slow.names == ["a"])
        server.wait(lambda: len(many.conversation.large_work._lock._waiters or ()) == 3)
        posted.append(pool.submit(post, server, one, saying("b" + LARGE)))
        server.wait(lambda: conversation._THREAD._work_queue.qsize() == 1)
        slow.may_go_on.set()
        assert [made.result()[0] for made in posted] == [400] * 5
    assert sorted(slow.names) == ["a", "a", "a", "a", "b"] and slow.names.index("b") <= 2


def test_an_answer_is_written_once_for_all(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def counted(*arguments: Any, **options: Any) -> bytes:
        written.append(chat_body(*arguments, **options))
        return written[-1]

    monkeypatch.setattr("rollout_server.sessions.http.app.chat_body", counted)
    session = server.add()
    server.policy.open.clear()
    with ThreadPoolExecutor(8) as pool:
        posted = [pool.submit(post, server, session, saying("hi"), key="x") for _ in range(8)]
        server.wait(lambda: [call.num_readers for call in session._calls._by_id.values()] == [8])
        server.policy.open.set()
        assert [made.result()[0] for made in posted] == [200] * 8
    assert len(written) == 1
    (call,) = session._calls._by_id.values()
    server.wait(lambda: not call.num_readers)
    assert call.body is None


def test_large_texts_are_tokenized_aside(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    tokenizer = server.renderer.tokenizer

    def tokenize(text: str, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return tokenizer(text, **options)

    monkeypatch.setattr(server.renderer, "tokenizer", tokenize)
    session = server.add()
    assert post(server, session, {"prompt": LARGE}, "completions")[0] == 400
    assert len(threads) == 1 and threads[0].startswith("large-prompts")


def test_refused_prompts_keep_no_session(server: SessionServer, slow: SlowRenderer) -> None:
    session = server.add()
    slow.may_go_on.set()
    assert post(server, session, saying("a" + LARGE))[0] == 400
    slow.may_go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(post, server, session, saying("a" + LARGE))
        server.wait(lambda: slow.names == ["a", "a"])
        ended = server.run(session.wait_ended(idle_timeout_s=0.2, deadline_s=lambda: None))
        assert ended == "idle"
        slow.may_go_on.set()
        posted.result()


def test_a_first_prompt_may_take_longer(server: SessionServer, slow: SlowRenderer) -> None:
    session = server.add()
    with ThreadPoolExecutor(2) as pool:
        posted = pool.submit(post, server, session, saying("a" + LARGE))
        server.wait(lambda: slow.names == ["a"])
        waiting = pool.submit(
            lambda: server.run(session.wait_ended(idle_timeout_s=0.1, deadline_s=lambda: None))
        )
        server.advance(1.0)
        server.call(lambda: None)  # a turn of the loop
        assert not waiting.done()
        slow.may_go_on.set()
        posted.result()
        assert waiting.result() == "idle"


def test_a_body_of_many_parts_is_refused(server: SessionServer) -> None:
    session = server.add()
    most = bodies.MAX_CONTAINERS
    body = b'{"messages": [{"role": "user", "content": "hi"}], "x": [%s]}'
    status, message = post(server, session, body % b",".join([b"[]"] * most))
    assert status == 400 and message == f"the body has more than {most} objects and lists"
    assert post(server, session, body % b",".join([b"[]"] * (most - 4)))[0] == 200
    # Brackets in texts are none of them, whatever is escaped there.
    assert post(server, session, body % (b'"' + rb"\\\"[{" * most + b'"'))[0] == 200
    status, _ = post(server, session, body % (b'"' + rb"\\\"[{" * most))
    assert status == 400
