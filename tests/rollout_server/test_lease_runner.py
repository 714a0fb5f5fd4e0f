"""The lease runner with examples that are slow or hang, and with failures of every kind.

The engine and the rewards answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from areal_like.config import EvalSetConfig, from_mapping
from areal_like.errors import (
    EngineError,
    EngineTimeoutError,
    PromptRefusedError,
    RewardError,
    RewardTimeoutError,
)
from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, SampleFailed
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.leases.held_leases import HeldLeases, Place, SampleResult
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.lease_runner import LeaseRunner
from rollout_server.sample.prompts import LONG_PROMPT_TOKENS, needs_leader
from rollout_server.sessions.book import SessionBook
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Completion, Example, Score, Split, Task
from rollout_server.teachers.pool import TeacherPool
from rollout_server.workers.reward_pool import Reward
from tests.rollout_server.test_environment_attempts import Ordinals
from tests.rollout_server.test_episodes import CountingEngine, Digits
from tests.support import moved_clock
from tests.support.line_chat import LineChat
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

LIMIT_S = 100.0
TEN_TOKENS = 20
"""Where `CountingEngine` ends a turn so that it has ten tokens, after the end of a line (10)."""
GROUP = 4
AT_ENGINE, EPISODES = 2 * GROUP, 6 * GROUP


@dataclass(frozen=True, kw_only=True)
class Slow(Task):
    """A task whose examples take `seconds` of the loop's clock, or wait for `released` if in `hanging`.

    `requested` has the loaded indices.
    """

    seconds: float = 0.0
    loop: asyncio.AbstractEventLoop | None = None
    hanging: tuple[int, ...] = ()
    released: threading.Event = field(default_factory=threading.Event)
    requested: list[int] = field(default_factory=list)

    def example(self, split: Split, index: int) -> Example:
        self.requested.append(index)
        if index in self.hanging:
            self.released.wait()
        if self.loop is not None:
            passed = threading.Event()
            self.loop.call_soon_threadsafe(advance, self.seconds)
            self.loop.call_soon_threadsafe(passed.set)
            passed.wait()
        return Example(prompt="7=", answer=None)

    def reward(self, example: Example, completion: str) -> float:
        return 0.5


@pytest.fixture
def hanging() -> Iterator[Callable[..., Slow]]:
    """Makes a task with hanging examples, whose threads end with the test."""
    released = threading.Event()
    yield lambda *indices: Slow(hanging=indices, released=released)
    released.set()


class FixedRewards:
    """Answers 0.5, or raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.completions: list[Completion] = []
        self.released = asyncio.Event()
        self.released.set()

    async def score(self, *, split: Split, index: int, completion: Completion) -> Reward:
        self.completions.append(completion)
        await self.released.wait()
        if self.error is not None:
            raise self.error
        return Reward(score=Score(value=0.5), seconds=0.0)


class StepRewards(FixedRewards):
    """Rewards steps of the completion `8,9,10,...` that end at these characters."""

    def __init__(self, *ends: int) -> None:
        super().__init__()
        self.ends = ends

    async def score(self, *, split: Split, index: int, completion: Completion) -> Reward:
        self.completions.append(completion)
        return Reward(score=Score(value=0.5, steps=[(end, 0.25) for end in self.ends]), seconds=0.0)


class FailingEngine(CountingEngine):
    """Raises `error` for every request after `num_good` of them."""

    def __init__(self, error: Exception, *, num_good: int = 1) -> None:
        super().__init__()
        self.error = error
        self.num_good = num_good

    async def generate(self, input_ids: Sequence[int], **options: Any) -> Generation:
        if len(self.requests) >= self.num_good:
            raise self.error
        return await super().generate(input_ids, **options)


