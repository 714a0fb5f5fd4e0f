"""Environments in real processes: one that raises, hangs, crashes or forks fails only its own sample."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import ConfigError, EnvironmentLostError, EpisodeError
from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Reply
from rollout_server.workers import environment_pool as pool_module
from rollout_server.workers import host as host_module
from rollout_server.workers.environment_pool import EnvironmentPool, EnvironmentSession
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S, is_alive
from tests.support.workers import environment_pool

LIMIT_S = 100


@pytest.fixture(autouse=True)
def processes_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))


def pool(
    *, step_timeout_s: float = HANG_LIMIT_S, memory_mb: int = 256, **settings: Any
) -> AbstractAsyncContextManager[EnvironmentPool]:
    task = {"_target_": "tests.support.environment_tasks.EchoTask", "num_turns": 100} | settings
    return environment_pool(task, step_timeout_s=step_timeout_s, memory_mb=memory_mb)


def reply(text: str) -> Reply:
    return Reply(text=text, raw_text=text, finish_reason=FinishReason.STOP, num_tokens=len(text))


@contextlib.asynccontextmanager
async def opened(environments: EnvironmentPool, *, seed: int = 0) -> AsyncIterator[EnvironmentSession]:
    session = await environments.open(split="train", index=3, seed=seed)
    try:
        await session.reset()
        yield session
    finally:
        session.close()


async def answer_of(environments: EnvironmentPool, text: str, *, seed: int = 0) -> str:
    """The environment's first message after this reply, or the error."""
    async with opened(environments, seed=seed) as session:
        try:
            return str((await session.step(reply(text))).messages[0]["content"])
        except EpisodeError as error:
            return str(error)


async def pid_of_worker(environments: EnvironmentPool) -> int:
    return int(await answer_of(environments, "pid"))


async def until(accept: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_LIMIT_S):
        while not accept():
            await asyncio.sleep(0.005)


async def all_gone(*pids: int) -> None:
    await until(lambda: not any(map(is_alive, pids)))


async def over_the_limit(environments: EnvironmentPool, asked: Coroutine[Any, Any, Any]) -> Any:
    """What `asked` returns, whose second call of an environment lasts longer than the limit."""
    num_calls = environments.num_calls
    answering = asyncio.ensure_future(asked)
    await until(lambda: environments.num_calls > num_calls and environments.num_calling == 1)
    advance(LIMIT_S)
    return await answering


def run(body: Callable[[], Any]) -> None:
    moved_clock.run(body())


def test_one_process_serves_one_environment_after_the_other() -> None:
    async def body() -> None:
        async with pool() as environments:
            session = await environments.open(split="eval", index=5, seed=7)
            messages, tools = await session.reset()
            assert messages == [{"role": "user", "content": "eval 5 seed 7"}] and tools == []
            step = await session.step(reply("été"))
            assert (step.messages, step.reward, step.done) == (
                [{"role": "user", "content": "été"}],
                0.5,
                False,
            )
            assert step.metrics == {"chars": 3.0} and environments.num_open == 1
            session.close()
            await until(lambda: not environments._closing)
            # The next environment gets the same process; one at the same time gets another.
            first = await pid_of_worker(environments)
            await until(lambda: not environments._closing)
            async with opened(environments) as one, opened(environments) as other:
                pids = [(await s.step(reply("pid"))).messages[0]["content"] for s in (one, other)]
            assert str(first) in pids and len(set(pids)) == 2
            # Random numbers depend on the sample's seed, and not on the process.
            drawn = [await answer_of(environments, "random", seed=seed) for seed in (1, 2, 1)]
            assert drawn == [str(random.Random(seed).random()) for seed in (1, 2, 1)]
            assert environments.num_restarts == 0 and environments.seconds_total > 0
        await all_gone(first)

    run(body)


