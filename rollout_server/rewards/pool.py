"""A pool of worker processes that run reward functions, which may raise, hang, print, or crash the process.

Each worker is a `python -m rollout_server.rewards.worker` with its own queue; worker.py describes the
protocol. Workers are processes, because a thread cannot be killed and the event loop must not wait. They are
not started with multiprocessing, because it pickles, and because an executor does not report which of its
workers hangs.

    worker:  STARTING -> SERVING -> (timeout or crash: killed) -> STARTING ...  -> CLOSED
    item:    queued -> sent -> scored
                            -> worker lost while scoring this item: failed
                            -> worker lost while scoring an earlier item: sent again to the new worker

A failed reward is not retried here: `score` raises RewardError, or RewardTimeoutError after the time limit,
and `buffer.on_failure` says what becomes of the sample. Items submitted in the same turn of the event loop
are sent to each worker in one frame: at 700 samples per second that halves the cost of a reward.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.rewards.worker import HEADER, MAX_FRAME_BYTES, pack
from rollout_server.tasks.base import Split

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
"""Long, because importing a task may import a large library."""
_RESTART_DELAY_S = 1.0
"""Pause before a worker that could not start is restarted: a broken import must not cause a busy loop."""
_REAP_DELAY_S = 0.05
"""Wait between the end of a worker's stream and reading its exit code."""
_STREAM_LOST = (ConnectionError, asyncio.IncompleteReadError)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The score of one completion."""

    value: float
    components: dict[str, float]
    """Named parts, if the task returned a dict; else empty."""
    seconds: float
    """Time spent in the task's code."""


@dataclass(eq=False, kw_only=True)
class _Item:
    number: int
    split: Split
    index: int
    completion: str
    done: asyncio.Future[Reward]


class RewardPool:
    """Worker processes that score completions. Create it in a running loop, with `async with`."""

    def __init__(
        self,
        task: Mapping[str, Any],
        *,
        seed: int,
        sandbox: str = "bwrap",
        num_workers: int,
        timeout_s: float,
    ) -> None:
        """`task`, `seed`, `sandbox`: arguments of `make_task`; `timeout_s`: time limit of one reward."""
        setup = {"task": dict(task), "seed": seed, "sandbox": sandbox}
        self._workers = [_Worker(setup, timeout_s=timeout_s) for _ in range(num_workers)]
        self._last_number = 0
        self._unsent: list[_Item] = []
        """Items submitted in this turn of the loop."""
        self.seconds_total = 0.0
        """Time spent in the task's code by all workers."""

    async def __aenter__(self) -> RewardPool:
        for worker in self._workers:
            worker.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """One asyncio task per worker; it ends only with the pool, or if no process can be started."""
        return [worker.running for worker in self._workers if worker.running is not None]

    @property
    def num_restarts(self) -> int:
        """Workers that were lost to a timeout or a crash."""
        return sum(worker.num_lost for worker in self._workers)

    @property
    def num_waiting(self) -> int:
        """Completions that are not scored yet."""
        return len(self._unsent) + sum(len(worker.items) for worker in self._workers)

    async def score(self, *, split: Split, index: int, completion: str) -> Reward:
        """The reward of a completion.

        Raises RewardTimeoutError if the task exceeded the time limit, and RewardError if it raised, crashed,
        or returned no finite number.
        """
        loop = asyncio.get_running_loop()
        self._last_number += 1
        item = _Item(
            number=self._last_number,
            split=split,
            index=index,
            completion=completion,
            done=loop.create_future(),
        )
        if not self._unsent:
            loop.call_soon(self._send)
        self._unsent.append(item)
        reward = await item.done
        self.seconds_total += reward.seconds
        return reward

    def _send(self) -> None:
        items, self._unsent = self._unsent, []
        # Items go round-robin to the workers, the least loaded first. A worker that hangs has a long queue
        # and comes last.
        by_load = sorted(self._workers, key=lambda worker: len(worker.items))
        for position, worker in enumerate(by_load):
            if share := items[position :: len(by_load)]:
                worker.submit(share)


