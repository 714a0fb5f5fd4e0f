"""The external agents of the guide run as they are written: in Python with the client, and in JavaScript."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.client import areal_like_client
from rollout_server.sessions.book import JOB_OVER
from rollout_server.sessions.open_session import SessionOutcome, SessionState
from rollout_server.tasks.base import Example
from tests.support.guide_code import code_of
from tests.support.ports import held_port
from tests.support.session_plane import PlaneServer, read_request
from tests.support.session_server import SessionServer
from tests.support.waiting import HANG_LIMIT_S

CLIENT = str(Path(areal_like_client.__file__).parent)
NODE = shutil.which("node")


def written(tmp_path: Path, name: str) -> str:
    """The path of an agent of the guide; one in JavaScript imports the client that the guide has, too."""
    for file in {name, "areal_like.mjs"} if name.endswith(".mjs") else {name}:
        (tmp_path / file).write_text(code_of("agents", file))
    return str(tmp_path / name)


def started(*command: str) -> subprocess.Popen[str]:
    """An agent, whose lines of both kinds are in `stdout`."""
    return subprocess.Popen(
        command,
        env={"PYTHONPATH": CLIENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def works(server: SessionServer, tmp_path: Path, name: str, *command: str) -> None:
    """An agent makes two samples, and ends with the job."""
    path = written(tmp_path, name)
    sessions = [server.add(example=Example(prompt="2+2", answer=answer)) for answer in ("ok", "no")]
    with started(*command, path, server.url) as agent:
        server.wait(
            lambda: all(one.state is SessionState.ENDED for one in sessions) or agent.poll() is not None
        )
        server.call(lambda: server.book.close(is_job_over=True))
        out, _ = agent.communicate()
    assert (agent.returncode, out) == (0, f"{JOB_OVER}\n")
    assert [one.reward for one in sessions] == [1.0, 0.0]


@pytest.fixture
def port() -> Iterator[int]:
    """It is not given to others while no server listens at it."""
    with held_port() as held:
        yield held


def goes_on(tmp_path: Path, port: int, name: str, *command: str) -> None:
    """An agent loses its server in the middle of a sample, and makes one of the next server."""
    path = written(tmp_path, name)
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(HANG_LIMIT_S)
        agent = started(*command, path, f"http://127.0.0.1:{port}")
        for answer in (claimed_at(port), b""):  # to the request to the model there is none
            with listener.accept()[0] as connection:
                read_request(connection)
                connection.sendall(answer)
    assert agent.stdout is not None
    try:
        assert "trying again for 300 s" in agent.stdout.readline()
        with PlaneServer({"sessions": {"port": port - 1}}).serving() as server:  # rollout-1: one above
            session = server.add(example=Example(prompt="2+2", answer="ok"))
            server.wait(lambda: session.state is SessionState.ENDED or agent.poll() is not None)
            server.call(lambda: server.book.close(is_job_over=True))
            assert (agent.stdout.read(), agent.wait()) == (f"{JOB_OVER}\n", 0)
        assert session.reward == 1.0
    finally:
        agent.kill()
        agent.communicate()


def claimed_at(port: int) -> bytes:
    """The response to a claim, with a session at this port."""
    session = {
        "id": "0-0-0", "base_url": f"http://127.0.0.1:{port}/sessions/0-0-0/v1", "api_key": "k", "group": 0,
        "sample": 0, "deadline_s": None, "idle_timeout_s": 500.0,
        "example": {"split": "train", "index": 0, "prompt": "2+2", "answer": "ok"},
    }  # fmt: skip
    body = json.dumps(session)
    return f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.chaos
def test_the_agent_in_python_outlives_a_server(tmp_path: Path, port: int) -> None:
    goes_on(tmp_path, port, "outside.py", sys.executable)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_agent_in_javascript_outlives_a_server(tmp_path: Path, port: int) -> None:
    goes_on(tmp_path, port, "outside.mjs", str(NODE))


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_agent_in_javascript_ends_without_a_server(tmp_path: Path, port: int) -> None:
    path, code = Path(written(tmp_path, "outside.mjs")), code_of("agents", "outside.mjs")
    path.write_text(code.replace("{ token }", "{ token, restartS: 0.01 }"))
    command = [str(NODE), path, f"http://127.0.0.1:{port}"]
    agent = subprocess.run(command, env={}, capture_output=True, text=True)
    assert agent.returncode == 0
    told = f"http://127.0.0.1:{port}/sessions: no response"
    assert agent.stderr.splitlines() == [f"{told}: trying again for 0.01 s", told]


def ends_at_once(server: SessionServer, tmp_path: Path, name: str, *command: str) -> None:
    """The job ends while an agent waits for the model: it ends, too, and looks for no other session."""
    path = written(tmp_path, name)
    server.policy.open.clear()
    session = server.add(example=Example(prompt="2+2", answer="4"))
    with started(*command, path, server.url) as agent:
        server.wait(lambda: session.num_pending > 0 or agent.poll() is not None)

        def end() -> None:
            server.book.close(is_job_over=True)
            session.close(JOB_OVER)
            server.book.remove(session, SessionOutcome.CANCELLED)

        server.call(end)
        out, _ = agent.communicate()
    assert (agent.returncode, out) == (0, "")
    assert server.call(lambda: server.book.num_refused) == {410: 1}


@pytest.mark.chaos
def test_the_agent_in_python_ends_with_its_request(server: SessionServer, tmp_path: Path) -> None:
    ends_at_once(server, tmp_path, "outside.py", sys.executable)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_agent_in_node_ends_with_its_request(server: SessionServer, tmp_path: Path) -> None:
    ends_at_once(server, tmp_path, "outside.mjs", str(NODE))


def test_the_agent_in_python_works(server: SessionServer, tmp_path: Path) -> None:
    works(server, tmp_path, "outside.py", sys.executable)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_agent_in_javascript_works(server: SessionServer, tmp_path: Path) -> None:
    works(server, tmp_path, "outside.mjs", str(NODE))
    assert [one.metrics for one in server.sessions] == [{"letters": 2.0}] * 2


def test_the_agent_that_ranks_a_group_works(server: SessionServer, tmp_path: Path) -> None:
    sessions = [server.add(example=Example(prompt="2+2", answer="4"), group=7) for _ in range(3)]
    server.policy.texts = ["long", "longest", "l"]
    path = written(tmp_path, "ranking.py")
    agent = subprocess.run(
        [sys.executable, path, server.url],
        env={"PYTHONPATH": CLIENT},
        capture_output=True,
        text=True,
    )
    assert (agent.returncode, agent.stderr) == (0, "")
    texts = {one.conversation.turns[0].messages[-1]["content"]: one.reward for one in sessions}
    assert texts == {"l": 1.0, "long": 0.5, "longest": 0.0}
    assert all(one.state is SessionState.ENDED for one in sessions)