class TwoTurns:
    """Environments of two turns of the policy; then they raise `error`, if there is one."""

    label = ""

    def __init__(self, error: Exception | SystemExit | None = None) -> None:
        self.error = error
        self.num_steps = 0

    async def open(self, *, split: str, index: int, seed: int) -> TwoTurns:
        self.num_steps = 0
        return self

    async def reset(self) -> tuple[list[Message], list[dict[str, Any]]]:
        return [{"role": "user", "content": "7"}], []

    async def step(self, reply: Reply) -> Step:
        self.num_steps += 1
        if self.num_steps < 2:
            return Step(messages=[{"role": "user", "content": "8"}])
        if self.error is not None:
            raise self.error
        return Step(done=True)

    def close(self) -> None:
        pass


class WithTurns(Slow):
    """A task with environments."""

    def environment(self, example: Example) -> Environment | None:
        raise AssertionError("it is the pool that makes them")


def source(
    task: Task, *, rewards: FixedRewards | None = None, environments: TwoTurns | None = None
) -> SampleSource:
    chat = LineChat(Ordinals(), stop_token_ids=[], vocab_size=1 << 20, template_kwargs={})
    return SampleSource(
        task=task,
        renderer=Digits(chat=chat),  # type: ignore[arg-type]
        context_tokens=1000,
        rewards=rewards or FixedRewards(),  # type: ignore[arg-type]
        environments=environments,  # type: ignore[arg-type]
    )


class Served:
    """A runner and the results that it reported."""

    def __init__(
        self,
        task: Task,
        *,
        engine: CountingEngine | None = None,
        rewards: FixedRewards | None = None,
        on_failure: dict[str, str] | None = None,
        environments: TwoTurns | None = None,
        eval_sets: dict[str, SampleSource] | None = None,
        settings: dict[str, Any] | None = None,
        teachers: TeacherPool | None = None,
    ) -> None:
        self.results: list[SampleResult] = []
        self.held = HeldLeases(engine_samples=AT_ENGINE, max_episodes=EPISODES)
        self.moved = self.held.moved
        self.engine = engine or CountingEngine()
        config = from_mapping(
            {
                "rollout": {"reward_timeout_s": LIMIT_S},
                "sampling": {"group_size": GROUP},
                "buffer": {"on_failure": on_failure or {}},
                **(settings or {}),
            }
        )
        self.runner = LeaseRunner(
            config,
            {"": source(task, rewards=rewards, environments=environments), **(eval_sets or {})},
            gate=GenerationGate(),
            book=SessionBook(),
            buffers=self,  # type: ignore[arg-type]
            teachers=teachers,
        )
        self.runner.engine = self.engine

    def deliver(self, result: SampleResult) -> None:
        self.results.append(result)
        self.held.finish(result, now_s=0.0)

    def grant(self, *lease_ids: int, num_samples: int = GROUP, eval_set: str = "") -> None:
        leases = [
            Lease(
                lease_id=lease_id,
                ticket_id=lease_id,
                prompt_index=lease_id,
                purpose=Purpose.EVAL if eval_set else Purpose.TRAIN,
                sample_indices=list(range(num_samples)),
                seed=1,
                eval_set=eval_set,
            )
            for lease_id in lease_ids
        ]
        for lease in leases:
            self.held.grant(lease)
        self.runner.start(leases)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            while not is_so():
                await asyncio.sleep(0.005)

    async def finished(self, *lease_ids: int) -> None:
        await self.until(lambda: {result.lease_id for result in self.results} >= set(lease_ids))

    def of(self, lease_id: int) -> list[SampleResult]:
        return [result for result in self.results if result.lease_id == lease_id]


@contextlib.asynccontextmanager
async def serving(task: Task, **parts: Any) -> AsyncIterator[Served]:
    served = Served(task, **parts)
    try:
        yield served
        assert not served.runner.failed.done()
    finally:
        await served.runner.close()


def assert_hung(results: list[SampleResult]) -> None:
    assert len(results) == GROUP
    assert all(
        isinstance(result, SampleFailed)
        and result.kind is FailureKind.ENVIRONMENT
        and "task.example() took longer" in result.error
        for result in results
    )