class _Worker:
    """One process, restarted when it is lost, and the items it has not scored yet, oldest first."""

    def __init__(self, setup: dict[str, Any], *, timeout_s: float) -> None:
        self._setup = setup
        self._timeout_s = timeout_s
        self._pipe: asyncio.StreamWriter | None = None
        """None while no process is ready."""
        self._limit: asyncio.Timeout | None = None
        """Time limit of the item that is being scored."""
        self.running: asyncio.Task[None] | None = None
        self.items: OrderedDict[int, _Item] = OrderedDict()
        self.num_lost = 0

    def start(self) -> None:
        self.running = asyncio.create_task(self._run(), name="reward-worker")

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        while self.items:
            self._fail_first(RewardError("the reward pool was closed"))

    def submit(self, items: list[_Item]) -> None:
        if not self.items and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
        self.items.update((item.number, item) for item in items)
        if self._pipe is not None:
            self._pipe.write(pack([[item.number, item.split, item.index, item.completion] for item in items]))

    async def _run(self) -> None:
        while True:
            own_end, worker_end = socket.socketpair()
            with worker_end:
                process = subprocess.Popen(
                    [sys.executable, "-m", "rollout_server.rewards.worker"],
                    stdin=worker_end.fileno(),
                    stdout=worker_end.fileno(),
                )
            reader, writer = await asyncio.open_connection(sock=own_end)
            try:
                await self._serve(process, reader, writer)
            finally:
                self._pipe = self._limit = None
                writer.close()
                process.kill()
                process.wait()  # returns at once: a process cannot ignore SIGKILL

    async def _serve(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serves items with one process until it is lost."""
        try:
            writer.write(pack(self._setup))
            async with asyncio.timeout(_START_TIMEOUT_S):
                problem = await _read(reader)
        except (TimeoutError, ValueError, *_STREAM_LOST) as lost:
            problem = (
                f"the process ended or did not answer for {_START_TIMEOUT_S:g} s ({type(lost).__name__}); "
                "see the log"
            )
        if problem is not None:
            await asyncio.sleep(_RESTART_DELAY_S)
            log.error("reward worker cannot start: %s", problem)
            while self.items:
                self._fail_first(RewardError(f"reward worker cannot start: {problem}"))
            return
        self._pipe = writer
        # Items that were queued behind the one that the last process was lost with, or that were submitted
        # before this process was ready.
        if self.items:
            self.submit(list(self.items.values()))
        while True:
            try:
                # Reads also while idle, without a time limit until `submit` sets one, so that a worker that
                # dies while idle is noticed before an item is sent to it.
                async with asyncio.timeout(self._timeout_s if self.items else None) as self._limit:
                    number, value, components, seconds, error = await _read(reader)
                self._answer(number, value, components, seconds, error)
            except TimeoutError:
                limit = f"rollout.reward_timeout_s={self._timeout_s:g}"
                await self._on_lost(RewardTimeoutError(f"reward took longer than {limit}"))
                return
            except _STREAM_LOST:
                await self._on_lost(RewardError(f"the reward process died ({await _exit_reason(process)})"))
                return
            except (ValueError, TypeError, KeyError) as error:
                invalid = f"the reward process wrote an invalid answer ({type(error).__name__}: {error})"
                await self._on_lost(RewardError(invalid))
                return

    def _answer(
        self, number: int, value: float, components: dict[str, float], seconds: float, error: str
    ) -> None:
        done = self.items.pop(number).done
        if done.done():  # the caller was cancelled in the meantime
            return
        if error:
            done.set_exception(RewardError(error))
        else:
            done.set_result(Reward(value=value, components=components, seconds=seconds))

    async def _on_lost(self, reason: RewardError) -> None:
        self._pipe = self._limit = None
        self.num_lost += 1
        log.warning("reward worker restarts: %s", reason)
        if self.items:
            self._fail_first(reason)
        else:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _fail_first(self, reason: RewardError) -> None:
        _, item = self.items.popitem(last=False)
        if not item.done.done():
            item.done.set_exception(reason)


async def _exit_reason(process: subprocess.Popen[bytes]) -> str:
    await asyncio.sleep(_REAP_DELAY_S)
    match process.poll():
        case None:
            return "it closed its stream"
        case code:
            return f"signal {-code}" if code < 0 else f"exit code {code}"


async def _read(stream: asyncio.StreamReader) -> Any:
    (size,) = HEADER.unpack(await stream.readexactly(HEADER.size))
    if size > MAX_FRAME_BYTES:
        raise ConnectionError(f"frame of {size} bytes")
    return msgpack.unpackb(await stream.readexactly(size))
