"""Episodes with environments in real processes, and an engine that answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.config import from_mapping
from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from areal_like.wire.records import Record
from rollout_server.leases.held_leases import Place, SampleResult
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.lease_runner import LeaseRunner
from rollout_server.sessions.book import SessionBook
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Completion, Score, make_task
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.reward_pool import Reward
from tests.rollout_server.test_episodes import Digits
from tests.support import moved_clock
from tests.support.line_chat import LineChat
from tests.support.moved_clock import advance
from tests.support.reported import Reported
from tests.support.waiting import HANG_LIMIT_S
from tests.support.workers import environment_pool

EOS = 0
TASK = {"_target_": "tests.support.environment_tasks.EchoTask", "num_turns": 3}
Script = Sequence[str]


@pytest.fixture(autouse=True)
def processes_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


class Ordinals:
    """A tokenizer whose ids are code points."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text]}

    def decode(self, tokens: list[int], *, skip_special_tokens: bool, **_: Any) -> str:
        return "".join(chr(token) for token in tokens if token != EOS or not skip_special_tokens)


class ScriptedEngine:
    """Answers turn i of each sample with line i of the script, then EOS; a line without room is cut."""

    cache_salt = ""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.num_turns: dict[str, int] = {}
        self.caches_prefixes = False
        self.sampling: list[Sampling] = []

    async def generate(
        self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None = None, **options: Any
    ) -> Generation:
        self.sampling.append(sampling)
        sample = (rid or "").rpartition(".")[0]
        turn = self.num_turns.get(sample, 0)
        self.num_turns[sample] = turn + 1
        line = [*map(ord, self.script[turn % len(self.script)]), EOS]
        tokens = np.array(line[: sampling.max_new_tokens], np.int32)
        await asyncio.sleep(0)
        return Generation(
            output_ids=tokens,
            logprobs=-tokens.astype(np.float32) / 1000,
            versions=np.full(len(tokens), turn, np.int32),
            finish_reason=FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH,
        )


class Verdict:
    """A task's reward for the whole conversation."""

    completions: list[Completion]

    def __init__(self) -> None:
        self.completions = []

    async def score(self, *, split: str, index: int, completion: Completion) -> Reward:
        self.completions.append(completion)
        return Reward(score=Score(value=10.0, parts={"form": 10.0}, metrics={"judged": 1.0}), seconds=0.1)


class Job:
    """A lease runner with environments, and what it reported."""

    def __init__(
        self,
        pool: EnvironmentPool,
        script: Script,
        *,
        task: dict[str, Any],
        settings: dict[str, Any],
        book: SessionBook | None = None,
    ) -> None:
        self.reported = Reported()
        self.results, self.places = self.reported.results, self.reported.places
        self.rewards = Verdict()
        self.engine = ScriptedEngine(script)
        config = from_mapping(
            {"sampling": {"max_new_tokens": 12}, "rollout": {"max_context": 200}, "task": task} | settings
        )
        chat = LineChat(Ordinals(), stop_token_ids=[EOS], vocab_size=1 << 20, template_kwargs={})
        self.runner = LeaseRunner(
            config,
            {
                "": SampleSource(
                    task=make_task(task, seed=0),
                    renderer=Digits(stop_token_ids=(EOS,), chat=chat),  # type: ignore[arg-type]
                    context_tokens=config.rollout.max_context,
                    rewards=self.rewards,  # type: ignore[arg-type]
                    environments=pool,
                )
            },
            gate=GenerationGate(),
            book=SessionBook() if book is None else book,
            buffers=self.reported,  # type: ignore[arg-type]
        )
        self.runner.engine = self.engine  # type: ignore[assignment]

    def grant(self, lease_id: int = 1, *, num_samples: int = 1, prompt_index: int = 4) -> None:
        indices = list(range(num_samples))
        self.runner.start(
            [
                Lease(
                    lease_id=lease_id,
                    ticket_id=lease_id,
                    prompt_index=prompt_index,
                    purpose=Purpose.TRAIN,
                    sample_indices=indices,
                    seed=100,
                )
            ]
        )

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            while not is_so():
                await asyncio.sleep(0.005)
        assert not self.runner.failed.done()


