"""Rewards in worker processes: a reward function is a researcher's code, and may raise, hang, print, or take the process with it.

A pool of `python -m rollout_server.rewards.worker`, each with a queue of its own; the protocol is in that module. Why not
multiprocessing: it pickles, and a hung worker of an executor cannot be told from its neighbours. Why processes: a thread
cannot be killed, and the event loop must not wait.

    worker:  STARTING -> SERVING -> (a timeout, a crash) -> STARTING ...  -> CLOSED
    item:    queued -> sent -> answered | failed (it was first in line when its worker was lost) | sent again (it stood behind)

Items submitted in the same tick of the loop travel in one frame a worker: at 700 samples a second that halves the cost of a reward.
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

from areal_like.errors import RewardError
from rollout_server.rewards.worker import HEADER, MAX_FRAME_BYTES, pack
from rollout_server.tasks.base import Split

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
"""Importing a task may pull in a large library."""
_RESTART_DELAY_S = 1.0
"""Pause after a worker that could not even start, so that a broken import does not spin."""

_REAP_DELAY_S = 0.05
"""Between the end of a worker's stream and its exit code."""
_LOST = (ConnectionError, asyncio.IncompleteReadError)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one completion is worth."""

    value: float
    components: dict[str, float]
    """Named parts, when the task returned a dict."""
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

    def __init__(self, task: Mapping[str, Any], *, seed: int, num_workers: int, timeout_s: float) -> None:
        """`task` and `seed` are what `make_task` takes; `timeout_s` is the limit of one reward."""
        self._workers = [_Worker(task=dict(task), seed=seed, timeout_s=timeout_s) for _ in range(num_workers)]
        self._numbers = 0
        self._unsent: list[_Item] = []
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
        """One task a worker; each ends only with the pool, or because no process can be started at all."""
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
        """The reward of a completion. Raises RewardError if the task raised, hung past the limit, or returned no finite number."""
        loop = asyncio.get_running_loop()
        self._numbers += 1
        item = _Item(
            number=self._numbers, split=split, index=index, completion=completion, done=loop.create_future()
        )
        if not self._unsent:
            loop.call_soon(self._send)
        self._unsent.append(item)
        reward = await item.done
        self.seconds_total += reward.seconds
        return reward

    def _send(self) -> None:
        items, self._unsent = self._unsent, []
        # The least loaded worker first; a hung one keeps its queue and so gets no more than its share.
        ranked = sorted(self._workers, key=lambda worker: len(worker.items))
        for position, worker in enumerate(ranked):
            if share := items[position :: len(ranked)]:
                worker.submit(share)


class _Worker:
    """One process and the items it has not answered, oldest first."""

    def __init__(self, *, task: dict[str, Any], seed: int, timeout_s: float) -> None:
        self._setup = {"task": task, "seed": seed}
        self._timeout_s = timeout_s
        self._pipe: asyncio.StreamWriter | None = None
        self.running: asyncio.Task[None] | None = None
        self._clock: asyncio.Timeout | None = None
        self.items: OrderedDict[int, _Item] = OrderedDict()
        self.num_lost = 0

    def start(self) -> None:
        self.running = asyncio.create_task(self._run(), name="reward-worker")

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        while self.items:
            self._fail_first("the reward pool was closed")

    def submit(self, items: list[_Item]) -> None:
        if not self.items and self._clock is not None:
            self._clock.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
        self.items.update((item.number, item) for item in items)
        if self._pipe is not None:
            self._pipe.write(pack([[item.number, item.split, item.index, item.completion] for item in items]))

    async def _run(self) -> None:
        while True:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "rollout_server.rewards.worker"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                )
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                await self._serve(process, reader, writer)
            finally:
                self._pipe = self._clock = None
                writer.close()
                process.kill()
                process.wait()  # SIGKILL cannot be refused: this returns at once

    async def _serve(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Feeds one process until it is lost."""
        try:
            writer.write(pack(self._setup))
            async with asyncio.timeout(_START_TIMEOUT_S):
                problem = await _read(reader)
        except (TimeoutError, ValueError, *_LOST) as lost:
            problem = f"the process ended or said nothing for {_START_TIMEOUT_S:g} s ({type(lost).__name__}); see the log"
        if problem is not None:
            await asyncio.sleep(_RESTART_DELAY_S)
            log.error("reward worker cannot start: %s", problem)
            while self.items:
                self._fail_first(f"reward worker cannot start: {problem}")
            return
        self._pipe = writer
        if (
            self.items
        ):  # they stood behind the item that cost the last process its life, or came before it was ready
            self.submit(list(self.items.values()))
        while True:
            try:
                # Reads also while idle (without a limit, until `submit` sets one): a worker that dies then must not cost an item.
                async with asyncio.timeout(self._timeout_s if self.items else None) as self._clock:
                    number, value, components, seconds, error = await _read(reader)
                self._answer(number, value, components, seconds, error)
            except TimeoutError:
                await self._lose(f"reward took longer than rollout.reward_timeout_s={self._timeout_s:g}")
                return
            except _LOST:
                await self._lose(f"the reward process died ({await _how(process)})")
                return
            except (ValueError, TypeError, KeyError) as error:
                await self._lose(
                    f"the reward process wrote what is no answer ({type(error).__name__}: {error})"
                )
                return

    def _answer(
        self, number: int, value: float, components: dict[str, float], seconds: float, error: str
    ) -> None:
        done = self.items.pop(number).done
        if done.done():  # its asker was cancelled meanwhile
            return
        if error:
            done.set_exception(RewardError(error))
        else:
            done.set_result(Reward(value=value, components=components, seconds=seconds))

    async def _lose(self, reason: str) -> None:
        self._pipe = self._clock = None
        self.num_lost += 1
        log.warning("reward worker restarts: %s", reason)
        if self.items:
            self._fail_first(reason)
        else:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _fail_first(self, reason: str) -> None:
        _, item = self.items.popitem(last=False)
        if not item.done.done():
            item.done.set_exception(RewardError(reason))


async def _how(process: subprocess.Popen[bytes]) -> str:
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
