"""Requests for sessions that a server does not have: what their clients hear, and who hears nothing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from areal_like.shards import WHOLE
from areal_like.wire.messages.producer import SessionPlace
from rollout_server.sessions.http.elsewhere import SERVER_HEADER
from tests.support.session_plane import CHAT, PlaneServer

SECRET = "5e" * 31
URL = "http://other:7701"


def test_a_client_hears_where_its_session_is() -> None:
    places: dict[str, SessionPlace | None] = {
        "7-0-1": SessionPlace(server="rollout-2", url=URL),
        "8-0-1": SessionPlace(),
        "9-0-1": SessionPlace(is_over=True),
        "10-0-1": None,  # the buffer does not reply
    }
    asked: list[str] = []

    async def find(id: str) -> SessionPlace | None:
        asked.append(id)
        return places[id]

    with PlaneServer(find=find).serving() as server:
        server.book.keys.num_expected = 1
        starting = server.ask("GET", "/sessions/7-0-1/v1/models", headers={"Authorization": "Bearer x"})
        assert (starting[0], starting[1]["error"]["code"]) == (503, "session_moved"), "the key may be right"
        server.call(lambda: server.book.keys.set_secret(WHOLE, SECRET))
        keys = {id: server.book.keys.new_key(id) for id in places}

        def status(
            id: str, key: str, *, path: str = "v1/chat/completions"
        ) -> tuple[int, str, dict[str, str]]:
            headers = {"Authorization": f"Bearer {key}"}
            found = server.ask("POST", f"/sessions/{id}/{path}", CHAT, headers)
            return found[0], found[1]["error"].get("code", ""), found[2]

        code, name, headers = status("7-0-1", keys["7-0-1"])
        assert (code, name, headers[SERVER_HEADER]) == (421, "session_elsewhere", URL)
        assert headers["x-should-retry"] == "false", "the same address would say the same"
        for id in ("8-0-1", "10-0-1"):
            code, name, headers = status(id, keys[id])
            assert (code, name, headers["retry-after"]) == (503, "session_moved", "1")
            assert "x-should-retry" not in headers
        for _ in range(2):
            assert status("9-0-1", keys["9-0-1"], path="v1/heartbeat")[:2] == (410, "session_gone")
        assert asked == ["7-0-1", "8-0-1", "10-0-1", "9-0-1"], "what is over is asked once"
        for id, key in (("7-0-1", keys["8-0-1"]), ("7-0-2", keys["7-0-1"]), ("7-0-1", "x"), ("7-0-1", "")):
            assert status(id, key)[0] == 401
        inside = {"Authorization": f"Bearer {keys['7-0-1']}"}
        path = "/sessions/7-0-1/v1/models"
        assert server.ask("GET", path, headers=inside, external=False)[0] == 401, "not of its own agents"
        assert len(asked) == 4, "strangers cost no question"


def test_a_session_being_restored_is_waited_for() -> None:
    async def find(id: str) -> SessionPlace | None:
        asyncio.get_running_loop().call_later(0.1, restore)
        return SessionPlace(server="rollout-1", url=URL)

    def restore() -> None:
        server.book.add(session)

    with PlaneServer(find=find).serving() as server:
        session = server.add()
        server.call(lambda: server.book._sessions.clear())  # it is known to the test alone
        server.call(lambda: server.book.keys.set_secret(WHOLE, SECRET))
        key = server.book.keys.new_key(session.id)
        path = f"/sessions/{session.id}/v1/chat/completions"
        assert server.ask("POST", path, CHAT, {"Authorization": f"Bearer {key}"})[0] == 200


def test_a_request_that_the_end_cancels_is_answered() -> None:
    """With the code for which a router repeats it; the HTTP server's own response would be a bare 500."""
    asked = threading.Event()

    async def find(id: str) -> SessionPlace | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    with PlaneServer(find=find).serving() as server, ThreadPoolExecutor(1) as threads:
        server.call(lambda: server.book.keys.set_secret(WHOLE, SECRET))
        headers = {"Authorization": f"Bearer {server.book.keys.new_key('7-0-1')}"}
        answer = threads.submit(server.ask, "POST", "/sessions/7-0-1/v1/chat/completions", CHAT, headers)
        asked.wait()
        server.run(server.plane.close())
        status, content, told = answer.result()
        assert (status, content["error"]["code"], told["retry-after"]) == (503, "session_moved", "1")
