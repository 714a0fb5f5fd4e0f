"""External agents that go without ending their session: the sample is made by the next one."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.errors import AgentLostError, SessionGoneError
from areal_like.failures import FailureKind
from areal_like.trajectory import LARGEST_REWARD, FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from rollout_server.leases.held_leases import SampleResult
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.lease_runner import AgentTries, LeaseRunner
from rollout_server.sessions.book import JOB_OVER, SessionBook
from rollout_server.sessions.claimants import LONGEST_WAIT_S, NUM_FREE, Claimant
from rollout_server.sessions.open_session import AskedLimits, OpenSession
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Score, make_task
from rollout_server.tasks.external import ExternalTask
from rollout_server.workers.reward_pool import Reward
from tests.rollout_server.test_environment_attempts import EOS, Ordinals, ScriptedEngine
from tests.rollout_server.test_episodes import Digits
from tests.support import moved_clock
from tests.support.line_chat import LineChat
from tests.support.moved_clock import advance
from tests.support.reported import Reported
from tests.support.waiting import HANG_LIMIT_S

TASK = {"name": "external"}
IDLE_TIMEOUT_S = 100.0
MAX_RETRIES = 2


@dataclass
class Job:
    """A lease of one sample, and what is reported of it."""

    book: SessionBook = field(default_factory=SessionBook)
    results: list[SampleResult] = field(default_factory=list)
    rewards: Any = None
    """Of the task; None: it has none."""

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
            {
                "": SampleSource(
                    task=make_task(TASK, seed=0),
                    renderer=Digits(stop_token_ids=(EOS,), chat=chat),  # type: ignore[arg-type]
                    context_tokens=200,
                    rewards=self.rewards,
                )
            },
            gate=GenerationGate(),
            buffers=Reported(self.results),  # type: ignore[arg-type]
            book=self.book,
        )
        runner.engine = ScriptedEngine(["abc"])  # type: ignore[assignment]
        lease = Lease(
            lease_id=1, ticket_id=7, prompt_index=0, purpose=Purpose.TRAIN, sample_indices=[0], seed=1
        )
        runner.start([lease])
        return runner

    async def offered(self) -> OpenSession:
        """The next session."""
        async with asyncio.timeout(HANG_LIMIT_S):
            while (session := self.book.offer()) is None:
                await asyncio.sleep(0.005)
        return session

    async def claimed(self) -> OpenSession:
        """The next session, claimed."""
        session = await self.offered()
        session.claim()
        return session

    async def abandoned(self) -> OpenSession:
        """The next session, after its agent has made no request for too long."""
        session = await self.claimed()
        advance(IDLE_TIMEOUT_S)
        return session

    async def result(self) -> SampleResult:
        async with asyncio.timeout(HANG_LIMIT_S):
            while not self.results:
                await asyncio.sleep(0.005)
        (result,) = self.results
        return result


async def delivered(session: OpenSession) -> None:
    """One turn, whose answer its client has read."""
    call = session.begin(
        b"", lambda: session.sample_turn([{"role": "user", "content": "go"}]), is_repetition=False
    )
    await call.turn()
    call.is_delivered = True


def test_the_next_agent_makes_an_abandoned_sample() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        first = await job.claimed()
        await first.sample_turn([{"role": "user", "content": "go"}])
        advance(IDLE_TIMEOUT_S)
        second = await job.claimed()
        assert (first.id, second.id) == ("7-0-1", "7-0-1-2") and first.api_key != second.api_key
        with pytest.raises(Exception, match=r"sessions\.idle_timeout_s=100: claim another session"):
            first.check_open()
        await delivered(second)
        second.set_reward(0.5)
        second.end()
        result = await job.result()
        assert isinstance(result, SampleDone) and result.lease_id == 1
        assert result.record.trajectory().num_turns == 1 and result.record.trajectory().reward == 0.5
        await runner.close()

    moved_clock.run(run())


def test_what_an_agent_posts_is_recorded() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        session = await job.claimed()
        await delivered(session)
        (id,) = session._calls._by_id
        session.set_reward(1.0, turns={f"chatcmpl-{id}": 0.5}, metrics={"steps": 3.0}, label="hard")
        session.end()
        result = await job.result()
        assert isinstance(result, SampleDone)
        trajectory = result.record.trajectory()
        assert (trajectory.reward, trajectory.label) == (1.5, "hard")
        assert trajectory.metrics == {"steps": 3.0, "tool_calls": 0.0}
        assert [reward for _, reward in trajectory.turns] == [0.5]
        await runner.close()

    moved_clock.run(run())


def test_limits_that_an_agent_asked_for_count() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        first = await job.offered()
        first.asked = AskedLimits(idle_timeout_s=IDLE_TIMEOUT_S / 10)
        first.claim()
        advance(IDLE_TIMEOUT_S / 10)
        second = await job.offered()
        with pytest.raises(SessionGoneError, match="its claim's idle_timeout_s=10"):
            first.check_open()
        second.asked = AskedLimits(deadline_s=IDLE_TIMEOUT_S / 2)
        second.claim()
        await delivered(second)
        second.set_reward(0.5)
        advance(IDLE_TIMEOUT_S / 2)
        result = await job.result()
        assert isinstance(result, SampleDone)
        assert result.record.finish_reason is FinishReason.TIMEOUT
        assert result.record.trajectory().reward == 0.5
        with pytest.raises(SessionGoneError, match="deadline_s=50 of its claim"):
            second.check_open()
        await runner.close()

    moved_clock.run(run())


def test_a_session_says_that_the_job_is_over() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        session = await job.claimed()
        job.book.close(is_job_over=True)
        await runner.close(reason=JOB_OVER)
        with pytest.raises(SessionGoneError, match=JOB_OVER):
            session.check_open()
        assert job.results == []

    moved_clock.run(run())


def test_a_sample_that_each_agent_abandons_fails() -> None:
    async def run() -> None:
        job = Job()
        runner = job.start()
        ids = [(await job.abandoned()).id for _ in range(1 + MAX_RETRIES)]
        assert ids == ["7-0-1", "7-0-1-2", "7-0-1-3"]
        result = await job.result()
        assert isinstance(result, SampleFailed) and result.kind is FailureKind.AGENT
        assert "no request" in result.error and not len(job.book)
        await runner.close()

    moved_clock.run(run())


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("ends", "the agent has made no request to the model"),
        ("other_api", "the agent has made no request to the model (POST /v1/embeddings is not served"),
        ("no_reward", "its agent has ended it without a reward"),
        ("too_much", "the rewards that were posted cannot be used"),
    ],
)
def test_broken_agents_use_up_no_sample(kind: str, problem: str) -> None:
    """Its failures behind the first are the agent's: the sample waits for another one."""

    async def run() -> None:
        job = Job()
        runner = job.start()
        broken, healthy = Claimant(address="1.2.3.4", name="a"), Claimant(address="1.2.3.4", name="b")
        for _ in range(MAX_RETRIES + 3):
            session = await job.claimed()
            session.claimant = broken
            if kind == "other_api":
                job.book.note_wrong_route(session.id, "POST /v1/embeddings")
            if kind == "no_reward":
                await session.sample_turn([{"role": "user", "content": "go"}])
            if kind == "too_much":
                await delivered(session)
                session.set_reward(LARGEST_REWARD)
                for id in list(session._calls._by_id):
                    session.set_reward(LARGEST_REWARD, completion_id=f"chatcmpl-{id}")
            session.end()
        session = await job.claimed()
        troubles = job.book.claimants.troubles(now_s=session.now_s)
        assert troubles and all(problem in trouble for trouble in troubles)
        assert job.book.claimants.hold(healthy, now_s=session.now_s + LONGEST_WAIT_S) is None
        session.claimant = healthy
        await delivered(session)
        session.set_reward(1.0)
        session.end()
        assert isinstance(await job.result(), SampleDone)
        assert job.book.claimants.hold(healthy, now_s=session.now_s) is None
        await runner.close()

    moved_clock.run(run())


