"""Tasks with `agent()`: leases, real agent processes and real HTTP; the engine answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.errors import SessionGoneError
from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import SampleDone, SampleFailed
from rollout_server.leases.held_leases import Place, SampleResult
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.http.plane import SessionPlane
from rollout_server.sessions.open_session import SessionOutcome
from rollout_server.workers.environment_pool import EnvironmentPool
from tests.rollout_server.test_environment_attempts import Job as EnvironmentJob
from tests.support import moved_clock
from tests.support.agent_tasks import index_of
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S, is_alive
from tests.support.workers import environment_pool

TASK = {"_target_": "tests.support.agent_tasks.AgentTask"}


@pytest.fixture(autouse=True)
def processes_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "of another service")


class Job(EnvironmentJob):
    """A lease runner with agents, and what it reported."""

    def __init__(self, pool: EnvironmentPool, book: SessionBook, settings: dict[str, Any]) -> None:
        super().__init__(pool, ["abc"], task=TASK, settings=settings, book=book)
        self.pool = pool
        self.book = book

    def start(self, script: str, *, lease_id: int = 1, num_samples: int = 1) -> None:
        self.grant(lease_id, num_samples=num_samples, prompt_index=index_of(script))

    async def result(self, script: str, *, lease_id: int = 1, idle_s: float = 0.0) -> SampleResult:
        """`idle_s`: time that passes once the agent has read the model's first response."""
        self.start(script, lease_id=lease_id)
        if idle_s:
            await self.until(self._has_delivered)
            advance(idle_s)
        await self.until(lambda: bool(self.results))
        return self.results[0]

    def _has_delivered(self) -> bool:
        calls = [call for session in self.book.open for call, _ in session._calls.completed()]
        return self.places[-1:] == [Place.TOOL] and bool(calls) and all(call.is_delivered for call in calls)


@contextlib.asynccontextmanager
async def agents() -> AsyncIterator[EnvironmentPool]:
    async with environment_pool(TASK, memory_mb=512) as pool:
        yield pool


@contextlib.asynccontextmanager
async def job(pool: EnvironmentPool, **settings: Any) -> AsyncIterator[Job]:
    book = SessionBook()
    plane = SessionPlane(
        config=from_mapping({}),
        app=session_app(book, model="policy", max_context=200, idle_timeout_s=HANG_LIMIT_S),
        book=book,
        keyring=None,
        index=0,
        needs_external=False,
        max_body_bytes=1 << 20,
    )
    await plane.start()
    book.url = plane.internal_url
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(plane.close)
        made = Job(pool, book, settings)
        try:
            yield made
        finally:
            await made.runner.close()
            assert not len(book) and not pool.num_open


async def result_of(
    pool: EnvironmentPool, script: str, *, idle_s: float = 0.0, **settings: Any
) -> SampleResult:
    async with job(pool, **settings) as running:
        return await running.result(script, idle_s=idle_s)


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


def test_rewards_of_an_agent() -> None:
    async def body() -> None:
        async with agents() as pool:
            scored = await result_of(pool, "score")
            assert isinstance(scored, SampleDone) and scored.record.reward == 1.25
            trajectory = scored.record.trajectory()
            assert trajectory.reward_components == {"form": 1.0} and trajectory.metrics["tries"] == 2.0
            assert [reward for _, reward in trajectory.turns] == [0.25]
            plain = await result_of(pool, "one answer")
            assert isinstance(plain, SampleDone) and plain.record.num_sampled == 4
            posted = await result_of(pool, "posted")
            assert isinstance(posted, SampleDone) and posted.record.reward == 0.75
            pids = []
            for _ in range(2):
                own = await result_of(pool, "variables")
                assert isinstance(own, SampleDone), own
                pids.append(own.record.reward)
            assert pids[0] != pids[1], "the process of an agent serves one sample"

    asyncio.run(body())


def test_branches_of_an_agent_are_segments() -> None:
    async def body() -> None:
        async with agents() as pool:
            result = await result_of(pool, "branches")
            assert isinstance(result, SampleDone), result
            trajectory = result.record.trajectory()
            text = "".join(map(chr, trajectory.tokens))
            first, second = text[: trajectory.segments[0]], text[trajectory.segments[0] :]
            assert {first, second} == {"go\nabc\0left\nabc\0", "go\nabc\0right\nabc\0"}
            assert int(trajectory.loss_mask.sum()) == 12, "the turn that both share is trained once"

    asyncio.run(body())


