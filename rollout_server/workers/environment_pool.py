"""The environments of one task: opens one per sample in a worker process, and closes it.

    worker:   starting -> serving one environment -> closed in order: idle -> serving the next ...
                                                  -> time limit, memory, crash: killed

An environment that raises, hangs, or ends its process fails only its own sample (EpisodeError). If
environments are lost because the process that starts workers ended, their samples fail with
EnvironmentLostError, because the environments were not at fault. Environments are closed in the background,
so no sample waits for that.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from typing import Any

from areal_like.errors import ConfigError, EpisodeError
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.environments.exchange import checked_label, checked_start, checked_step, reply_fields
from rollout_server.tasks.base import Score, Split
from rollout_server.workers.environment_worker import checked_agent_score
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.worker import ENVIRONMENT, Worker

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
_SHUTDOWN_TIMEOUT_S = 2.0
_SLOW_CALL_S = 1.0
"""Longer calls are listed in the server's status."""


class EnvironmentPool:
    """The environments of one server. Create it in a running loop, with `async with`."""

    def __init__(self, host: WorkerHost, *, step_timeout_s: float, memory_mb: int) -> None:
        """For the limits see `EpisodeConfig`."""
        self._host = host
        self.step_timeout_s = step_timeout_s
        self._memory_mb = memory_mb
        self._loop = asyncio.get_running_loop()
        self._idle: list[Worker] = []
        """Idle workers; the most recently used one is used next, because its memory is warm."""
        self._closing: set[asyncio.Task[None]] = set()
        self._wait_to_start: dict[object, float] = {}
        """Samples without a worker -> loop time since when they wait."""
        self._open: dict[Worker, str] = {}
        """The environment that each worker serves."""
        self.seconds_total = 0.0
        """Time that samples have waited for calls of their environments, in seconds."""
        self.num_calls = 0
        """Number of calls that have ended."""

    async def __aenter__(self) -> EnvironmentPool:
        """Raises ConfigError if the task cannot be imported."""
        await self._host.imported()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._closing:
            await asyncio.wait(self._closing, timeout=_SHUTDOWN_TIMEOUT_S)
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """Tasks that end only when the pool is closed, or if no process can be started."""
        return self._host.serving

    @property
    def num_restarts(self) -> int:
        """Number of workers and zygotes lost to a time limit or a crash."""
        return self._host.num_restarts(ENVIRONMENT)

    @property
    def num_open(self) -> int:
        """Number of environments in use by samples."""
        return len(self._open)

    @property
    def num_calling(self) -> int:
        """Number of environments that samples wait for."""
        return sum(worker.call_since_s is not None for worker in self._open)

    def slow_starts(self) -> dict[str, float]:
        """Returns the number of samples that wait for a process -> seconds of the longest wait, if that is
        long."""
        waiting = self._wait_to_start.values()
        return self._slow(f"{len(waiting)} samples without a process", waiting)

    def slow_calls(self) -> dict[str, float]:
        """Returns the environment that a sample has waited for longest -> seconds so far, if that is long."""
        calls = [(one.call_since_s, name) for one, name in self._open.items() if one.call_since_s is not None]
        _, name = min(calls, default=(0.0, ""))
        return self._slow(f"{name} ({len(calls)} called)", [since_s for since_s, _ in calls])

    def _slow(self, what: str, since_s: Iterable[float]) -> dict[str, float]:
        waiting_s = self._loop.time() - min(since_s, default=math.inf)
        return {f"environments: {what}": round(waiting_s, 3)} if waiting_s >= _SLOW_CALL_S else {}

    async def open(self, *, split: Split, index: int, seed: int) -> EnvironmentSession:
        """Opens an environment for one sample of an example. Raises EnvironmentLostError without a
        process."""
        mark = object()
        self._wait_to_start[mark] = self._loop.time()
        try:
            worker = await self._take_worker()
        finally:
            del self._wait_to_start[mark]
        self._open[worker] = f"{split} {index}"
        return EnvironmentSession(self, worker, start=[split, index, seed])

    async def check(self) -> tuple[list[Message], list[dict[str, Any]]]:
        """Creates the environment of training example 0; returns its first messages and tools. Raises
        ConfigError."""
        try:
            environment = await self.open(split="train", index=0, seed=0)
            try:
                await environment.check()
                return await environment.reset()
            finally:
                environment.close()
        except EpisodeError as error:
            raise ConfigError(f"the environment of training example 0 cannot be made: {error}") from error

    def release(self, worker: Worker) -> None:
        """Closes the environment in the background, then uses its worker again. Called by its session."""
        del self._open[worker]
        if worker.lost is None:
            task = asyncio.create_task(self._close_environment(worker))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def kill(self, worker: Worker) -> None:
        """Kills its process at once, even during a call. Called by its session."""
        del self._open[worker]
        self._host.end(worker)

    async def _close_environment(self, worker: Worker) -> None:
        hung = f"close() of the environment took longer than {_CLOSE_TIMEOUT_S:g} s"
        try:
            await worker.settled()
            is_reusable = await worker.call(["close"], timeout_s=_CLOSE_TIMEOUT_S, timed_out=hung)
        except EpisodeError as error:
            if worker.lost is None:
                log.warning("an environment was not closed: %s", error)
                self._host.end(worker)
            return
        if is_reusable:
            self._idle.append(worker)
        else:
            self._host.end(worker)

    async def _take_worker(self) -> Worker:
        if (worker := self._take_idle()) is None:
            worker, _ = await self._host.start(
                ENVIRONMENT, instead=self._take_idle, memory_mb=self._memory_mb
            )
        return worker

    def _take_idle(self) -> Worker | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.lost is None:
                return worker
        return None


