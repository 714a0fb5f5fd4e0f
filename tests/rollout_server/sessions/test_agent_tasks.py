"""Tasks with `agent()`: leases, real agent processes and real HTTP; the engine answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone
from rollout_server.buffer_client.held_leases import Place, SampleResult
from rollout_server.environments.workers.pool import EnvironmentPool
from rollout_server.episodes.base import SingleTurn
from rollout_server.episodes.lease_runner import LeaseRunner
from rollout_server.inference.generation_gate import GenerationGate
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.maker import Sessions
from rollout_server.tasks.base import make_task
from tests.rollout_server.test_environment_attempts import EOS, Ordinals, ScriptedEngine
from tests.rollout_server.test_episodes import Digits
from tests.support.agent_tasks import index_of
from tests.support.line_chat import LineChat
from tests.support.session_http import serving

pytestmark = pytest.mark.timeout(60)
TASK = {"_target_": "tests.support.agent_tasks.AgentTask"}


@pytest.fixture(autouse=True)
def processes_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))


class Job:
    """A lease runner with agents, and what it reported."""

    def __init__(self, pool: EnvironmentPool, book: SessionBook, settings: dict[str, Any]) -> None:
        self.pool = pool
        self.book = book
        self.results: list[SampleResult] = []
        self.places: list[Place] = []
        self.engine = ScriptedEngine(["abc"])
        config = from_mapping(
            {"sampling": {"max_new_tokens": 12}, "rollout": {"max_context": 200}, "task": TASK} | settings
        )
        chat = LineChat(Ordinals(), stop_token_ids=[EOS], vocab_size=1 << 20, template_kwargs={})
        self.runner = LeaseRunner(
            config,
            task=make_task(TASK, seed=0),
            tokenizer=Digits(),
            stop_token_ids=(EOS,),
            episode=SingleTurn(),
            rewards=None,  # type: ignore[arg-type]  # the task has none
            gate=GenerationGate(),
            on_result=self.results.append,
            on_move=lambda lease, sample, place: self.places.append(place),
            sessions=Sessions(
                config, book=book, chat=chat, context_tokens=config.rollout.max_context, pool=pool
            ),
        )
        self.runner.engine = self.engine  # type: ignore[assignment]

    def grant(self, script: str, *, lease_id: int = 1, num_samples: int = 1) -> None:
        lease = Lease(
            lease_id=lease_id,
            ticket_id=7,
            prompt_index=index_of(script),
            purpose=Purpose.TRAIN,
            sample_indices=list(range(num_samples)),
            seed=100,
        )
        self.runner.start([lease])

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_so():
                await asyncio.sleep(0.005)
        assert not self.runner.failed.done()

    async def result(self, script: str) -> SampleResult:
        self.grant(script)
        await self.until(lambda: bool(self.results))
        return self.results[0]


@contextlib.asynccontextmanager
async def agents() -> AsyncIterator[EnvironmentPool]:
    async with EnvironmentPool(TASK, seed=0, step_timeout_s=20.0, memory_mb=512) as pool:
        yield pool


@contextlib.asynccontextmanager
async def job(pool: EnvironmentPool, **settings: Any) -> AsyncIterator[Job]:
    book = SessionBook()
    async with serving(book):
        made = Job(pool, book, settings)
        try:
            yield made
        finally:
            await made.runner.close()
            assert not len(book) and not pool.num_open


async def result_of(pool: EnvironmentPool, script: str, **settings: Any) -> SampleResult:
    async with job(pool, **settings) as running:
        return await running.result(script)


def test_an_agent_makes_a_sample() -> None:
    async def body() -> None:
        async with agents() as pool, job(pool) as running:
            result = await running.result("three turns")
            assert isinstance(result, SampleDone), result
            trajectory = result.record.trajectory()
            assert "".join(map(chr, trajectory.tokens)) == "go\nabc\0turn 0\nabc\0turn 1\nabc\0"
            sampled = "".join(map(chr, trajectory.tokens[trajectory.loss_mask == 1]))
            assert sampled == "abc\0" * 3 and trajectory.finish_reason is FinishReason.STOP
            assert trajectory.reward == 0.5 and trajectory.label == "three"
            assert len(trajectory.turns) == 3 and not trajectory.segments
            assert trajectory.metrics == {"tool_calls": 0.0}
            assert running.places == [Place.TOOL, *[Place.ENGINE, Place.TOOL] * 3]

    asyncio.run(body())
