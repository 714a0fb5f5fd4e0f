"""A pool of worker processes in which environments run: opens one for each sample, and closes it.

    worker:   starting -> serving one environment -> closed in order: idle -> serving the next ...
                                                  -> time limit, memory, crash: killed
    zygote:   STARTING -> READY -> lost: its workers end with it, and another is started

An environment that raises, hangs, or ends its process fails only its own sample (EpisodeError). Samples whose
environment ends with the zygote fail with EnvironmentLostError: it was not their fault. Closing happens in
the background: no sample waits for it. zygote.py and worker.py describe the processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from areal_like.errors import ConfigError, EnvironmentLostError, EpisodeError
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.environments.exchange import checked_label, checked_start, checked_step, reply_fields
from rollout_server.tasks.base import Score, Split
from rollout_server.workers.agents import checked_score
from rollout_server.workers.connection import WorkerConnection
from rollout_server.workers.host import ZygoteProcess

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
"""Long, because importing a task may import a large library."""
_FORK_TIMEOUT_S = 60.0
"""A fork takes milliseconds. A zygote whose workers have all not started for so long hangs."""
_FORK_CHECKS = 20
"""Times that a worker is looked for in this time: if this process was stopped meanwhile, that counts once."""
_STARTS_PER_CORE = 2
"""Workers that start at the same time. Hundreds would take the time from each other, and from the engine."""
_RESTART_DELAY_S = 1.0
"""Pause before a zygote is started again: a broken import must not cause a busy loop."""
_CLOSE_TIMEOUT_S = 5.0
_SHUTDOWN_TIMEOUT_S = 2.0
_SLOW_CALL_S = 1.0
"""Calls that take longer are named in the server's status."""


class StartPatience:
    """For a worker that has not started: ends after `_FORK_CHECKS` looks between which no other has. Pure."""

    def __init__(self) -> None:
        self._num_started = -1
        self._left = 0

    def goes_on(self, num_started: int) -> bool:
        """`num_started`: workers of the pool that have started so far."""
        if num_started != self._num_started:
            self._num_started, self._left = num_started, _FORK_CHECKS
        self._left -= 1
        return self._left > 0


