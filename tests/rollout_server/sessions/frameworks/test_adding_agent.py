"""The task `adding_agent`: its agent adds in a session, with each API, and what the task needs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from areal_like.errors import ConfigError
from benchmarks.conversations import CONVERSATIONS
from rollout_server.agents.base import Session
from rollout_server.tasks.base import make_task
from tests.support.engine_harness import Engine
from tests.support.framework_sessions import framework_session
from tests.support.quick import only_in_chaos
from tests.support.scripted_policy import tool_call

MODULE = "rollout_server.agents.adding"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all: that of the agent's HTTP client, as in a process of agents."""
    pytest.importorskip("agents", reason="needs openai-agents")
    from rollout_server.agents import adding

    with asyncio.Runner() as runner:
        yield runner
        runner.run(adding.CLIENT.close())


@pytest.mark.parametrize("api", CONVERSATIONS)
@pytest.mark.parametrize(
    ("replies", "reward"),
    [
        ([tool_call("add", a=13, b=93), "{answer}"], 1.0),
        (["13"], 0.0),
        ([tool_call("subtract", a=13, b=93)], 0.0),
        *only_in_chaos((10 * [tool_call("add", a=13, b=93)], 0.0)),
    ],
    ids=["right", "wrong", "unknown tool", "too many turns"],
)
def test_an_agent_adds(
    engine: Engine, reference: Any, runner: asyncio.Runner, replies: list[str], reward: float, api: str
) -> None:
    task = make_task({"_target_": "benchmarks.adding_agents.AddingWithTask", "api": api}, seed=0)
    example = task.example("train", 0)
    said = [reply.replace("{answer}", example.answer) for reply in replies]

    async def scenario() -> None:
        async with framework_session(engine, *said) as session:
            given = Session(base_url=session.base_url, api_key=session.api_key)
            assert await task.agent(example, given) == reward
            session.check_segments(list(range(len(said))), reference=reference)

    runner.run(scenario())


def test_only_the_agent_of_the_job_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "agents", None)
    with pytest.raises(ConfigError, match="pip install openai-agents"):
        make_task({"name": "adding_agent"}, seed=0)
    task = make_task({"name": "adding_agent", "external": True}, seed=0)
    example = task.example("train", 0)
    assert example.answer == str(sum(map(int, str(example.prompt).split("+"))))
    assert example == make_task({"name": "adding"}, seed=0).example("train", 0)
