"""Agents from outside that go without ending their session: the sample is made by the next one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from areal_like.config import from_mapping
from areal_like.failures import FailureKind
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from rollout_server.buffer_client.held_leases import SampleResult
from rollout_server.episodes.base import SingleTurn
from rollout_server.episodes.lease_runner import LeaseRunner
from rollout_server.inference.generation_gate import GenerationGate
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.maker import Sessions
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import make_task
from tests.rollout_server.test_environment_attempts import EOS, Ordinals, ScriptedEngine
from tests.rollout_server.test_episodes import Digits
from tests.support.line_chat import LineChat
from tests.support.waiting import HANG_LIMIT_S

TASK = {"name": "external"}
IDLE_TIMEOUT_S = 0.1
MAX_RETRIES = 2


@dataclass
class Job:
    """A lease of one sample, and what is reported of it."""

    book: SessionBook = field(default_factory=SessionBook)
    results: list[SampleResult] = field(default_factory=list)

    def start(self) -> LeaseRunner:
        config = from_mapping(
            {
                "sampling": {"max_new_tokens": 12},
                "rollout": {"max_context": 200},
                "task": TASK,
                "sessions": {"idle_timeout_s": IDLE_TIMEOUT_S},
                "buffer": {"max_sample_retries": MAX_RETRIES},
            }
        )
        chat = LineChat(Ordinals(), stop_token_ids=[EOS], vocab_size=1 << 20, template_kwargs={})
        runner = LeaseRunner(
            config,
            task=make_task(TASK, seed=0),
            tokenizer=Digits(),
            stop_token_ids=(EOS,),
            episode=SingleTurn(),
            rewards=None,  # type: ignore[arg-type]  # the task has none
            gate=GenerationGate(),
            on_result=self.results.append,
            sessions=Sessions(config, book=self.book, chat=chat, context_tokens=200, pool=None),
        )
        runner.engine = ScriptedEngine(["abc"])  # type: ignore[assignment]
        lease = Lease(
            lease_id=1, ticket_id=7, prompt_index=0, purpose=Purpose.TRAIN, sample_indices=[0], seed=1
        )
        runner.start([lease])
        return runner

    async def claimed(self) -> OpenSession:
        """The next session."""
        async with asyncio.timeout(HANG_LIMIT_S):
            while (session := self.book.claim()) is None:
                await asyncio.sleep(0.005)
        return session

    async def result(self) -> SampleResult:
        async with asyncio.timeout(HANG_LIMIT_S):
            while not self.results:
                await asyncio.sleep(0.005)
        (result,) = self.results
        return result


def test_the_next_agent_makes_an_abandoned_sample() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        first = await job.claimed()
        await first.answer([{"role": "user", "content": "go"}])
        second = await job.claimed()
        assert (first.id, second.id) == ("7-0-1", "7-0-1-2") and first.api_key != second.api_key
        with pytest.raises(Exception, match=r"sessions\.idle_timeout_s=0\.1"):
            first.check_open()
        call = second.begin(
            b"", lambda: second.answer([{"role": "user", "content": "go"}]), is_repetition=False
        )
        await call.answer()
        call.is_delivered = True
        second.set_reward(0.5)
        second.end()
        result = await job.result()
        assert isinstance(result, SampleDone) and result.lease_id == 1
        assert result.record.trajectory().num_turns == 1 and result.record.trajectory().reward == 0.5
        await runner.close()

    asyncio.run(run())


def test_a_sample_that_each_agent_abandons_fails() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        ids = [(await job.claimed()).id for _ in range(1 + MAX_RETRIES)]
        assert ids == ["7-0-1", "7-0-1-2", "7-0-1-3"]
        result = await job.result()
        assert isinstance(result, SampleFailed) and result.kind is FailureKind.ENVIRONMENT
        assert "no request" in result.error and not len(job.book)
        await runner.close()

    asyncio.run(run())