def test_time_limit_is_per_example_and_samples_start_early() -> None:
    async def body() -> None:
        task = Slow(hanging=(14,), seconds=LIMIT_S / 4, loop=asyncio.get_running_loop())
        async with serving(task) as served:
            served.grant(*range(15))
            served.grant(*range(15, 25))
            await served.finished(0)  # before the last example is loaded
            task.released.set()
            await served.finished(*range(25))
            assert len(served.results) == 25 * GROUP and all(
                isinstance(result, SampleDone) for result in served.results
            )

    moved_clock.run(body())


class Quits(Slow):
    """A task whose code ends the program, as it believes."""

    def example(self, split: Split, index: int) -> Example:
        if index == 1:
            raise SystemExit(0)
        return super().example(split, index)


def test_a_task_that_calls_exit_fails_only_its_samples() -> None:
    async def body() -> None:
        async with serving(Quits()) as served:
            served.grant(1, 2)
            await served.finished(1, 2)
            assert {type(result) for result in served.of(1)} == {SampleFailed}
            assert {type(result) for result in served.of(2)} == {SampleDone}

    asyncio.run(body())


def test_every_set_has_its_own_task_and_sampling() -> None:
    async def body() -> None:
        job, other = Slow(), Slow()
        plain = replace(source(job), settings=EvalSetConfig())
        settings = EvalSetConfig(
            num_samples=2, temperature=0.6, top_p=0.9, top_k=7, min_p=0.1, max_new_tokens=4
        )
        hard = replace(plain, settings=settings, task=other, rewards=FixedRewards())
        async with serving(job, eval_sets={"plain": plain, "hard": hard}) as served:
            served.grant(1)
            served.grant(2, eval_set="plain", num_samples=1)
            served.grant(3, eval_set="hard", num_samples=2)
            served.grant(4, eval_set="gone", num_samples=2)
            await served.until(lambda: len(served.results) == GROUP + 5)
            samplings = {rid.partition(".")[0]: sampling for _, sampling, rid in served.engine.requests}
            seeds = {rid: sampling.sampling_seed for _, sampling, rid in served.engine.requests}
            train, greedy, filtered = samplings["1"], samplings["2"], samplings["3"]
            assert (train.temperature, train.max_new_tokens) == (1.0, 10)
            assert (train.top_p, train.top_k, train.min_p) == (1.0, -1, 0.0)
            assert (greedy.temperature, greedy.sampling_seed, greedy.max_new_tokens) == (0.0, None, 10)
            assert filtered.to_dict() | {"sampling_seed": None} == {
                "max_new_tokens": 4,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 7,
                "min_p": 0.1,
                "sampling_seed": None,
            }
            assert (seeds["3.0.0"], seeds["3.1.0"]) == (1, 2), "sample i has the lease's seed + i"
            assert (job.requested, other.requested) == ([1, 2], [3])
            assert len(plain.rewards.completions) == 1 and len(hard.rewards.completions) == 2
            assert [result.record.is_greedy for result in served.of(2)] == [True]
            assert [result.record.is_greedy for result in served.of(3)] == [False, False]
            assert all("no evaluation set gone" in result.error for result in served.of(4))

    asyncio.run(body())


def test_samples_that_wait_for_rewards_leave_the_engine_free() -> None:
    """Rewards that do not come: the engine gets work until as many samples are held as may be."""

    async def body() -> None:
        rewards = FixedRewards()
        rewards.released.clear()
        async with serving(Slow(), rewards=rewards) as served:
            lease_id = 0
            while served.held.free_samples >= GROUP:
                lease_id += 1
                served.grant(lease_id)
                await served.until(lambda: not served.held.num_at[Place.ENGINE])
                assert served.held.num_at[Place.REWARD] == lease_id * GROUP
            assert served.held.holding_samples == EPISODES and not served.results
            served.runner.cancel(served.held.drop([1]))
            assert served.held.num_at[Place.REWARD] == EPISODES - GROUP
            rewards.released.set()
            await served.finished(*range(2, lease_id + 1))
            assert not served.held.holding_samples and served.held.free_samples == AT_ENGINE
            completion = rewards.completions[0]
            assert completion == completion.raw_text == "8,9,10,11,12,13,14,15,16,17"
            assert list(completion.token_ids) == list(range(8, 18)) and completion.turn_lengths == [10]
            assert completion.finish_reason is FinishReason.LENGTH

    asyncio.run(body())


