"""The queue of completions of one task, and the worker processes that compute their rewards.

    worker:  STARTING -> SERVING -> (time limit or crash) -> STARTING ...  -> CLOSED
    item:    queued -> sent to the next free worker -> scored
                       -> worker lost while scoring this item: failed
                       -> worker lost while scoring another item: queued again, first
                       -> behind an item that takes long: queued again, first; its first score counts

All items wait in one queue, and a worker gets the next ones when it has returned the last, so a slow reward
does not delay other items while a worker is free. At 700 samples per second, sending one item at a time would
double the cost of a reward, so a worker gets as many fast rewards at a time as take `_BATCH_S`. If one of
them takes long after all, the items behind it are also given to other workers.

When a worker is lost, which item caused that? A synchronous worker returns results in order, so it was the
first item. With `async def reward`, each worker computes up to `rollout.reward_concurrency` rewards at a time
and the cause is unknown, so each item is sent again, alone.

A failed reward is not retried here: `score` raises RewardError, or RewardTimeoutError after the time limit,
and `buffer.on_failure` determines what happens to the sample.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Self

from areal_like.config import Config
from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.rewards.scores import score_of
from rollout_server.tasks.base import Completion, Score, Split, Task
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_worker import pack_item
from rollout_server.workers.worker import REWARD, Worker

log = logging.getLogger(__name__)

_BATCH_S = 0.02
"""Target time for all items that are sent together."""
_MAX_BATCH = 64
_MAX_BATCH_BYTES = 1 << 20
_MAX_ITEM_BYTES = 32 << 20
_RESTART_DELAY_S = 1.0
"""Pause after a worker could not start, or was lost without an item."""
_SLOW_S = 0.25
"""After this time with one item, the items behind it go back to the queue."""
_BLOCKED_S = 2.0
"""An asynchronous worker ends late rewards itself. If it is late by this much more, its event loop is
blocked."""
_LATE_S = 2.0
"""Completions that wait longer are listed among the server's waits."""
_SMOOTHING = 0.1
"""Weight of the newest reward in the moving average of reward times."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The score of one completion."""

    score: Score
    """Checked: finite numbers, and `turns` and `tokens` of the completion's length or empty."""
    seconds: float
    """Time spent in the task's code, in seconds."""


@dataclass(eq=False, kw_only=True)
class _Item:
    """One completion to score."""

    number: int
    frame: bytes
    """The frame that is sent to a worker."""
    done: asyncio.Future[tuple[Score, float]]
    """The score, and the seconds in the task's code; or a RewardError."""
    is_alone: bool = False
    """True after a worker was lost while it was scoring this item together with others."""
    sent_s: float = 0.0
    """When it was sent to a worker."""

    def fail(self, reason: RewardError) -> None:
        """Ends the item, unless it is scored or its caller was cancelled."""
        if not self.done.done():
            self.done.set_exception(type(reason)(str(reason)))


