"""POST /sessions: external agents claim sessions with the client that is one file."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from areal_like.client import areal_like_client as client
from areal_like.client.areal_like_client import (
    ClaimedSession,
    JobOverError,
    RefusedError,
    SessionOverError,
    UnreachableError,
    claim,
    claim_group,
)
from rollout_server.sessions.book import JOB_OVER
from rollout_server.sessions.claimants import LONGEST_WAIT_S, NUM_FREE, NUM_REFUSED, Claimant
from rollout_server.sessions.http import claims
from rollout_server.sessions.http.plane import agents_told
from rollout_server.sessions.open_session import SessionOutcome, SessionState
from rollout_server.tasks.base import Example
from tests.support.certificates import make_certificate
from tests.support.ports import held_port
from tests.support.session_plane import PlaneServer, read_request
from tests.support.session_server import SessionServer
from tests.support.waiting import HANG_LIMIT_S

FILE = Path(client.__file__)
EXAMPLE = Example(
    prompt=[{"role": "user", "content": "2+2"}], answer={4}, metadata={"level": 3}, label="sums"
)


def posted(server: SessionServer, body: Any) -> tuple[int, http.client.HTTPMessage, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/sessions", json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, response.headers, answer


def num_clients(server: SessionServer) -> int:
    """Clients that wait for a session; call it in the server's loop."""
    routes: claims.ClaimRoutes = server.book.on_waiting.__self__  # type: ignore[attr-defined]
    return len(routes._waiting)


def test_a_session_is_claimed_and_used(server: SessionServer) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert claimed is not None
    server.wait(lambda: session.state is SessionState.OPEN)
    assert claimed.base_url == server.base_url(session)
    assert (claimed.group, claimed.sample, claimed.deadline_s, claimed.idle_timeout_s) == (0, 0, 600.0, 500.0)
    assert claimed.example == {
        "split": "train", "index": 0, "prompt": [{"role": "user", "content": "2+2"}], "answer": "{4}",
        "metadata": {"level": 3}, "label": "sums",
    }  # fmt: skip
    claimed.reward(0.25)
    claimed.reward(0.5)
    assert session.reward == 0.5
    with pytest.raises(RefusedError, match="finite"):
        claimed.reward(1e300)
    with pytest.raises(RefusedError, match="names no completion"):
        claimed.reward(1.0, completion_id="chatcmpl-1")
    ask = {"messages": [{"role": "user", "content": "2+2"}]}
    claimed._post("chat/completions", ask)
    assert claimed.end() and session.state is SessionState.ENDED
    server.call(lambda: server.book.remove(session))
    assert claimed.end(), "a repetition, as after a lost response, is told the same"
    with pytest.raises(SessionOverError, match="ended"):
        claimed.reward(1.0)
    assert "key-0" not in repr(claimed)


def test_without_a_session_clients_come_again(server: SessionServer) -> None:
    server.add()  # of the server's own agents
    status, headers, answer = posted(server, {})
    assert (status, headers["Retry-After"]) == (429, str(claims.RETRY_AFTER_S))
    assert answer["error"]["type"] == "rate_limit_error" and "x-should-retry" not in headers
    assert claim(server.url) is None
    assert posted(server, {"wait_s": 31})[0] == posted(server, {"wait_s": "x"})[0] == 400


def test_a_client_waits_for_a_session(server: SessionServer) -> None:
    assert claim(server.url, wait_s=0.3) is None
    with ThreadPoolExecutor(4) as pool:
        claiming = [pool.submit(claim, server.url, wait_s=claims.MAX_WAIT_S) for _ in range(4)]
        server.wait(lambda: num_clients(server) == 4)
        for _ in range(4):
            server.add(example=EXAMPLE)
        claimed = [one.result() for one in claiming]
    ids = {session.id for session in claimed if session is not None}
    assert ids == {session.id for session in server.sessions}


def test_each_session_is_claimed_once(server: SessionServer) -> None:
    for _ in range(20):
        server.add(example=EXAMPLE)
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim(server.url), range(40)))
    ids = [one.id for one in claimed if one is not None]
    assert len(ids) == len(set(ids)) == 20


def test_a_client_that_left_claims_nothing(server: SessionServer) -> None:
    body = json.dumps({"wait_s": 20})
    with socket.create_connection(("127.0.0.1", server.port)) as left:
        head = f"POST /sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        left.sendall(head.encode())
        server.wait(lambda: num_clients(server) == 1)
    server.wait(lambda: num_clients(server) == 0)
    session = server.add(example=EXAMPLE)
    assert session.state is SessionState.WAITING and not session.is_offered
    assert claim(server.url) is not None