def test_examples_that_hang_fail_only_their_own_samples(hanging: Callable[..., Slow]) -> None:
    async def body() -> None:
        task = hanging(2, 3, 5)
        async with serving(task) as served:
            served.grant(1, 2, 3, 4)
            served.grant(5, 6)
            for index in (2, 3, 5):
                await served.until(lambda index=index: task.requested[-1:] == [index])  # type: ignore[misc]
                advance(LIMIT_S + 1)
            await served.finished(*range(1, 7))
            for lease_id in (2, 3, 5):
                assert_hung(served.of(lease_id))
            for lease_id in (1, 4, 6):
                assert all(isinstance(result, SampleDone) for result in served.of(lease_id))
            assert sorted(task.requested) == [1, 2, 3, 4, 5, 6]
            task.released.set()
            await asyncio.sleep(0.05)
            assert len(task.requested) == 6 and len(served.results) == 6 * GROUP, (
                "an abandoned thread must not load more examples"
            )

    moved_clock.run(body())


def test_cancelled_leases_load_no_example_and_report_nothing(hanging: Callable[..., Slow]) -> None:
    async def body() -> None:
        task = hanging(1)
        async with serving(task) as served:
            served.grant(1, 2, 3)
            served.grant(4, 5)
            await served.until(lambda: task.requested == [1])
            served.runner.cancel([1, 2, 4])
            advance(LIMIT_S + 1)
            await served.finished(3, 5)
            assert {result.lease_id for result in served.results} == {3, 5}
            assert task.requested == [1, 3, 5]

    moved_clock.run(body())


def test_closing_does_not_wait_for_a_hanging_example(hanging: Callable[..., Slow]) -> None:
    async def body() -> None:
        task = hanging(1)
        served = Served(task)
        served.grant(1, 2)
        await served.until(lambda: task.requested == [1])
        await served.runner.close()  # the example hangs until the next line
        task.released.set()
        await asyncio.sleep(0.05)
        assert task.requested == [1] and not served.results

    moved_clock.run(body())


def test_samples_of_quick_examples_start_together() -> None:
    async def body() -> None:
        async with serving(Slow()) as served:
            served.grant(*range(20))
            num_requests = [0]
            while num_requests[-1] < 20 * GROUP:
                await asyncio.sleep(0)
                num_requests.append(len(served.engine.requests))
            assert len(set(num_requests)) < 10, "samples must start in few turns of the loop"

    asyncio.run(body())


# --- failures ---


def one_result(**parts: Any) -> SampleResult:
    """The result of one sample."""

    async def body() -> SampleResult:
        task = WithTurns() if "environments" in parts else Slow()
        async with serving(task, **parts) as served:
            if task.has_environment:
                served.engine.eos_at = TEN_TOKENS
            served.grant(1, num_samples=1)
            await served.finished(1)
            (result,) = served.results
            assert served.runner.num_failed.total() == (
                not isinstance(result, SampleDone) or bool(result.failure)
            )
            return result

    return asyncio.run(body())


@pytest.mark.parametrize(
    ("parts", "kind", "num_tokens"),
    [
        ({"rewards": FixedRewards(RewardError("no verdict"))}, "reward", 10),
        ({"engine": FailingEngine(EngineError("HTTP 500")), "environments": TwoTurns()}, "engine", 10),
        ({"engine": FailingEngine(PromptRefusedError("HTTP 400"), num_good=0)}, "prompt", 0),
        (
            {"environments": TwoTurns(KeyError("door")), "on_failure": {"environment": "retry"}},
            "environment",
            20,
        ),
        (
            {"rewards": FixedRewards(RewardTimeoutError("slow")), "on_failure": {"reward_timeout": "drop"}},
            "reward_timeout",
            10,
        ),
    ],
)
def test_a_failed_sample_has_its_kind_and_tokens(parts: dict[str, Any], kind: str, num_tokens: int) -> None:
    result = one_result(**parts)
    assert isinstance(result, SampleFailed)
    assert (result.kind, result.num_tokens) == (kind, num_tokens)


