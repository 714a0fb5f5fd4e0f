"""The external agents of the guide run as they are written: in Python with the client, and in JavaScript."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from areal_like.client import areal_like_client
from rollout_server.sessions.open_session import SessionState
from rollout_server.tasks.base import Example
from tests.support.launching import ROOT
from tests.support.session_server import SessionServer

CLIENT = str(Path(areal_like_client.__file__).parent)
NODE = shutil.which("node")


def code_of(name: str) -> str:
    """The block of the guide that begins with the name of its file."""
    page = (ROOT / "docs" / "guides" / "agents.md").read_text()
    (code,) = re.findall(rf"^```\w+\n((?:#|//) {re.escape(name)}\n.*?)^```", page, re.M | re.S)
    return textwrap.dedent(code)


def works(server: SessionServer, tmp_path: Path, name: str, *command: str) -> None:
    """An agent makes two samples, and ends with the job."""
    (tmp_path / name).write_text(code_of(name))
    sessions = [server.add(example=Example(prompt="2+2", answer=answer)) for answer in ("ok", "no")]
    with subprocess.Popen(
        [*command, str(tmp_path / name), server.url],
        env={"PYTHONPATH": CLIENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as agent:
        server.wait(
            lambda: all(one.state is SessionState.ENDED for one in sessions) or agent.poll() is not None
        )
        server.call(lambda: server.book.close(is_job_over=True))
        out, _ = agent.communicate()
    assert (agent.returncode, out) == (0, "")
    assert [one.reward for one in sessions] == [1.0, 0.0]


def test_the_agent_in_python_works(server: SessionServer, tmp_path: Path) -> None:
    works(server, tmp_path, "outside.py", sys.executable)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_agent_in_javascript_works(server: SessionServer, tmp_path: Path) -> None:
    works(server, tmp_path, "outside.mjs", str(NODE))
    assert [one.metrics for one in server.sessions] == [{"letters": 2.0}] * 2


def test_the_agent_that_ranks_a_group_works(server: SessionServer, tmp_path: Path) -> None:
    sessions = [server.add(example=Example(prompt="2+2", answer="4"), group=7) for _ in range(3)]
    server.policy.texts = ["long", "longest", "l"]
    (tmp_path / "ranking.py").write_text(code_of("ranking.py"))
    agent = subprocess.run(
        [sys.executable, str(tmp_path / "ranking.py"), server.url],
        env={"PYTHONPATH": CLIENT},
        capture_output=True,
        text=True,
    )
    assert (agent.returncode, agent.stderr) == (0, "")
    texts = {one.conversation.turns[0].messages[-1]["content"]: one.reward for one in sessions}
    assert texts == {"l": 1.0, "long": 0.5, "longest": 0.0}
    assert all(one.state is SessionState.ENDED for one in sessions)