@contextlib.asynccontextmanager
async def environments(task: dict[str, Any] = TASK, **limits: Any) -> AsyncIterator[EnvironmentPool]:
    async with environment_pool(task, **limits) as pool:
        yield pool


async def one_result(
    pool: EnvironmentPool,
    *script: str,
    task: dict[str, Any] = TASK,
    stands_still_s: float = 0.0,
    **settings: Any,
) -> tuple[SampleResult, Job]:
    """`stands_still_s`: time that passes in the second step of the environment."""
    job = Job(pool, script, task=task, settings=settings)
    job.grant()
    try:
        if stands_still_s:
            await job.until(lambda: job.engine.num_turns.get("1.0") == 2 and pool.num_calling == 1)
            advance(stands_still_s)
        await job.until(lambda: bool(job.results))
        return job.results[0], job
    finally:
        await job.runner.close()


async def record_of(pool: EnvironmentPool, *script: str, **settings: Any) -> Record:
    result, job = await one_result(pool, *script, **settings)
    assert isinstance(result, SampleDone), result
    assert not result.failure and job.runner.num_finished[result.record.finish_reason] == 1
    return result.record


def test_an_episode_is_a_record_with_its_turns() -> None:
    async def body() -> None:
        async with environments() as pool:
            result, job = await one_result(pool, "ab", "tool(5)", "c")
            assert isinstance(result, SampleDone)
            trajectory = result.record.trajectory()
            text = "".join(map(chr, trajectory.tokens))
            assert text == "train 4 seed 100\nab\0ab\ntool(5)\0\nc\0"
            sampled = "".join(map(chr, trajectory.tokens[trajectory.loss_mask == 1]))
            assert sampled == "ab\0tool(5)\0c\0" and trajectory.finish_reason is FinishReason.STOP
            ends = [text.index("ab\0") + 3, text.index("tool(5)\0") + 8, len(text)]
            assert trajectory.turns == tuple((end, 0.5) for end in ends) and trajectory.reward == 1.5
            assert trajectory.metrics == {"tool_calls": 1.0, "chars": 3.0}
            assert sorted(set(trajectory.versions.tolist())) == [-1, 0, 1, 2]
            assert len({sampling.sampling_seed for sampling in job.engine.sampling}) == 3
            assert job.places == [Place.TOOL, *[Place.ENGINE, Place.TOOL] * 3]
            assert not job.rewards.completions, "the task has no reward of its own"

            scored = TASK | {"_target_": "tests.support.environment_tasks.ScoredEchoTask"}
            async with environments(scored) as scored_pool:
                result, job = await one_result(scored_pool, "ab", task=scored)
            assert isinstance(result, SampleDone) and result.record.reward == 11.5
            (completion,) = job.rewards.completions
            assert completion == "ab" and len(completion.messages) == 7
            assert [*completion.turn_lengths] == [3, 3, 3] and len(completion.token_ids) == 9
            assert result.record.trajectory().metrics["judged"] == 1.0 and job.places[-1] is Place.REWARD

    asyncio.run(body())