class EnvironmentPool:
    """The environments of one server. Create it in a running loop, with `async with`."""

    def __init__(
        self,
        task: Mapping[str, Any],
        *,
        seed: int,
        sandbox: str = "bwrap",
        step_timeout_s: float,
        memory_mb: int,
    ) -> None:
        """`task`, `seed`, `sandbox`: arguments of `make_task`. The limits are those of `EpisodeConfig`."""
        self._setup = {"task": dict(task), "seed": seed, "sandbox": sandbox, "memory_mb": memory_mb}
        self.step_timeout_s = step_timeout_s
        self._loop = asyncio.get_running_loop()
        self._zygote: ZygoteProcess | None = None
        """None while there is none that is ready."""
        self._is_ready = asyncio.Event()
        self._workers: dict[int, WorkerConnection] = {}
        self._idle: list[WorkerConnection] = []
        """The one that was used last is used next: its memory is warm."""
        self._closing: set[asyncio.Task[None]] = set()
        self._last_number = 0
        self._num_started = 0
        self._may_start = asyncio.Semaphore(_STARTS_PER_CORE * len(os.sched_getaffinity(0)))
        self._wait_to_start: dict[object, float] = {}
        """Samples without a worker -> time of the loop since when."""
        self._open: dict[WorkerConnection, str] = {}
        """The environment that each worker serves."""
        self._keeping: asyncio.Task[None] | None = None
        """Keeps a zygote running."""
        self.num_restarts = 0
        """Workers and zygotes that were lost to a time limit or a crash."""
        self.seconds_total = 0.0
        """Time that samples have waited for calls of their environments."""
        self.num_calls = 0
        """Calls that have ended."""

    async def __aenter__(self) -> EnvironmentPool:
        """Raises ConfigError if the task cannot be imported."""
        started: asyncio.Future[None] = self._loop.create_future()
        self._keeping = asyncio.create_task(self._keep_zygote(started), name="environments")
        await asyncio.wait({started, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            self._keeping.result()  # no process can be started
        if (error := started.exception()) is not None:
            await self.__aexit__()
            raise error
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._closing:
            await asyncio.wait(self._closing, timeout=_SHUTDOWN_TIMEOUT_S)
        tasks = [*self._closing, *self.serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports of lost workers close their sockets in the next turn

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """Tasks that end only with the pool, or if no process can be started."""
        return [self._keeping] if self._keeping is not None else []

    @property
    def num_open(self) -> int:
        """Environments that samples use."""
        return len(self._open)

    @property
    def num_calling(self) -> int:
        """Those that samples wait for."""
        return sum(worker.call_since_s is not None for worker in self._open)

    def slow_starts(self) -> dict[str, float]:
        """The number of samples that wait for a process -> seconds of the longest wait, if that is long."""
        since_s = min(self._wait_to_start.values(), default=self._loop.time())
        if (waiting_s := self._loop.time() - since_s) < _SLOW_CALL_S:
            return {}
        return {f"environments: {len(self._wait_to_start)} samples without a process": round(waiting_s, 3)}

    def slow_calls(self) -> dict[str, float]:
        """The environment that samples have waited for longest -> seconds so far, if that is long."""
        calls = [
            (worker.call_since_s, name)
            for worker, name in self._open.items()
            if worker.call_since_s is not None
        ]
        since_s, name = min(calls, default=(self._loop.time(), ""))
        waiting_s = self._loop.time() - since_s
        if waiting_s < _SLOW_CALL_S:
            return {}
        return {f"environments: {name} ({len(calls)} called)": round(waiting_s, 3)}

    async def open(self, *, split: Split, index: int, seed: int) -> EnvironmentSession:
        """An environment for one sample of an example. Raises EnvironmentLostError without a process."""
        mark = object()
        self._wait_to_start[mark] = self._loop.time()
        try:
            worker = await self._take_worker()
        except OSError as error:  # too many open files
            raise EnvironmentLostError(f"no process for an environment can be started: {error}") from error
        finally:
            del self._wait_to_start[mark]
        self._open[worker] = f"{split} {index}"
        return EnvironmentSession(self, worker, start=[split, index, seed])

    async def check(self) -> tuple[list[Message], list[dict[str, Any]]]:
        """Makes the environment of training example 0; its first messages and tools. Raises ConfigError."""
        try:
            environment = await self.open(split="train", index=0, seed=0)
            try:
                await environment.check()
                return await environment.reset()
            finally:
                environment.close()
        except EpisodeError as error:
            raise ConfigError(f"the environment of training example 0 cannot be made: {error}") from error

    def release(self, worker: WorkerConnection) -> None:
        """Closes the environment in the background, then uses its worker again. Called by its session."""
        del self._open[worker]
        if worker.lost is None:
            task = asyncio.create_task(self._close_environment(worker))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def kill(self, worker: WorkerConnection) -> None:
        """Ends its process at once, also in a call. Called by its session."""
        del self._open[worker]
        if worker.lost is None:
            self._retire(worker)

    async def _close_environment(self, worker: WorkerConnection) -> None:
        hung = EpisodeError(f"close() of the environment took longer than {_CLOSE_TIMEOUT_S:g} s")
        try:
            await worker.settled()
            is_reusable = await worker.call(["close"], timeout_s=_CLOSE_TIMEOUT_S, timed_out=hung)
        except EpisodeError as error:
            if worker.lost is None:
                log.warning("an environment was not closed: %s", error)
                self._retire(worker)
            return
        if is_reusable:
            self._idle.append(worker)
        else:
            self._retire(worker)

    def _retire(self, worker: WorkerConnection) -> None:
        """Ends a worker that nothing is wrong with."""
        self._workers.pop(worker.number, None)
        if self._zygote is not None:
            self._zygote.kill(worker.number)
        worker.lose(EpisodeError("the environment's process was ended"))

    async def _take_worker(self) -> WorkerConnection:
        if (worker := self._take_idle()) is not None:
            return worker
        async with self._may_start:
            if (worker := self._take_idle()) is not None:  # closed while this sample waited
                return worker
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    while self._zygote is None:  # it may be lost again before this task runs
                        await self._is_ready.wait()
            except TimeoutError:
                raise EnvironmentLostError("the process that starts environments does not start") from None
            return await self._fork_worker(self._zygote)

    def _take_idle(self) -> WorkerConnection | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.lost is None:
                return worker
        return None

    async def _fork_worker(self, zygote: ZygoteProcess) -> WorkerConnection:
        self._last_number += 1
        worker = WorkerConnection(self._last_number, on_lost=self._on_worker_lost)
        hung = EnvironmentLostError(f"no process for an environment started within {_FORK_TIMEOUT_S:g} s")
        own, theirs = socket.socketpair()
        try:
            with theirs:
                await self._loop.create_unix_connection(lambda: worker, sock=own)
                self._workers[worker.number] = worker
                zygote.fork(worker.number, theirs)
            await self._wait_started(worker, hung)
        except BaseException:  # most likely the caller was cancelled
            if worker.lost is hung and self._zygote is zygote:
                zygote.replace(f"it hangs: {hung}")
            self._retire(worker)
            own.close()
            raise
        return worker

    async def _wait_started(self, worker: WorkerConnection, hung: EpisodeError) -> None:
        """Until it runs. Loses it because of `hung` if no worker of the pool starts for too long.

        A worker is not lost for being slow: on a busy machine all are.
        """
        started = asyncio.ensure_future(worker.call(None, timeout_s=None, timed_out=hung))
        started.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may be gone
        patience = StartPatience()
        try:
            while not started.done() and worker.lost is None:
                await asyncio.wait({started}, timeout=_FORK_TIMEOUT_S / _FORK_CHECKS)
                if not started.done() and not patience.goes_on(self._num_started):
                    worker.lose(hung)
            await started
        finally:
            started.cancel()
        self._num_started += 1

    def _on_worker_ended(self, number: int, reason: str) -> None:
        if (worker := self._workers.get(number)) is not None:
            worker.lose(EpisodeError(f"the environment's process died ({reason})"))

    def _on_worker_lost(self, worker: WorkerConnection) -> None:
        if self._workers.pop(worker.number, None) is None:
            return  # it was retired
        self.num_restarts += 1
        log.warning("an environment's process is lost: %s", worker.lost)
        if self._zygote is not None:
            self._zygote.kill(worker.number)

    async def _keep_zygote(self, started: asyncio.Future[None]) -> None:
        """Keeps a zygote running. `started`: gets the outcome of the first start."""
        while True:
            reason = "this server ends"
            zygote = ZygoteProcess(self._setup, on_worker_ended=self._on_worker_ended)
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await zygote.ready
                self._zygote = zygote
                self._is_ready.set()
                if not started.done():
                    started.set_result(None)
                reason = await zygote.lost
                log.error("the process that starts environments was lost (%s); another is started", reason)
                self.num_restarts += 1
            except (ConfigError, EnvironmentLostError, TimeoutError) as error:
                problem = str(error) or f"its import took longer than {_START_TIMEOUT_S:g} s"
                if not started.done():
                    started.set_exception(ConfigError(f"the task's environments cannot start: {problem}"))
                    return
                log.error("environments cannot start: %s", problem)
            finally:
                self._zygote = None
                self._is_ready.clear()
                zygote.close()
                self._lose_workers(reason)
            await asyncio.sleep(_RESTART_DELAY_S)

    def _lose_workers(self, reason: str) -> None:
        workers, self._workers = self._workers, {}
        self._idle.clear()
        for worker in workers.values():
            worker.lose(EnvironmentLostError(f"the process that starts environments was lost: {reason}"))


class EnvironmentSession:
    """One environment, for one sample: `reset`, then `step` for each turn, and `close` in any case."""

    def __init__(self, pool: EnvironmentPool, worker: WorkerConnection, *, start: list[Any]) -> None:
        self._pool = pool
        self._worker: WorkerConnection | None = worker
        self._start = start
        self.label = ""
        """Label of the example; known after `reset`."""

    async def check(self) -> None:
        """Calls the environment's `check`. Raises EpisodeError with its message."""
        await self._call("check", *self._start)

    async def reset(self) -> tuple[list[Message], list[dict[str, Any]]]:
        """The messages before the first turn, and the tools. Raises EpisodeError."""
        value = await self._call("reset", *self._start)
        if isinstance(value, list) and len(value) == 3:
            *value, label = value
            self.label = checked_label(label)
        return checked_start(value)

    async def step(self, reply: Reply) -> Step:
        """The environment's answer to one turn. Raises EpisodeError."""
        return checked_step(await self._call("step", reply_fields(reply)))

    async def run_agent(self, base_url: str, api_key: str) -> Score | None:
        """Runs the task's `agent()`, whose time the caller limits. Raises EpisodeError."""
        assert self._worker is not None
        ended = EpisodeError("the agent's process was ended")
        request = ["agent", *self._start, base_url, api_key]
        value = await self._worker.call(request, timeout_s=None, timed_out=ended)
        return checked_score(value)

    def close(self) -> None:
        """Closes the environment in the background, also while a call is in progress."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.release(worker)

    def kill(self) -> None:
        """Ends the process at once, also while a call is in progress."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.kill(worker)

    async def _call(self, *request: Any) -> Any:
        assert self._worker is not None
        pool, loop = self._pool, asyncio.get_running_loop()
        limit = f"episode.step_timeout_s={pool.step_timeout_s:g}"
        hung = EpisodeError(f"{request[0]}() of the environment took longer than {limit}")
        started_s = loop.time()
        try:
            return await self._worker.call(list(request), timeout_s=pool.step_timeout_s, timed_out=hung)
        finally:
            pool.seconds_total += loop.time() - started_s
            pool.num_calls += 1