def test_a_mistake_of_an_environment_says_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "raise": "step() raised KeyError: 'no such door' (",
        "exit": "step() raised SystemExit: 3 (",
        "no_number": "step() returned the reward nan: return a finite number",
        "nothing": "done=False without messages: return the messages",
        "text": "step() returned str: return a Step",
        "set": "must be JSON values: can not serialize 'set'",
        "role": "step() returned the message {'content': 'who?'}: a message is",
        "metrics": "step() returned 100 metrics: return at most 64",
        "long": "the limit is 4194304",
        "print": "print",
    }

    async def body() -> None:
        async with pool() as environments:
            pids = {await pid_of_worker(environments)}
            for mistake, error in mistakes.items():
                await until(lambda: not environments._closing)
                assert error in await answer_of(environments, mistake)
            await until(lambda: not environments._closing)
            pids.add(await pid_of_worker(environments))
            assert len(pids) == 1 and environments.num_restarts == 0, "the process serves on"

    run(body)
    printed = capfd.readouterr()
    assert "Exception ignored" not in printed.err
    assert printed.out == "" and "raw noise on stdout" in printed.err and "more noise" in printed.err


def test_a_lost_process_costs_only_its_own_sample() -> None:
    async def body() -> None:
        async with pool(step_timeout_s=LIMIT_S, memory_mb=128) as environments:
            async with opened(environments) as bystander:
                own = (await bystander.step(reply("pid"))).messages[0]["content"]
                hung = f"step() of the environment took longer than episode.step_timeout_s={LIMIT_S}"
                for mishap, error in {
                    "hang": hung,
                    "stop": hung,
                    "die": "the environment's process died (signal 9)",
                    "garble": "the environment's process sent an invalid frame",
                }.items():
                    asked = answer_of(environments, mishap)
                    answer = await (over_the_limit(environments, asked) if error is hung else asked)
                    assert answer.startswith(error)
                assert environments.num_restarts == 4
                assert "raised MemoryError (episode.memory_mb=128)" in await answer_of(
                    environments, "allocate"
                )
                left = [int(await answer_of(environments, mishap)) for mishap in ("fork", "daemon")]
                # What an environment leaves behind ends with its process, which serves no other.
                await all_gone(*left)
                await until(lambda: not environments._closing)
                assert not environments._idle and environments.num_restarts == 4
                assert await answer_of(environments, "thread") == "thread"
                await until(lambda: not environments._closing)
                assert not environments._idle and environments.num_restarts == 4
                assert (await bystander.step(reply("pid"))).messages[0]["content"] == own
            await until(lambda: not environments._closing)
            pid = await pid_of_worker(environments)
            os.kill(pid, signal.SIGKILL)  # while it is idle
            await until(lambda: not environments._host._workers)
            assert await pid_of_worker(environments) != pid

    run(body)