def test_each_budget_ends_an_episode_as_a_truncated_sample(may_go_on: Path) -> None:
    async def body() -> None:
        async with environments() as pool:
            turns = await record_of(pool, "abc", episode={"max_turns": 2})
            assert (turns.finish_reason, turns.num_sampled, turns.reward) == (FinishReason.TURNS, 8, 1.0)
            cut = await record_of(pool, "abc", "x" * 20)
            assert (cut.finish_reason, cut.num_sampled, cut.reward) == (FinishReason.LENGTH, 16, 0.5)
            assert len(cut.trajectory().turns) == 2
            # 17 tokens of the first message, 4 of the turn, 4 of the answer: 2 are left for the next turn.
            tokens = await record_of(pool, "abc", episode={"max_tokens": 27})
            assert (tokens.finish_reason, tokens.num_sampled) == (FinishReason.TOKENS, 6)
            context = await record_of(pool, "abc", rollout={"max_context": 25})
            assert (context.finish_reason, context.num_sampled) == (FinishReason.CONTEXT, 4)
            late = await record_of(
                pool,
                "abc",
                "held",
                stands_still_s=100.0,
                rollout={"sample_timeout_s": 100.0, "max_context": 99},
            )
            assert (late.finish_reason, late.reward, late.num_sampled) == (FinishReason.TIMEOUT, 0.5, 9)
            for record in (turns, cut, tokens, context, late):
                assert record.finish_reason.is_truncated

    moved_clock.run(body())


def test_a_failed_environment_leaves_its_tokens() -> None:
    async def body() -> None:
        async with environments(step_timeout_s=100.0) as pool:
            for mishap, error in {"raise": "KeyError", "die": "signal 9", "hang": "step_timeout_s"}.items():
                late = {"stands_still_s": 100.0 if mishap == "hang" else 0.0}
                result, job = await one_result(pool, "abc", mishap, **late)
                assert isinstance(result, SampleDone) and result.failure == FailureKind.ENVIRONMENT
                assert result.record.num_sampled == 5 + len(mishap) and result.record.reward == 0.0
                assert job.runner.num_failed == {FailureKind.ENVIRONMENT: 1} and not job.runner.num_done
                retry = {"on_failure": {"environment": "retry"}}
                result, _ = await one_result(pool, "abc", mishap, buffer=retry, **late)
                assert isinstance(result, SampleFailed) and result.kind is FailureKind.ENVIRONMENT
                assert result.num_tokens == 5 + len(mishap) and error in result.error
            # What ends with the zygote is not the policy's fault: it is made again, whatever the policy is.
            job = Job(pool, ["abc", "wait 10"], task=TASK, settings={})
            job.grant()
            await job.until(lambda: job.engine.num_turns.get("1.0") == 2 and pool.num_calling == 1)
            assert pool._host._zygote is not None
            os.kill(pool._host._zygote.pid, signal.SIGKILL)
            await job.until(lambda: bool(job.results))
            (lost,) = job.results
            assert isinstance(lost, SampleFailed) and lost.kind is FailureKind.ENVIRONMENT
            assert lost.num_tokens == 12 and "was lost" in lost.error
            await job.runner.close()

    moved_clock.run(body())


def test_a_cancelled_lease_closes_its_environments(may_go_on: Path) -> None:
    async def body() -> None:
        async with environments() as pool:
            job = Job(pool, ["held", "abc"], task=TASK, settings={})
            job.grant(1, num_samples=4)
            job.grant(2, num_samples=2)
            await job.until(lambda: pool.num_open == 6 and pool.num_calling == 6)
            job.runner.cancel([1])
            await job.until(lambda: pool.num_open == 2)
            may_go_on.touch()
            await job.until(lambda: len(job.results) == 2)
            await job.until(lambda: len(pool._idle) == 6)
            assert {result.lease_id for result in job.results} == {2} and pool.num_restarts == 0
            await job.runner.close()

    asyncio.run(body())


def test_an_example_without_environment_is_one_turn() -> None:
    async def body() -> None:
        task = TASK | {"_target_": "tests.support.environment_tasks.ScoredEchoTask", "num_turns": 0}
        async with environments(task) as pool:
            result, job = await one_result(pool, "abc", task=task)
            assert isinstance(result, SampleDone) and result.record.reward == 10.0
            assert (result.record.finish_reason, result.record.num_sampled) == (FinishReason.STOP, 4)
            assert job.rewards.completions[0].messages[0] == {"role": "user", "content": "train 4"}

    asyncio.run(body())
