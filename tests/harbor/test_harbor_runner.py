"""Real trials of Harbor in real sessions, whose turns a script says. No containers: see `environments`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.engine_harness import Engine, load_model
from tests.support.mcp_servers import sandbox
from tests.support.scripted_policy import check_logprobs, finished, serving_plane
from tests.support.waiting import HANG_LIMIT_S

HERE = Path(__file__).parent
AGENT = json.dumps({"import_path": "environments.scribe:Scribe"})
ENVIRONMENT = json.dumps({"import_path": "environments.bubblewrap:BubblewrapEnvironment"})
pytestmark = pytest.mark.anyio


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks."""
    for number in range(2):
        shutil.copytree(HERE / "tasks" / "short", tmp_path / "tasks" / f"short_{number}")
    return tmp_path / "tasks"


@asynccontextmanager
async def running(
    interpreter: str, tasks: Path, url: str, *args: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The runner."""
    process = await asyncio.create_subprocess_exec(
        interpreter, "-m", "areal_like.agents.harbor_runner", str(tasks), "--url", url, *args,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}"}, cwd=tasks.parent,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_rewards_are_those_of_the_verifiers(
    interpreter: str, engine: Engine, model: Path, tasks: Path
) -> None:
    if sandbox() != "bwrap":
        pytest.skip("bwrap does not work here")
    async with engine.client() as client, serving_plane() as plane:
        answers = ["abcd", "fail", "a longer one than that"]
        sessions = [plane.script(client, [answer], is_waiting=True) for answer in answers]
        options = ("--agent", AGENT, "--environment", ENVIRONMENT, "--concurrency", "2")
        async with running(interpreter, tasks, plane.book.url, *options) as process:
            async with asyncio.timeout(HANG_LIMIT_S):
                while any(session.state.name in ("WAITING", "OPEN") for session in sessions):
                    await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            out, err = await asyncio.wait_for(process.communicate(), HANG_LIMIT_S)
        assert process.returncode == 0, err.decode()
        assert "2 rollouts, 1 failed" in out.decode(), err.decode()
        assert "the trial has no valid reward (RewardFileNotFoundError" in err.decode()
        rewards = [session.reward for session in sessions if session.has_rewards]
        assert rewards == [1 - 4 / 32, 1 - 22 / 32]
        for session in sessions:
            check_logprobs(finished(session), load_model(model))
    assert [path.name for path in tasks.parent.iterdir()] == ["tasks"]  # no records of trials are left


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval-rows", "2"], "there are 2 rows"),
        (["--agent", '{"nam": "terminus-2"}'], "--agent: Harbor has no nam; it has name"),
        (["--environment", '{"type": "nowhere"}'], "--environment: "),
        (["--environment", '{"import_path": "no.such:Environment"}'], "--environment: "),
        (["--agent", "[]"], "invalid JSON object value"),
    ],
)
async def test_bad_input(interpreter: str, tasks: Path, args: list[str], message: str) -> None:
    async with running(interpreter, tasks, "http://127.0.0.1:9", *args) as process:
        _, err = await asyncio.wait_for(process.communicate(), HANG_LIMIT_S)
    assert process.returncode == 2
    assert message in err.decode()
    assert "Traceback" not in err.decode()


async def test_a_directory_without_tasks(interpreter: str, tmp_path: Path) -> None:
    async with running(interpreter, tmp_path, "http://127.0.0.1:9") as process:
        _, err = await asyncio.wait_for(process.communicate(), HANG_LIMIT_S)
    assert process.returncode == 2 and "no directory in it has a task.toml" in err.decode()
