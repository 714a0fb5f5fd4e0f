"""Samples of the coding task in real processes and sandboxes, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import SampleDone, SampleFailed
from rollout_server.tasks.base import make_task
from rollout_server.tasks.coding.repositories import Repository
from tests.rollout_server.sandbox.test_sandbox import problem_of_bwrap, processes_with
from tests.rollout_server.test_environment_attempts import Job, environments, one_result

TASK = {"name": "coding", "timeout_s": 600}
CONTEXT = 32_768
"""Tokens, which are characters here."""
SETTINGS: dict[str, Any] = {
    "sampling": {"max_new_tokens": 1024},
    "rollout": {"max_context": CONTEXT},
    "trainer": {"tokens_per_microbatch": CONTEXT},
    "episode": {"max_turns": 64},
}


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def repository() -> Repository:
    """That of the leases that `Job` grants."""
    answer = make_task(TASK, seed=0).example("train", 4).answer
    assert isinstance(answer, Repository)
    return answer


def turn(tool: str, **arguments: str) -> str:
    return f"{tool}({json.dumps(arguments)})"


@pytest.mark.chaos
def test_many_turns_are_one_record_in_a_context_of_32k() -> None:
    given = repository()
    script = [
        turn("run_tests"),
        *[turn("read", path=name) for name in sorted(given.files)] * 6,
        turn("edit", path=given.broken, old="", new=given.repaired),
        turn("run_tests"),
        "DONE",
    ]

    async def body() -> None:
        async with environments(TASK) as pool:
            result, _ = await one_result(pool, *script, task=TASK, **SETTINGS)
        assert isinstance(result, SampleDone) and not result.failure, result
        trajectory = result.record.trajectory()
        assert trajectory.reward == 1.0 and trajectory.finish_reason is FinishReason.STOP
        assert len(trajectory.turns) == len(script) and CONTEXT / 4 < len(trajectory.tokens) < CONTEXT
        assert trajectory.metrics["tool_calls"] == len(script) - 1 and trajectory.metrics["repaired"] == 1.0
        sampled = "".join(map(chr, trajectory.tokens[trajectory.loss_mask == 1]))
        assert sampled == "".join(f"{line}\0" for line in script)

    asyncio.run(body())


def test_an_episode_that_runs_out_of_turns_has_no_reward() -> None:
    given = repository()
    script = [turn("edit", path=given.broken, old="", new=given.repaired), turn("run_tests")]

    async def body() -> None:
        async with environments(TASK) as pool:
            settings = SETTINGS | {"episode": {"max_turns": 3}}
            result, _ = await one_result(pool, *script, task=TASK, **settings)
        assert isinstance(result, SampleDone) and result.record.reward == 0.0
        assert result.record.finish_reason is FinishReason.TURNS

    asyncio.run(body())


def test_nothing_is_left_when_workers_are_killed() -> None:
    """The sample is made again; what its sandbox ran is dead before that."""
    mark = uuid.uuid4().hex
    hang = f"import subprocess\nsubprocess.run(['sh', '-c', 'sleep 3600; : {mark}'])\n"
    script = [turn("edit", path=repository().broken, old="", new=hang), turn("run_tests")]

    async def body() -> None:
        async with environments(TASK) as pool:
            job = Job(pool, script, task=TASK, settings=SETTINGS)
            job.grant()
            await job.until(lambda: bool(processes_with(mark)))
            assert pool._host._zygote is not None
            os.kill(pool._host._zygote.pid, signal.SIGKILL)
            await job.until(lambda: bool(job.results))
            await job.until(lambda: not processes_with(mark))
            (lost,) = job.results
            assert isinstance(lost, SampleFailed) and lost.kind is FailureKind.ENVIRONMENT
            assert "was lost" in lost.error
            await job.runner.close()

    asyncio.run(body())