@pytest.mark.parametrize(
    ("parts", "kind", "num_tokens"),
    [
        ({"rewards": FixedRewards(RewardTimeoutError("slow"))}, "reward_timeout", 10),
        ({"environments": TwoTurns(ZeroDivisionError("no door"))}, "environment", 20),
        ({"environments": TwoTurns(SystemExit(0))}, "environment", 20),
        (
            {"engine": FailingEngine(PromptRefusedError("too long")), "environments": TwoTurns()},
            "environment",  # the prompt was good: the turns have become too long
            10,
        ),
        ({"rewards": FixedRewards(RewardError("x")), "on_failure": {"reward": "zero"}}, "reward", 10),
    ],
)
def test_a_policy_of_zero_is_a_sample_with_reward_0(
    parts: dict[str, Any], kind: str, num_tokens: int
) -> None:
    result = one_result(**parts)
    assert isinstance(result, SampleDone) and result.failure == kind
    assert (result.record.reward, result.record.num_sampled) == (0.0, num_tokens)


def test_a_late_turn_keeps_the_tokens_before_it() -> None:
    result = one_result(engine=FailingEngine(EngineTimeoutError("no token")), environments=TwoTurns())
    assert isinstance(result, SampleDone) and not result.failure
    assert (result.record.finish_reason, result.record.num_sampled) == (FinishReason.TIMEOUT, 10)
    nothing = one_result(engine=FailingEngine(EngineTimeoutError("no token"), num_good=0))
    assert isinstance(nothing, SampleFailed) and nothing.kind is FailureKind.TIMEOUT


def test_logprobs_that_cannot_be_used_are_the_engines_fault() -> None:
    class Wrong(CountingEngine):
        async def generate(self, input_ids: Sequence[int], **options: Any) -> Generation:
            made = await super().generate(input_ids, **options)
            return replace(made, logprobs=np.full_like(made.logprobs, 0.5))

    result = one_result(engine=Wrong())
    assert isinstance(result, SampleFailed) and result.kind is FailureKind.ENGINE


def test_a_prompt_that_does_not_fit_is_its_own_kind() -> None:
    class Tight(Digits):
        def encode(self, example: Example) -> np.ndarray:
            raise ValueError("prompt of 9 tokens: the limit is 1 to 8")

    async def body() -> None:
        async with serving(Slow()) as served:
            served.runner._prompts._sources = {"": replace(source(Slow()), renderer=Tight())}  # type: ignore[arg-type]
            served.grant(1)
            await served.finished(1)
            kinds = {result.kind for result in served.of(1) if isinstance(result, SampleFailed)}
            assert kinds == {FailureKind.PROMPT} and len(served.of(1)) == GROUP

    asyncio.run(body())


def test_a_renderer_that_raises_fails_its_sample() -> None:
    class Broken(Digits):
        def decode(self, tokens: np.ndarray) -> str:
            raise OverflowError("no such token")

    async def body() -> None:
        broken = replace(source(Slow()), renderer=Broken())  # type: ignore[arg-type]
        async with serving(Slow(), eval_sets={"set": broken}, on_failure={"environment": "retry"}) as served:
            served.grant(1, num_samples=1, eval_set="set")
            await served.finished(1)
            (result,) = served.results
            assert isinstance(result, SampleFailed) and result.kind is FailureKind.ENVIRONMENT
            assert "OverflowError: no such token" in result.error and result.num_tokens == 10

    asyncio.run(body())