class EnvironmentSession:
    """One environment, for one sample: `reset`, then `step` for each turn, and `close` in any case."""

    def __init__(self, pool: EnvironmentPool, worker: Worker, *, start: list[Any]) -> None:
        self._pool = pool
        self._worker: Worker | None = worker
        self._start = start
        self.label = ""
        """Label of the example; set by `reset`."""

    async def check(self) -> None:
        """Calls the environment's `check`. Raises EpisodeError with the message of its failure."""
        await self._call("check", *self._start)

    async def reset(self) -> tuple[list[Message], list[dict[str, Any]]]:
        """Returns the messages before the first turn, and the tools. Raises EpisodeError."""
        value = await self._call("reset", *self._start)
        if isinstance(value, list) and len(value) == 3:
            *value, label = value
            self.label = checked_label(label)
        return checked_start(value)

    async def step(self, reply: Reply) -> Step:
        """Returns the environment's response to one turn. Raises EpisodeError."""
        return checked_step(await self._call("step", reply_fields(reply)))

    async def run_agent(self, base_url: str, api_key: str) -> Score | None:
        """Runs the task's `agent()`, whose time the caller limits. Raises EpisodeError."""
        assert self._worker is not None
        request = ["agent", *self._start, base_url, api_key]
        value = await self._worker.call(request, timeout_s=None, timed_out="")
        return checked_agent_score(value)

    def close(self) -> None:
        """Closes the environment in the background, even while a call is in progress."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.release(worker)

    def kill(self) -> None:
        """Kills the process at once, even while a call is in progress."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._pool.kill(worker)

    async def _call(self, *request: Any) -> Any:
        assert self._worker is not None
        pool, loop = self._pool, asyncio.get_running_loop()
        limit = f"episode.step_timeout_s={pool.step_timeout_s:g}"
        hung = f"{request[0]}() of the environment took longer than {limit}"
        started_s = loop.time()
        try:
            return await self._worker.call(list(request), timeout_s=pool.step_timeout_s, timed_out=hung)
        finally:
            pool.seconds_total += loop.time() - started_s
            pool.num_calls += 1