class RewardPool:
    """Scores completions. Belongs to one event loop; runs inside `async with`. Its host must outlive it."""

    def __init__(self, host: WorkerHost, *, num_workers: int, timeout_s: float, concurrency: int = 1) -> None:
        """`timeout_s`: time limit of one reward; `concurrency`: rewards that one worker computes at the same
        time, if the reward is asynchronous."""
        self._host = host
        self._workers = [
            _RewardWorker(self, host, timeout_s=timeout_s, concurrency=concurrency)
            for _ in range(num_workers)
        ]
        self._running: list[asyncio.Task[None]] = []
        self._last_number = 0
        self._queue: deque[_Item] = deque()
        self._is_dispatching = False
        """True while items submitted in this turn of the loop are not yet sent."""
        self._mean_s = 0.0
        self._since_s: dict[int, float] = {}
        """When each completion that is not yet scored was submitted, oldest first."""
        self.seconds_total = 0.0
        """Time spent in the task's code by all workers, in seconds."""

    @classmethod
    def of(cls, config: Config, task: Task, host: WorkerHost) -> Self:
        """Creates a pool with the settings of a job; it has no workers if the task has no reward."""
        rollout = config.rollout
        return cls(
            host,
            num_workers=rollout.reward_workers if task.has_reward else 0,
            timeout_s=rollout.reward_timeout_s,
            concurrency=rollout.reward_concurrency,
        )

    async def __aenter__(self) -> RewardPool:
        running = [worker.run() for worker in self._workers]
        if running:
            running.append(self._watch())
        self._running = [asyncio.create_task(one, name="rewards") for one in running]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for worker in self._workers:
            self._queue += worker.taken()
        self._fail_queued(RewardError("the reward pool was closed"))

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """Tasks that end only when the pool or its host is closed, or if no process can be started."""
        return [*self._running, *self._host.serving]

    @property
    def num_restarts(self) -> int:
        """Number of workers lost to a timeout or a crash, and of losses of the process that starts them."""
        return self._host.num_restarts(REWARD)

    @property
    def num_waiting(self) -> int:
        """Number of completions that are not scored yet."""
        return len(self._since_s)

    def waits(self) -> dict[str, float]:
        """Returns how long the oldest completion has waited for its score; empty for less than `_LATE_S`."""
        oldest_s = next(iter(self._since_s.values()), None)
        if oldest_s is None:
            return {}
        seconds = asyncio.get_running_loop().time() - oldest_s
        return {f"rewards: {self.num_waiting} completions": round(seconds, 3)} if seconds > _LATE_S else {}

    async def score(self, *, split: Split, index: int, completion: Completion) -> Reward:
        """Returns the reward of a completion.

        Raises RewardTimeoutError if the task exceeded the time limit, and RewardError if it raised, crashed,
        or returned no valid score.
        """
        loop = asyncio.get_running_loop()
        self._last_number += 1
        try:
            frame = pack_item(self._last_number, split=split, index=index, completion=completion)
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(f"the conversation cannot be sent to a reward process: {error}") from None
        if len(frame) > _MAX_ITEM_BYTES:
            raise RewardError(
                f"the conversation has {len(frame)} bytes: at most {_MAX_ITEM_BYTES} are sent to a reward"
            )
        item = _Item(number=self._last_number, frame=frame, done=loop.create_future())
        self._queue.append(item)
        if not self._is_dispatching:
            self._is_dispatching = True
            loop.call_soon(self.dispatch)
        self._since_s[item.number] = loop.time()
        try:
            score, seconds = await item.done
        finally:
            del self._since_s[item.number]
        self._mean_s += _SMOOTHING * (seconds - self._mean_s) if self._mean_s else seconds
        self.seconds_total += seconds
        return Reward(score=score, seconds=seconds)

    def put_back(self, items: list[_Item]) -> None:
        """Requeues items that a worker will not score soon, ahead of all others."""
        self._queue.extendleft(reversed(items))
        self.dispatch()

    def dispatch(self) -> None:
        """Distributes queued items evenly among the free workers."""
        self._is_dispatching = False
        free = [worker for worker in self._workers if worker.room]
        for position, worker in enumerate(free):
            share = -(-len(self._queue) // (len(free) - position))
            if not worker.is_async:
                share = min(share, self._batch_size)
            if items := self._take(min(share, worker.room), is_idle=not worker.items):
                worker.submit(items)
            elif not self._queue:
                return
        if not free and self._workers and all(worker.problem for worker in self._workers):
            self._fail_queued(RewardError(f"reward worker cannot start: {self._workers[0].problem}"))

    @property
    def _batch_size(self) -> int:
        return max(1, min(_MAX_BATCH, int(_BATCH_S / self._mean_s))) if self._mean_s else 1

    def _take(self, most: int, *, is_idle: bool) -> list[_Item]:
        """Takes the next items from the queue for a worker, without those already scored or no longer
        needed."""
        items: list[_Item] = []
        num_bytes = 0
        while self._queue and len(items) < most:
            item = self._queue[0]
            if item.done.done():
                self._queue.popleft()
                continue
            num_bytes += len(item.frame)
            if item.is_alone and (items or not is_idle):
                break
            if items and num_bytes > _MAX_BATCH_BYTES:
                break
            items.append(self._queue.popleft())
            if item.is_alone:
                break
        return items

    async def _watch(self) -> None:
        """Ends workers that hang, and gives items behind a slow reward to other workers, too."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _SLOW_S
            await asyncio.sleep(_SLOW_S)
            late_s = loop.time() - due_s
            for worker in self._workers:
                # This process was suspended, and perhaps its workers, too, so the time does not count.
                worker.check(now_s=loop.time(), not_counted_s=late_s if late_s > _SLOW_S else 0.0)

    def _fail_queued(self, reason: RewardError) -> None:
        queued, self._queue = self._queue, deque()
        for item in queued:
            item.fail(reason)


class _RewardWorker:
    """A worker process, restarted when it is lost, and the items sent to it, oldest first."""

    def __init__(self, pool: RewardPool, host: WorkerHost, *, timeout_s: float, concurrency: int) -> None:
        self._pool = pool
        self._host = host
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._loop = asyncio.get_running_loop()
        self._worker: Worker | None = None
        """The worker; None while no process is ready."""
        self.is_async = False
        """True if the process computes several rewards at the same time."""
        self._began_s = 0.0
        """When a synchronous worker started its first item."""
        self._is_slow = False
        """True if the items behind the first one were also given to other workers."""
        self.items: OrderedDict[int, _Item] = OrderedDict()
        self.problem = ""
        """Why the last process could not start; empty if it could."""

    @property
    def room(self) -> int:
        """Number of items that can be sent to it now."""
        if self._worker is None or not self._worker.is_connected:
            return 0
        if self.is_async:
            is_alone = any(item.is_alone for item in self.items.values())
            return 0 if is_alone else self._concurrency - len(self.items)
        return 0 if self.items else sys.maxsize

    def submit(self, items: list[_Item]) -> None:
        """Sends items; at most `room`."""
        assert self._worker is not None
        now_s = self._loop.time()
        if not self.items:
            self._began_s, self._is_slow = now_s, False
        for item in items:
            item.sent_s = now_s
            self.items[item.number] = item
        self._worker.send(b"".join([item.frame for item in items]))

    def _deadline_s(self) -> float:
        """Time after which the process is considered hung; infinite while it has nothing to do."""
        if not self.items:
            return math.inf
        if self.is_async:
            return next(iter(self.items.values())).sent_s + self._timeout_s + _BLOCKED_S
        return self._began_s + self._timeout_s

    def check(self, *, now_s: float, not_counted_s: float) -> None:
        """Ends the process if it hangs, and gives away the items behind a slow reward.

        `not_counted_s`: part of the time since the last check that is not counted.
        """
        self._began_s += not_counted_s
        for item in self.items.values():
            item.sent_s += not_counted_s
        if self._worker is None:
            return
        if now_s >= self._deadline_s():
            self._worker.lose(self._too_long())
        elif not (self.is_async or self._is_slow) and now_s >= self._began_s + _SLOW_S:
            self._is_slow = True
            self._pool.put_back(list(self.items.values())[1:])

    async def run(self) -> None:
        """Keeps a process running."""
        while True:
            ended: asyncio.Future[Worker] = self._loop.create_future()
            try:
                worker, self.is_async = await self._host.start(
                    REWARD, on_message=self._take, on_lost=ended.set_result, timeout_s=self._timeout_s
                )
            except RewardError as error:
                self.problem = str(error)
                log.error("reward worker cannot start: %s", self.problem)
                self._pool.dispatch()  # if no other worker can start either, the queued items fail
                await asyncio.sleep(_RESTART_DELAY_S)
                continue
            self.problem = ""
            self._worker = worker
            try:
                self._pool.dispatch()
                await asyncio.shield(ended)
            finally:
                self._worker = None
                self._host.end(worker)
            reason = worker.lost
            assert isinstance(reason, RewardError)
            await self._give_back(reason)

    def _take(self, message: Any) -> None:
        """Handles the result of one item. Raises ValueError or TypeError if it is invalid."""
        number, seconds, fields, error, is_timeout = message
        score = None if error else score_of(fields)
        item = self.items.pop(number, None)
        if item is None:
            raise ValueError("a score that was not requested")
        self._began_s = self._loop.time()
        if is_timeout:
            item.fail(self._too_long())
        elif score is None:
            item.fail(RewardError(error))
        elif not item.done.done():
            item.done.set_result((score, seconds))
        if self.room:
            self._pool.dispatch()

    async def _give_back(self, reason: RewardError) -> None:
        """Fails the item that caused the loss of the process, and requeues the others."""
        items = self.taken()
        if self.is_async and len(items) > 1:
            for item in items:
                item.is_alone = True
            self._pool.put_back(items)
        elif items:
            items[0].fail(reason)
            self._pool.put_back([] if self._is_slow else items[1:])
        else:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _too_long(self) -> RewardTimeoutError:
        return RewardTimeoutError(f"reward took longer than rollout.reward_timeout_s={self._timeout_s:g}")

    def taken(self) -> list[_Item]:
        """Removes and returns its items."""
        items, self.items = list(self.items.values()), OrderedDict()
        return items