class SlowPrompts(CountingEngine):
    """Reports the first token of a request only when it is told to, and notes who waited for whom."""

    def __init__(self) -> None:
        super().__init__()
        self.caches_prefixes = True
        self.first_tokens: list[Callable[[], None]] = []
        self.may_answer = asyncio.Event()
        self.error: EngineError | None = None

    async def generate(self, input_ids: Sequence[int], **options: Any) -> Generation:
        self.first_tokens.append(options["on_first_token"])
        made = await super().generate(input_ids, **options)
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return made


@pytest.mark.parametrize("ends", ["first token", "answer", "failure"])
def test_a_long_prompt_is_computed_by_one_sample_first(ends: str) -> None:
    class LongPrompts(Slow):
        def example(self, split: Split, index: int) -> Example:
            return Example(prompt="7" * (LONG_PROMPT_TOKENS if index else 5), answer=None)

    async def body() -> None:
        engine = SlowPrompts()
        async with serving(LongPrompts(), engine=engine) as served:
            served.grant(0)
            await served.until(lambda: len(engine.requests) == GROUP)
            served.grant(1)
            await served.until(lambda: len(engine.requests) == GROUP + 1)
            await asyncio.sleep(0.05)
            assert len(engine.requests) == GROUP + 1, "the others wait for the prompt"
            if ends == "first token":
                engine.first_tokens[-1]()
            else:
                engine.error = EngineError("broken") if ends == "failure" else None
                engine.may_answer.set()
            await served.until(lambda: len(engine.requests) == 2 * GROUP)
            engine.may_answer.set()
            await served.until(lambda: len(served.of(1)) == GROUP)

    asyncio.run(body())


def test_only_long_prompts_of_groups_need_a_leader() -> None:
    facts = {"num_prompt_tokens": LONG_PROMPT_TOKENS, "num_samples": 2, "caches_prefixes": True}
    assert needs_leader(**facts)
    for change in ({"num_prompt_tokens": 10}, {"num_samples": 1}, {"caches_prefixes": False}):
        assert not needs_leader(**{**facts, **change})


@pytest.mark.parametrize(
    ("ends", "tokens"),
    [
        ((1, 3, 15), [1, 2, 6]),  # characters of tokens 1, 2 and 6: 8,9,10,11,12,13
        ((2,), [2]),  # a comma comes with the token after it
        ((1000,), None),
    ],
)
def test_steps_of_a_completion_become_tokens(ends: tuple[int, ...], tokens: list[int] | None) -> None:
    async def run() -> None:
        rewards = StepRewards(*ends)
        async with serving(Slow(), rewards=rewards) as served:
            served.grant(1, num_samples=1)
            await served.finished(1)
        (result,) = served.of(1)
        if tokens is None:
            assert isinstance(result, SampleFailed) and result.kind is FailureKind.REWARD
            assert "a step ends at 1000, and the completion has" in result.error
            return
        assert isinstance(result, SampleDone)
        trajectory = result.record.trajectory()
        first = int(np.flatnonzero(trajectory.loss_mask)[0])
        assert trajectory.steps == [(first + count, 0.25) for count in tokens]
        assert trajectory.reward == 0.5 + 0.25 * len(ends)
        assert str(rewards.completions[0]).startswith("8,9,10,11,12,13")

    asyncio.run(run())


def test_steps_of_a_conversation_are_of_its_last_turn() -> None:
    async def run() -> None:
        async with serving(
            WithTurns(),
            engine=CountingEngine(eos_at=TEN_TOKENS),
            rewards=StepRewards(1),
            environments=TwoTurns(),
        ) as served:
            served.grant(1, num_samples=1)
            await served.finished(1)
        (result,) = served.of(1)
        assert isinstance(result, SampleDone)
        trajectory = result.record.trajectory()
        (step,) = trajectory.steps
        assert step == (trajectory.turns[0][0] + len_of_context(trajectory) + 1, 0.25)

    def len_of_context(trajectory: Any) -> int:
        after = trajectory.loss_mask[trajectory.turns[0][0] :]
        return int(np.flatnonzero(after)[0])

    asyncio.run(run())