def test_no_file_descriptors_left_is_no_error_of_the_server() -> None:
    async def body() -> None:
        async with pool() as environments:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
            try:
                with pytest.raises(EnvironmentLostError, match=r"can be started: .* Too many open files"):
                    await environments.open(split="train", index=0, seed=0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert await answer_of(environments, "fine") == "fine"

    run(body)


@pytest.mark.parametrize("end", ["leaves the pool", "is killed", "is killed while the zygote is stopped"])
def test_what_environments_have_started_ends_with_the_server(end: str) -> None:
    program = f"import asyncio; from {__name__} import server; asyncio.run(server({end!r}))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = [int(text) for text in process.stdout.readline().split()]
    assert len(left) == 3
    asyncio.run(all_gone(*left))


async def server(end: str) -> None:
    """Prints the ids of the processes that it leaves."""
    async with pool() as environments:
        session = await environments.open(split="train", index=0, seed=0)
        await session.reset()
        left = [(await session.step(reply(text))).messages[0]["content"] for text in ("fork", "daemon")]
        assert environments._host._zygote is not None
        zygote = environments._host._zygote.pid
        if "stopped" in end:
            os.kill(zygote, signal.SIGSTOP)
        print(zygote, *left, flush=True)
        if "killed" in end:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_cancelled_call_is_closed_in_order(may_go_on: Path) -> None:
    async def body() -> None:
        async with pool() as environments:

            async def sample() -> None:
                async with opened(environments) as session:
                    await session.step(reply("held"))

            pid = await pid_of_worker(environments)
            task = asyncio.create_task(sample())
            await until(lambda: environments.num_calling == 1 and environments.num_calls == 3)
            task.cancel()
            await until(task.done)
            assert environments.num_open == 0 and environments._closing
            may_go_on.touch()
            await until(lambda: bool(environments._idle))
            assert await pid_of_worker(environments) == pid and environments.num_restarts == 0
            may_go_on.unlink()
            slow = asyncio.create_task(sample())
            assert environments.slow_calls() == {}
            pool_module._SLOW_CALL_S, before = 0.05, pool_module._SLOW_CALL_S
            try:
                await until(lambda: bool(environments.slow_calls()))
                ((name, waited_s),) = environments.slow_calls().items()
            finally:
                pool_module._SLOW_CALL_S = before
            assert name == "environments: train 3 (1 called)" and waited_s >= 0.05
            may_go_on.touch()
            await slow

    run(body)


def test_a_lost_zygote_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_RESTART_DELAY_S", 0.0)

    async def body() -> None:
        async with pool() as environments:
            for signal_number in (signal.SIGKILL, signal.SIGSTOP):
                await until(lambda: not environments._closing)
                async with opened(environments) as session:
                    pid = int((await session.step(reply("pid"))).messages[0]["content"])
                    child = int((await session.step(reply("fork"))).messages[0]["content"])
                    assert environments._host._zygote is not None
                    zygote = environments._host._zygote.pid
                    os.kill(zygote, signal_number)
                    if signal_number is signal.SIGSTOP:
                        assert await session.step(reply("fine"))  # it needs no zygote
                        opening = asyncio.ensure_future(environments.open(split="train", index=0, seed=0))
                        while not opening.done():
                            await asyncio.sleep(0.01)
                            advance(host_module._FORK_TIMEOUT_S / host_module._FORK_CHECKS)
                        with pytest.raises(EnvironmentLostError, match="no process"):
                            await opening
                    await until(lambda: environments._host._zygote is None)
                    cause = "it hangs: no process has" if signal_number is signal.SIGSTOP else "it died"
                    with pytest.raises(EnvironmentLostError, match=f"was lost: {cause}"):
                        await session.step(reply("gone"))
                await all_gone(zygote, pid, child)
                assert await pid_of_worker(environments) != pid
            assert environments.num_restarts == 3, "two zygotes, and a worker that did not start"

    run(body)


def test_few_workers_start_at_the_same_time() -> None:
    """Hundreds of samples begin at once: each start takes the time of the others."""

    async def body() -> None:
        async with pool() as environments:
            most = host_module._STARTS_PER_CORE * len(os.sched_getaffinity(0))
            assert environments._host._zygote is not None
            starting, fork = [], environments._host._zygote.fork

            def counted_fork(worker: int, theirs: Any, *, may_import: bool) -> None:
                starting.append(len(environments._host._workers) - environments._host._num_started)
                fork(worker, theirs, may_import=may_import)

            environments._host._zygote.fork = counted_fork  # type: ignore[method-assign]
            sessions = await asyncio.gather(
                *(environments.open(split="train", index=0, seed=seed) for seed in range(3 * most))
            )
            assert len(starting) == environments.num_open == 3 * most and max(starting) <= most
            for session in sessions:
                session.close()

    run(body)


def test_a_slow_start_is_no_hang() -> None:
    patience = host_module.StartPatience()
    most = host_module._FORK_CHECKS - 1
    for num_started in range(3):  # another worker starts each time, just before it would be over
        assert [patience.goes_on(num_started) for _ in range(most)] == [True] * most
    assert not patience.goes_on(2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"_target_": "tests.support.no_such_module.Task"}, "the task's processes cannot start"),
        ({"start": "raise"}, "example 0 cannot be made: reset() raised KeyError"),
        ({"start": "hang"}, f"reset() of the environment took longer than episode.step_timeout_s={LIMIT_S}"),
    ],
)
def test_a_task_without_environment_is_refused(settings: dict[str, Any], error: str) -> None:
    async def body() -> None:
        with pytest.raises(ConfigError) as refused:
            async with pool(step_timeout_s=LIMIT_S, **settings) as environments:
                check = environments.check()
                await (over_the_limit(environments, check) if "longer" in error else check)
        assert error in str(refused.value)

    run(body)