def test_an_undelivered_session_waits_again(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_DELIVERY_S", HANG_LIMIT_S)
    session = server.add(example=Example(prompt="x" * 30_000_000, answer=0))
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        assert server.call(server.book.offer) is None
        server.advance(HANG_LIMIT_S)
        server.wait(lambda: not session.is_offered)
    assert session.state is SessionState.WAITING
    assert claim(server.url) is not None


def test_the_key_of_an_undelivered_session_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has read the beginning of the answer would share the session with the next one."""
    monkeypatch.setattr(claims, "_DELIVERY_S", HANG_LIMIT_S)
    with PlaneServer().serving() as server:
        session = server.add(example=Example(prompt="x" * 30_000_000, answer=0))
        port = server.port_of(external=True)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")
            received = b""
            while b'"api_key":"key-0"' not in received:
                received += slow.recv(65536)
            server.advance(HANG_LIMIT_S)
            server.wait(lambda: not session.is_offered)
        path, key = f"/sessions/{session.id}/v1/models", {"Authorization": "Bearer key-0"}
        assert server.ask("GET", path, headers=key)[0] == 401
        claimed = claim(f"http://127.0.0.1:{port}")
        assert claimed is not None and claimed.api_key != "key-0"
        claimed.reward(1.0)
        assert server.ask("GET", path, headers=key)[0] == 401


def test_a_session_is_not_lost_by_a_mistake(server: SessionServer) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    session = server.add(example=Example(prompt="x", answer=Broken()))
    for _ in range(2):
        status, _, answer = posted(server, {})
        assert status == 500 and answer["error"]["code"] == "internal_error"
        assert session.state is SessionState.WAITING and not session.is_offered


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that gives one of these to each connection; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                with listener.accept()[0] as connection:
                    read_request(connection)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()
        assert not thread.is_alive(), "fewer requests than answers"


CUT = b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"id": '
DONE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        CUT,
        b"nonsense\r\n\r\n",
        DONE[:-2] + b"<>",
        *(CUT.replace(b"200", status) for status in (b"500", b"502")),
    ],
)
def test_a_broken_answer_is_an_os_error(answer: bytes) -> None:
    error = RefusedError if b"500" in answer else UnreachableError
    with answering(answer) as url, pytest.raises(error, match=url):
        claim(url)


def test_rewards_are_sent_until_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RETRY_S", 0.01)
    for answers in ([BUSY, CUT, DONE], [BUSY] * 4):
        with answering(*answers) as url:
            session = ClaimedSession(
                id="1", base_url=url, api_key="k", example={}, group=0, sample=0, deadline_s=None,
                idle_timeout_s=1.0,
            )  # fmt: skip
            if DONE in answers:
                session.reward(1.0)
            else:
                with pytest.raises(UnreachableError, match="too many requests of the session"):
                    session.end()


def test_few_clients_wait(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MAX_WAITING", 2)
    waiting = [threading.Thread(target=posted, args=(server, {"wait_s": 30})) for _ in range(2)]
    for one in waiting:
        one.start()
    server.wait(lambda: num_clients(server) == 2)
    status, _, answer = posted(server, {"wait_s": 30})
    server.advance(30)
    assert status == 429 and "2 clients wait" in answer["error"]["message"]
    for one in waiting:
        one.join()


def test_the_end_of_a_server_answers_those_that_wait(
    server: SessionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "MAX_WAIT_S", 2 * HANG_LIMIT_S)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(posted, server, {"wait_s": 2 * HANG_LIMIT_S}) for _ in range(3)]
        server.wait(lambda: num_clients(server) == 3)
        server.call(server.book.close)
        answers = [one.result() for one in waiting]
    server.add(example=EXAMPLE)
    answers.append(posted(server, {"wait_s": 20}))
    for status, headers, answer in answers:
        assert status == 429 and "Retry-After" in headers
        assert "the server is ending" in answer["error"]["message"]


def test_a_broken_agent_is_slowed_and_refused(server: SessionServer) -> None:
    def fail() -> tuple[int, http.client.HTTPMessage, Any]:
        answer = posted(server, {"name": "broken"})
        if answer[0] == 200:
            session = next(one for one in server.sessions if one.id == answer[2]["id"])
            server.wait(lambda: session.state is SessionState.OPEN)
            server.call(lambda: server.book.remove(session, SessionOutcome.FAILED, "no request to the model"))
        return answer

    def pass_time() -> None:
        for record in server.book.claimants._records.values():
            record.until_s -= LONGEST_WAIT_S

    for _ in range(NUM_REFUSED + 2):
        server.add(example=EXAMPLE)
    assert [fail()[0] for _ in range(NUM_FREE + 2)] == [200] * (NUM_FREE + 1) + [429]
    status, headers, answer = fail()
    assert (status, answer["error"]["code"]) == (429, "agent_slowed")
    assert 1 <= int(headers["Retry-After"]) <= LONGEST_WAIT_S and "no request to the model" in str(answer)
    for _ in range(NUM_REFUSED - NUM_FREE - 1):
        server.call(pass_time)
        assert fail()[0] == 200
    status, _, answer = fail()
    assert (status, answer["error"]["code"]) == (403, "agent_refused")
    with pytest.raises(RefusedError, match="12 sessions in a row of the agents 'broken' at 127"):
        claim(server.url, name="broken")
    healthy = Claimant(address="127.0.0.1", name="healthy")
    server.call(lambda: server.book.claimants.deliver(healthy))
    assert claim(server.url, name="healthy") is not None
    assert posted(server, {"name": "x" * 101})[0] == posted(server, {"name": 1})[0] == 400


def test_requests_that_are_not_to_the_model(server: SessionServer) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert claimed is not None
    for route in ("conversations", "embeddings", "nonsense/x"):
        with pytest.raises(RefusedError, match="404"):
            claimed._post(route, {})
    assert session.refused_route == "POST /v1/nonsense/x"
    with pytest.raises(RefusedError, match="404"):
        claimed._post("%1b[2J" + 100 * "x", {})
    assert session.refused_route == "POST /v1/?[2J" + 47 * "x", "it is shown in logs"
    assert server.book.num_wrong_routes == {"conversations": 1, "embeddings": 1, "other": 2}
    before = session.num_heard
    claimed.heartbeat()
    claimed.reward(1.0)
    assert session.num_heard == before + 2
    assert not claimed.end(), "there is no turn, so no sample"


def test_the_client_is_one_file_of_the_standard_library(server: SessionServer, tmp_path: Path) -> None:
    """It is copied to machines of agents, without torch and without this project."""
    shutil.copy(FILE, tmp_path)
    session = server.add(example=EXAMPLE)
    code = (
        "import sys, areal_like_client\n"
        "session = areal_like_client.claim(sys.argv[1])\n"
        "session.reward(0.5, metrics={'steps': 3})\n"
        "session.end()\n"
        "print(*(name for name in sys.modules if name.startswith('areal_like')))"
    )
    alone = subprocess.run(
        [sys.executable, "-S", "-c", code, server.url], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.split() == ["areal_like_client"]
    assert session.reward == 0.5 and session.metrics == {"steps": 3.0}
    assert f"session {session.id} is no sample: no request to the model was answered" in alone.stderr


@pytest.mark.long
def test_the_client_is_a_package(tmp_path: Path) -> None:
    shutil.copytree(FILE.parent, tmp_path / "client", ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, *install, str(tmp_path / "client")], check=True)
    assert (target / "areal_like_client.py").read_bytes() == FILE.read_bytes()
    assert list(target.glob("areal_like_client-*.dist-info")) and not (target / "areal_like").exists()


def test_end_says_why_there_is_no_sample(server: SessionServer, caplog: pytest.LogCaptureFixture) -> None:
    session = server.add(example=EXAMPLE, needs_reward=True)
    claimed = claim(server.url)
    assert claimed is not None
    claimed._post("chat/completions", {"messages": [{"role": "user", "content": "2+2"}]})
    assert not claimed.end()
    assert "no reward was posted, and the task computes none: post one before the end" in caplog.text
    server.call(lambda: server.book.remove(session))
    assert not claimed.end() and caplog.text.count("no reward was posted") == 2


def test_the_end_of_the_job_is_told(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert claimed is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claim, server.url, wait_s=claims.MAX_WAIT_S)
        server.wait(lambda: num_clients(server) == 1)
        server.call(lambda: server.book.close(is_job_over=True))
        with pytest.raises(JobOverError, match="nothing left to claim"):
            waiting.result()
    server.call(lambda: server.book.remove(session))
    with pytest.raises(JobOverError):
        claimed.reward(1.0)
    with pytest.raises(JobOverError):
        claim(server.url)


def test_a_finished_server_waits_for_its_agents(server: SessionServer) -> None:
    """For a request in each session that was open, or in one of those that an agent has claimed together."""
    alone = server.add(example=EXAMPLE)
    sessions = [alone, *(server.add(example=EXAMPLE, group=group) for group in (7, 7, 9))]
    claimed, group = claim(server.url), claim_group(server.url)
    assert claimed is not None and group is not None

    def end() -> None:
        server.book.close(is_job_over=True)
        for session in sessions:
            session.close(JOB_OVER)
            server.book.remove(session)

    server.call(end)
    assert server.call(lambda: server.book.num_untold) == 3, "nobody has claimed the last one"
    server.run(agents_told(server.book, limit_s=0.01))  # an agent that asks nothing delays no end
    with pytest.raises(JobOverError):
        claimed.heartbeat()
    assert server.call(lambda: server.book.num_untold) == 2
    with pytest.raises(JobOverError):
        group.sessions[1].heartbeat()
    for one in (claimed, group):  # an agent whose last request is the end learns it, too
        with pytest.raises(JobOverError):
            one.end()
    server.run(agents_told(server.book, limit_s=HANG_LIMIT_S))
    assert not server.call(lambda: server.book.num_untold)


@pytest.fixture
def unanswered() -> Iterator[str]:
    """A URL at which nothing listens."""
    with held_port() as port:
        yield f"http://127.0.0.1:{port}"


def test_a_server_that_is_gone_is_told_apart(
    unanswered: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "_RETRY_S", 0.01)
    url = unanswered
    with pytest.raises(UnreachableError, match="claim again for a while"):
        claim(url)
    monkeypatch.setattr(client, "_PAUSE_S", 0.01)
    with pytest.raises(UnreachableError, match=r"no response for 0\.05 s"):
        claim(url, restart_s=0.05)
    (record,) = caplog.records
    assert "trying again for 0.05 s" in record.getMessage()
    session = ClaimedSession(
        id="1", base_url=f"{url}/sessions/1/v1", api_key="k", example={}, group=0, sample=0, deadline_s=None,
        idle_timeout_s=1.0,
    )  # fmt: skip
    with pytest.raises(UnreachableError):
        session.end()
    with pytest.raises(RefusedError, match="want the URL"):
        claim("file:///etc/passwd")


def test_an_agent_asks_for_shorter_limits(server: SessionServer) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url, deadline_s=400.0, idle_timeout_s=100.0)
    assert claimed is not None and (claimed.deadline_s, claimed.idle_timeout_s) == (400.0, 100.0)
    server.wait(lambda: session.state is SessionState.OPEN)
    waiting = asyncio.run_coroutine_threadsafe(
        session.wait_ended(idle_timeout_s=500.0, deadline_s=lambda: None), server._loop
    )
    server.advance(60.0)
    claimed.heartbeat()
    server.advance(60.0)
    claimed._post("chat/completions", {"messages": [{"role": "user", "content": "2+2"}]})
    deadline_s = server.call(lambda: session.conversation._policy.deadline_s - session.now_s)
    assert 300.0 < deadline_s <= 400.0
    server.advance(100.0)
    assert waiting.result(HANG_LIMIT_S) == "idle"
    for wrong in ({"deadline_s": 0.5}, {"deadline_s": 10**400}, {"idle_timeout_s": "5"}, {"group": 1}):
        assert posted(server, wrong)[0] == 400


def test_heartbeats_are_sent_in_a_block(server: SessionServer) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert claimed is not None
    quick = dataclasses.replace(claimed, idle_timeout_s=0.03)
    with quick.heartbeats():
        server.wait(lambda: session.num_heard >= 2)
    server.call(lambda: server.book.remove(session))
    with quick.heartbeats():  # it ends alone, because the session is over
        pass


def test_sessions_are_counted(server: SessionServer) -> None:
    server.add()
    server.add(example=EXAMPLE)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/sessions")
    assert json.loads(connection.getresponse().read()) == {"waiting": 1, "open": 1}
    connection.close()


def test_a_restarted_server_does_not_know_it() -> None:
    with PlaneServer().serving() as server:
        server.add(example=EXAMPLE)
        claimed = claim(server.plane.external_url)
        assert claimed is not None
        other = dataclasses.replace(claimed, base_url=claimed.base_url.replace("/0-0-0/", "/7-0-0/"))
        assert not other.end()
        with pytest.raises(SessionOverError, match="claim another"):
            other.reward(1.0)
        claimed.reward(1.0)


def test_a_session_is_claimed_over_tls(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path, "server")
    security = {"tls_certificate": str(certificate), "tls_private_key": str(private_key)}
    with PlaneServer({"security": security}).serving() as server:
        session = server.add(example=EXAMPLE)
        url = f"https://localhost:{server.port_of(external=True)}"
        claimed = claim(url, ca_file=str(certificate))
        assert claimed is not None and claimed.base_url.startswith(f"{url}/sessions/")
        claimed.reward(0.5)
        assert session.reward == 0.5
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            claim(url, restart_s=2 * HANG_LIMIT_S)