def test_a_failed_agent_fails_its_sample_only() -> None:
    errors = {
        "raise": "no such door",
        "exit": "SystemExit",
        "die": "signal 9",
        "hang": "idle_timeout_s=100",
        "block": "idle_timeout_s=100",
        "nan": "agent() must be a finite number",
        "no call": "no request to the model",
        "nothing": "agent() returned None and posted no reward",
        "wrong turns": "2 and 1 rewards for 1 turns",
    }

    async def body() -> None:
        retry = {"on_failure": dict.fromkeys(("environment", "reward"), "retry")}
        async with agents() as pool:
            for script, error in errors.items():
                idle_s = 100.0 if "idle" in error else 0.0
                result = await result_of(
                    pool,
                    script,
                    idle_s=idle_s,
                    sessions={"idle_timeout_s": 100.0},
                    buffer=retry,
                )
                assert isinstance(result, SampleFailed) and error in result.error, (script, result)
                kind = FailureKind.REWARD if script == "wrong turns" else FailureKind.ENVIRONMENT
                assert result.kind is kind
                assert result.num_tokens == (0 if script in ("exit", "no call") else 4), script
            assert not pool._host._workers, "every process was ended"
            # As for an environment, its tokens are a sample with reward 0 unless the job says otherwise.
            result = await result_of(pool, "raise")
            assert isinstance(result, SampleDone) and result.failure == FailureKind.ENVIRONMENT
            # Without a request to the model there is nothing to learn from, whatever the job says.
            assert isinstance(await result_of(pool, "no call"), SampleFailed)

    moved_clock.run(body())


def test_an_agent_that_waits_for_its_start_is_not_idle() -> None:
    """On a busy machine hundreds of agents wait for their processes longer than an agent may be idle."""

    async def body() -> None:
        settings = {"sessions": {"idle_timeout_s": 100.0}}
        async with agents() as pool, job(pool, **settings) as running:
            running.book.agent_starts = asyncio.Semaphore(1)
            await running.book.agent_starts.acquire()
            running.start("three turns")
            await running.until(lambda: len(running.book.open) == 1)
            advance(1000.0)
            await asyncio.sleep(0.05)
            assert not running.results and not pool.num_open
            running.book.agent_starts.release()
            await running.until(lambda: bool(running.results))
            assert isinstance(running.results[0], SampleDone), running.results
            # The first of these prepares for an hour without a request; the other gets its turn meanwhile.
            running.start("prepares", lease_id=2)
            running.start("three turns", lease_id=3)
            await running.until(lambda: pool.num_open == 1)
            advance(10.0)
            await running.until(lambda: len(running.results) == 2)
            assert isinstance(running.results[1], SampleDone) and running.results[1].lease_id == 3
            advance(100.0)
            await running.until(lambda: len(running.results) == 3)
            assert "idle_timeout_s=100" in running.results[2].error  # type: ignore[union-attr]

    moved_clock.run(body())


def test_each_budget_ends_a_session_as_a_truncated_sample() -> None:
    cases: list[tuple[dict[str, Any], FinishReason, int]] = [
        ({"episode": {"max_turns": 2}}, FinishReason.TURNS, 8),
        # 3 tokens of the first message, 4 of the turn, 5 of the next message, 4 of the turn: 2 are left.
        ({"episode": {"max_tokens": 18}}, FinishReason.TOKENS, 8),
        ({"rollout": {"max_context": 18}}, FinishReason.CONTEXT, 8),
    ]

    async def body() -> None:
        async with agents() as pool:
            for settings, reason, num_sampled in cases:
                for script, reward in {"endless": 0.0, "endless quietly": 1.0}.items():
                    result = await result_of(pool, script, **settings)
                    assert isinstance(result, SampleDone) and not result.failure, result
                    record = result.record
                    assert (record.finish_reason, record.num_sampled) == (reason, num_sampled)
                    assert record.reward == reward and reason.is_truncated
            result = await result_of(pool, "incomplete")
            assert isinstance(result, SampleDone) and not result.failure, result
            record = result.record
            assert (record.finish_reason, record.num_sampled) == (FinishReason.LENGTH, 6)
            late = {"sample_timeout_s": 100.0, "max_context": 99}
            for script in ("hang", "block"):
                result = await result_of(pool, script, idle_s=100.0, rollout=late)
                assert isinstance(result, SampleDone), result
                assert (result.record.finish_reason, result.record.num_sampled) == (FinishReason.TIMEOUT, 4)

    moved_clock.run(body())


def test_what_an_agent_leaves_behind_is_killed() -> None:
    async def body() -> None:
        async with agents() as pool, job(pool) as running:
            result = await running.result("child")
            assert isinstance(result, SampleDone), result
            child = int(result.record.reward)
            await running.until(lambda: not is_alive(child))
            running.results.clear()
            assert isinstance(await running.result("thread", lease_id=2), SampleDone)
            await running.until(lambda: not pool._host._workers)

    asyncio.run(body())


def test_a_cancelled_lease_kills_its_agents() -> None:
    async def body() -> None:
        async with agents() as pool, job(pool) as running:
            running.start("block", lease_id=3, num_samples=2)
            await running.until(lambda: len(running.engine.num_turns) == 2)
            assert sorted(session.id for session in running.book.open) == ["3-0-3", "3-1-3"]
            running.runner.cancel([3], reason="its sample was given up: engine lost")
            await running.until(lambda: not len(running.book) and not pool._host._workers)
            with pytest.raises(SessionGoneError, match="engine lost"):
                running.book.find("3-0-3")
            assert running.book.num_ended == {SessionOutcome.CANCELLED: 2}
            assert not running.results and not pool.num_restarts

    asyncio.run(body())