def test_posted_rewards_cannot_fail_the_tasks_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed reward of the task may end the job at its start."""

    class Task:
        async def score(self, **options: Any) -> Reward:
            return Reward(score=Score(value=1e6), seconds=0.0)

    monkeypatch.setattr(ExternalTask, "is_rewarded", lambda self, example: True)

    async def run() -> None:
        job = Job(rewards=Task())
        runner = job.start()
        for posted in (LARGEST_REWARD, 0.5):
            session = await job.claimed()
            await delivered(session)
            session.set_reward(posted)
            session.end()
        result = await job.result()
        assert isinstance(result, SampleDone) and result.record.trajectory().reward == 1e6 + 0.5
        await runner.close()

    moved_clock.run(run())


def test_rewards_that_do_not_add_up_count_for_their_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added to the task's after the session has ended."""

    class Task:
        async def score(self, **options: Any) -> Reward:
            return Reward(score=Score(value=1e6), seconds=0.0)

    monkeypatch.setattr(ExternalTask, "is_rewarded", lambda self, example: True)

    async def run() -> None:
        job, broken = Job(rewards=Task()), Claimant(address="1.2.3.4", name="a")
        runner = job.start()
        for posted in [*[LARGEST_REWARD] * (NUM_FREE + 1), 0.5]:
            session = await job.offered()
            claimants, now_s = job.book.claimants, session.now_s
            session.claimant = broken
            session.claim()
            await delivered(session)
            session.set_reward(posted)
            session.end()
        assert claimants.hold(broken, now_s=now_s) is not None
        (trouble,) = claimants.troubles(now_s=now_s)
        assert f"the last {NUM_FREE + 1} sessions" in trouble and "cannot be added to the task's" in trouble
        assert isinstance(await job.result(), SampleDone)
        assert claimants.hold(broken, now_s=now_s) is None and not claimants.troubles(now_s=now_s)
        await runner.close()

    moved_clock.run(run())


def test_a_sample_that_no_agent_can_make_fails() -> None:
    def num_tries(*are_of_sample: bool) -> int:
        tries = AgentTries(1 + MAX_RETRIES)
        errors = (AgentLostError("no request", is_of_sample=is_of_sample) for is_of_sample in are_of_sample)
        return 1 + sum(1 for _ in itertools.takewhile(tries.goes_on, errors))

    assert num_tries(*[True] * 99) == 1 + MAX_RETRIES
    assert num_tries(True, *[False] * 99) == 4 * (1 + MAX_RETRIES), "with one agent it may be the sample"
