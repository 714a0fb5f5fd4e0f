"""Real environments of verifiers in real sessions, whose turns a script says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rollout_server.sessions.open_session import OpenSession
from tests.support.engine_harness import Engine, load_model
from tests.support.scripted_policy import Plane, check_logprobs, finished, serving_plane

HERE = Path(__file__).parent
START_S = 60.0
pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running(
    interpreter: str, url: str, model: Path, *args: str, traces: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The runner."""
    paths = f"{HERE.parent.parent}{os.pathsep}{HERE / 'environments'}"
    process = await asyncio.create_subprocess_exec(
        interpreter, "-m", "areal_like.agents.verifiers_runner", "short_words",
        "--url", url, "--model", str(model), *args,
        env=os.environ | {"PYTHONPATH": paths} | ({"TRACES": str(traces)} if traces else {}),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def wait_closed(sessions: list[OpenSession]) -> None:
    async with asyncio.timeout(START_S):
        while any(session.state.name in ("WAITING", "OPEN") for session in sessions):
            await asyncio.sleep(0.05)


def open_sessions(plane: Plane, engine_client: object, answers: list[str]) -> list[OpenSession]:
    return [plane.script(engine_client, [answer], is_waiting=True) for answer in answers]  # type: ignore[arg-type]


async def test_tokens_and_rewards_are_those_of_verifiers(
    interpreter: str, engine: Engine, model: Path, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    async with engine.client() as client, serving_plane() as plane:
        answers = ["abc", "", "a longer one"]
        sessions = open_sessions(plane, client, answers)
        async with running(interpreter, plane.book.url, model, traces=traces) as process:
            await wait_closed(sessions)
            process.send_signal(signal.SIGTERM)
            out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err.decode()
        assert "3 rollouts, 0 failed" in out.decode(), err.decode()
        assert [session.reward for session in sessions] == [1 - len(text) / 64 for text in answers]
        seen = {
            trace["answer"]: trace["token_ids"] for trace in map(json.loads, traces.read_text().splitlines())
        }
        for answer, session in zip(answers, sessions, strict=True):
            trajectory = finished(session)
            check_logprobs(trajectory, load_model(model))
            assert trajectory.tokens.tolist() == seen[answer]


async def test_a_failed_reward_fails_one_session(interpreter: str, engine: Engine, model: Path) -> None:
    async with engine.client() as client, serving_plane() as plane:
        sessions = open_sessions(plane, client, ["fail", "ab"])
        async with running(interpreter, plane.book.url, model, "--concurrency", "1") as process:
            await wait_closed(sessions)
            process.send_signal(signal.SIGTERM)
            out, err = await asyncio.wait_for(process.communicate(), 30)
        assert "1 rollouts, 1 failed" in out.decode()
        assert "the reward has failed" in err.decode()
        assert sorted(session.has_rewards for session in sessions) == [False, True]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--eval-rows", "8"], "there are 8 rows"),
        (["--model", "/nowhere"], "has no tokenizer_config.json"),
        (["--env-args", '{"agent": {"harness": {"id": "nosuch"}}}'], "nosuch"),
        (["--env-args", "[]"], "invalid JSON object value"),
    ],
)
async def test_bad_input(interpreter: str, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    async with running(interpreter, "http://127.0.0.1:9", tmp_path, *args) as process:
        _, err = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == 2
    assert message in err.decode()
    assert "Traceback" not in err.decode()
