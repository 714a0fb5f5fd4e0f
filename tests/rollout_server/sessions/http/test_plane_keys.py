"""Who may send which request to sessions: keys of sessions, tokens of the job, web pages, both listeners."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_like.http.access import Reason
from areal_like.security.administration import add_key, revoke_key
from areal_like.security.keys import KeyDirectory, KeyRole
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Example
from tests.support.certificates import make_certificate
from tests.support.keys import make_keys
from tests.support.session_plane import CHAT, PlaneServer, talk


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A plane of a job with keys, the directory of keys, and the job's tokens by role."""
    keys = tmp_path_factory.mktemp("keyed") / "keys"
    tokens = make_keys(keys)
    with PlaneServer(keys=keys).serving() as server:
        yield SimpleNamespace(server=server, keys=keys, tokens=tokens)


@pytest.fixture(scope="module")
def unkeyed() -> Iterator[PlaneServer]:
    """A plane of a job without keys."""
    with PlaneServer().serving() as server:
        yield server


def gone_session(server: PlaneServer) -> OpenSession:
    """An attempt whose lease was cancelled."""
    session = server.add()

    def remove() -> None:
        session.close("its lease was cancelled")
        server.book.remove(session)

    server.call(remove)
    return session


@pytest.mark.parametrize("external", [True, False])
def test_a_session_takes_its_own_key_only(keyed: SimpleNamespace, external: bool) -> None:
    server = keyed.server
    session, other, earlier = server.add(), server.add(), gone_session(server)
    wrong = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {other.api_key}"},
        {"Authorization": f"Bearer {earlier.api_key}"},
        {"Authorization": f"Bearer {session.api_key}x"},
        {"Authorization": f"Bearer {session.api_key[:-1]}"},
        {"Authorization": "Bearer \xfc"},
        {"Authorization": f"Basic {session.api_key}"},
        {"Authorization": session.api_key},
        {"Api-Key": session.api_key},
        {"X-Api-Key": f"{session.api_key}x"},
        {"X-Api-Key": f"Bearer {session.api_key}"},
        {"X-Api-Key": other.api_key, "Authorization": f"Bearer {earlier.api_key}"},
        *({"Authorization": f"Bearer {token}"} for token in keyed.tokens.values()),
    ]
    before = server.refused[Reason.TOKEN]
    for headers in wrong:
        for route in ("v1/chat/completions", "reward", "end", "v1/models", "nowhere"):
            method, body = ("GET", None) if route == "v1/models" else ("POST", CHAT)
            path = f"/sessions/{session.id}/{route}"
            status, content, answered = server.ask(method, path, body, external=external, headers=headers)
            assert (status, answered["x-should-retry"]) == (401, "false"), (headers, path)
            error = content["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "api_key" in error["message"] and answered["www-authenticate"] == "Bearer"
    assert server.refused[Reason.TOKEN] == before + 5 * len(wrong)
    assert session.num_calls == 0 and not server.policy.prompts
    key = f"Bearer {session.api_key}"
    right = (
        {"Authorization": key},
        {"X-Api-Key": session.api_key},
        {"X-Api-Key": session.api_key, "Authorization": "Bearer of-another-service"},
        {"X-Api-Key": "of-another-service", "Authorization": key},
    )
    for headers in right:
        status, content, _ = server.ask(
            "POST", f"/sessions/{session.id}/v1/chat/completions", CHAT, external=external, headers=headers
        )
        assert (status, content["choices"][0]["message"]["content"]) == (200, "ok"), headers
    server.policy.prompts.clear()


def test_refusals_have_the_format_of_the_api(keyed: SimpleNamespace) -> None:
    session = keyed.server.add()
    for route in ("v1/messages", "v1/messages/count_tokens"):
        status, content, answered = keyed.server.ask("POST", f"/sessions/{session.id}/{route}", CHAT)
        assert (status, answered["x-should-retry"], content["type"]) == (401, "false", "error")
        assert set(content["error"]) == {"type", "message"}
        assert content["error"]["type"] == "authentication_error"
    key = {"X-Api-Key": session.api_key, "Content-Length": str(1 << 30)}
    status, content, _ = keyed.server.ask("POST", f"/sessions/{session.id}/v1/messages", b"", headers=key)
    assert (status, content["error"]["type"]) == (413, "request_too_large")


def test_a_key_that_is_sent_twice_is_refused(unkeyed: PlaneServer) -> None:
    session = unkeyed.add()
    line = f"Authorization: Bearer {session.api_key}\r\n"
    head = f"GET /sessions/{session.id}/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    port = unkeyed.port_of(external=False)
    assert talk(port, f"{head}{line}\r\n".encode()).startswith(b"HTTP/1.1 200")
    assert talk(port, f"{head}{line}{line}\r\n".encode()).startswith(b"HTTP/1.1 401")


def test_strangers_learn_nothing_about_ids(keyed: SimpleNamespace) -> None:
    server = keyed.server
    waiting = server.add(example=Example(prompt="?", answer=1))
    ids = [server.add().id, waiting.id, gone_session(server).id, "7-0-7", "..%2f", "x" * 999]
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {keyed.tokens['agent']}"}):
        answers = set()
        for id in ids:
            status, content, answered = server.ask(
                "POST", f"/sessions/{id}/v1/chat/completions", CHAT, headers=headers
            )
            del answered["date"]
            answers.add(f"{status} {content} {answered}")
        assert len(answers) == 1, answers
    server.call(lambda: server.book.remove(waiting))


def test_a_session_that_has_ended_is_gone(unkeyed: PlaneServer) -> None:
    session = gone_session(unkeyed)
    key = {"Authorization": f"Bearer {session.api_key}"}
    for path in ("v1/chat/completions", "reward", "end"):
        status, content, answered = unkeyed.ask("POST", f"/sessions/{session.id}/{path}", CHAT, headers=key)
        assert (status, answered["x-should-retry"]) == (410, "false")
        assert content["error"]["code"] == "session_gone"
        assert content["error"]["message"] == "its lease was cancelled"


def test_a_repeated_end_gets_the_first_response(unkeyed: PlaneServer) -> None:
    session = unkeyed.add()
    key = {"Authorization": f"Bearer {session.api_key}"}

    def asked(path: str, headers: Mapping[str, str] = key) -> tuple[int, Any]:
        status, content, _ = unkeyed.ask("POST", f"/sessions/{session.id}/{path}", CHAT, headers=headers)
        return status, content

    assert asked("v1/chat/completions")[0] == 200
    first = asked("v1/end")
    assert first == (200, {"id": session.id, "ended": True, "problem": None})
    assert asked("end") == first
    unkeyed.call(lambda: unkeyed.book.remove(session))
    assert asked("end") == first, "also once its sample is made"
    assert asked("group/end")[0] == asked("reward")[0] == 410
    assert asked("end", {"Authorization": "Bearer other"})[0] == 401


def test_claims_need_a_token_of_their_role(keyed: SimpleNamespace) -> None:
    server = keyed.server
    may = {"agent", "operator"}
    for role, token in keyed.tokens.items():
        headers = {"Authorization": f"Bearer {token}"}
        wanted = (200, 429) if role in may else (403, 403)
        statuses = (
            server.ask("GET", "/sessions", headers=headers)[0],
            server.ask("POST", "/sessions", b"", headers=headers)[0],
        )
        assert statuses == wanted, role
    session = server.add(example=Example(prompt="what?", answer=1))
    for headers in (
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": f"Bearer {session.api_key}"},
        {"Authorization": f"Basic {keyed.tokens['agent']}"},
        {"X-Api-Key": keyed.tokens["agent"]},
    ):
        for method, path in (
            ("POST", "/sessions"),
            ("GET", "/sessions"),
            ("GET", "/"),
            ("GET", "/sessions/"),
        ):
            status, content, answered = server.ask(method, path, headers=headers)
            assert status == 401 and content["error"]["code"] == "invalid_api_key"
            assert "agent.token" in content["error"]["message"] and answered["x-should-retry"] == "false"
    agent = {"Authorization": f"Bearer {keyed.tokens['agent']}"}
    status, content, _ = server.ask("POST", "/sessions", b"", headers=agent)
    assert (status, content["id"], content["api_key"]) == (200, session.id, session.api_key)
    assert server.ask("GET", "/nowhere", headers=agent)[0] == 404


def test_the_loopback_listener_takes_no_claims(keyed: SimpleNamespace, unkeyed: PlaneServer) -> None:
    unkeyed.add(example=Example(prompt="what?", answer=1))
    for server, token in ((keyed.server, keyed.tokens["agent"]), (unkeyed, "x")):
        headers = {"Authorization": f"Bearer {token}"}
        for method in ("POST", "GET"):
            status, content, _ = server.ask(method, "/sessions", external=False, headers=headers)
            assert status == 403 and content["error"]["type"] == "permission_error"
    assert unkeyed.ask("POST", "/sessions", b"")[0] == 200, "without keys everybody may claim"


def test_a_revoked_agent_key_claims_nothing(keyed: SimpleNamespace) -> None:
    add_key(keyed.keys, "cluster-b", KeyRole.AGENT)
    agent = {"Authorization": f"Bearer {KeyDirectory(keyed.keys).identity('cluster-b').token}"}
    keyed.server.call(keyed.server.keyring.refresh)
    assert keyed.server.ask("GET", "/sessions", headers=agent)[0] == 200
    revoke_key(keyed.keys, "cluster-b")
    keyed.server.call(keyed.server.keyring.refresh)
    assert keyed.server.ask("GET", "/sessions", headers=agent)[0] == 401


@pytest.mark.parametrize("external", [True, False])
def test_web_pages_and_rebound_names_are_refused(unkeyed: PlaneServer, external: bool) -> None:
    session = unkeyed.add()
    key = {"Authorization": f"Bearer {session.api_key}"}
    path = f"/sessions/{session.id}/v1/chat/completions"
    for status, headers in (
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Sec-Fetch-Site": "cross-site"}),
        (421, {"Host": "evil.example"}),
        (421, {"Host": "evil.example:80"}),
    ):
        for asked in (path, "/sessions"):
            found, content, answered = unkeyed.ask(
                "POST", asked, CHAT, external=external, headers={**key, **headers}
            )
            assert (found, answered["x-should-retry"]) == (status, "false"), headers
            assert set(content["error"]) == {"message", "type", "param", "code"}
    assert session.num_calls == 0


def test_tls_is_for_agents_from_outside(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path, "sessions")
    security = {"tls_certificate": str(certificate), "tls_private_key": str(private_key)}
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    with PlaneServer({"security": security}).serving() as server:
        assert server.plane.external_url.startswith("https://")
        session = server.add(example=Example(prompt="what?", answer=1))
        status, content, _ = server.ask("POST", "/sessions", b"", tls=context)
        assert status == 200 and content["base_url"].startswith("https://127.0.0.1:")
        key = {"Authorization": f"Bearer {session.api_key}"}
        assert server.ask("GET", f"/sessions/{session.id}/v1/models", external=False, headers=key)[0] == 200
