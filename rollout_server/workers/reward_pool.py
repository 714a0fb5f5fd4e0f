"""A pool of worker processes that run reward functions, which may raise, hang, print, or crash the process.

Each worker is a `python -m rollout_server.workers.reward_worker`; worker.py describes the protocol.
Workers are processes, because a thread cannot be killed and the event loop must not wait. They are not started with
multiprocessing, because it pickles, and because an executor does not report which of its workers hangs.

    worker:  STARTING -> SERVING -> (timeout or crash: killed) -> STARTING ...  -> CLOSED
    item:    queued -> sent to the next free worker -> scored
                       -> worker lost while scoring this item: failed
                       -> worker lost while scoring another item: queued again, first
                       -> behind an item that takes long: queued again, first

All items wait in one queue, and a worker gets the next ones when it has answered the last, so a slow reward
keeps no other item waiting while a worker is free. At 700 samples per second one frame for each item would
double the cost of a reward: a worker gets as many fast rewards at a time as take `_BATCH_S`. If one of them
takes long after all, the items behind it go back to the queue.

A task with `async def reward` computes up to `rollout.reward_concurrency` rewards at a time in each worker.
If such a worker is lost, nobody knows by which of them: each is sent again, alone.

A failed reward is not retried here: `score` raises RewardError, or RewardTimeoutError after the time limit,
and `buffer.on_failure` says what becomes of the sample.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from areal_like.config import Config
from areal_like.errors import ConfigError, RewardError
from rollout_server.tasks.base import Completion, Score, Split, Task
from rollout_server.workers.reward_process import Item, RewardWorker
from rollout_server.workers.reward_worker import MAX_FRAME_BYTES, pack_item

log = logging.getLogger(__name__)

_BATCH_S = 0.02
"""Time that the items in one frame should take together."""
_MAX_BATCH = 64
_MAX_BATCH_BYTES = 1 << 20
_MAX_ITEM_BYTES = MAX_FRAME_BYTES // 2
_LATE_S = 2.0
"""A completion that waits longer is listed among the server's waits."""
_SMOOTHING = 0.1
"""Weight of the newest reward in the mean time of a reward."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The score of one completion."""

    score: Score
    """Checked: finite numbers, and `turns` and `tokens` of the completion's length or empty."""
    seconds: float
    """Time spent in the task's code."""


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
        concurrency: int = 1,
    ) -> None:
        """`task`, `seed`, `sandbox`: arguments of `make_task`; `timeout_s`: time limit of one reward;
        `concurrency`: rewards that one worker computes at the same time, if the reward is asynchronous."""
        setup = {"task": dict(task), "seed": seed, "sandbox": sandbox, "timeout_s": timeout_s}
        self._workers = [
            RewardWorker(
                setup, timeout_s=timeout_s, concurrency=concurrency, on_free=self._dispatch, queue=self._put
            )
            for _ in range(num_workers)
        ]
        self._last_number = 0
        self._queue: deque[Item] = deque()
        self._is_dispatching = False
        """True until the items submitted in this turn of the loop are sent."""
        self._mean_s = 0.0
        self._since_s: dict[int, float] = {}
        """When each completion that is not scored was submitted, the oldest first."""
        self.seconds_total = 0.0
        """Time spent in the task's code by all workers."""

    @classmethod
    def of(cls, config: Config, task: Task) -> Self:
        """With the settings of a job; without workers if its task has no reward.

        Raises ConfigError for a `rollout.reward_concurrency` that would change nothing.
        """
        rollout = config.rollout
        if rollout.reward_concurrency > 1 and task.has_reward and not task.has_async_reward:
            raise ConfigError(
                f"rollout.reward_concurrency={rollout.reward_concurrency} needs a task with `async def "
                "reward`: set it to 1, and raise rollout.reward_workers for more rewards at a time"
            )
        return cls(
            task.settings_of_workers(config.task),
            seed=config.seed,
            sandbox=config.rewards.sandbox,
            num_workers=rollout.reward_workers if task.has_reward else 0,
            timeout_s=rollout.reward_timeout_s,
            concurrency=rollout.reward_concurrency,
        )

    async def __aenter__(self) -> RewardPool:
        for worker in self._workers:
            worker.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._fail_queued(RewardError("the reward pool was closed"))

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
        return len(self._queue) + sum(len(worker.items) for worker in self._workers)

    def waits(self) -> dict[str, float]:
        """How long the oldest completion waits for its score; empty for less than `_LATE_S`."""
        oldest_s = next(iter(self._since_s.values()), None)
        if oldest_s is None:
            return {}
        seconds = asyncio.get_running_loop().time() - oldest_s
        return {f"rewards: {self.num_waiting} completions": round(seconds, 3)} if seconds > _LATE_S else {}

    async def score(self, *, split: Split, index: int, completion: Completion) -> Reward:
        """The reward of a completion.

        Raises RewardTimeoutError if the task exceeded the time limit, and RewardError if it raised, crashed,
        or returned no valid score.
        """
        loop = asyncio.get_running_loop()
        self._last_number += 1
        try:
            packed = pack_item(self._last_number, split=split, index=index, completion=completion)
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(f"the conversation cannot be sent to a reward process: {error}") from None
        if len(packed) > _MAX_ITEM_BYTES:
            raise RewardError(
                f"the conversation has {len(packed)} bytes: at most {_MAX_ITEM_BYTES} are sent to a reward"
            )
        item = Item(number=self._last_number, packed=packed, done=loop.create_future())
        self._queue.append(item)
        if not self._is_dispatching:
            self._is_dispatching = True
            loop.call_soon(self._dispatch)
        self._since_s[item.number] = loop.time()
        try:
            score, seconds = await item.done
        finally:
            del self._since_s[item.number]
        self._mean_s += _SMOOTHING * (seconds - self._mean_s) if self._mean_s else seconds
        self.seconds_total += seconds
        return Reward(score=score, seconds=seconds)

    def _put(self, items: list[Item]) -> None:
        """Queues again what a worker will not score, before all others."""
        self._queue.extendleft(reversed(items))
        self._dispatch()

    def _dispatch(self) -> None:
        """Sends queued items to the workers that are free, evenly."""
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

    def _take(self, most: int, *, is_idle: bool) -> list[Item]:
        """The next items of the queue for a worker, without those whose caller was cancelled."""
        items: list[Item] = []
        num_bytes = 0
        while self._queue and len(items) < most:
            item = self._queue[0]
            if item.done.done():
                self._queue.popleft()
                continue
            num_bytes += len(item.packed)
            if item.is_alone and (items or not is_idle):
                break
            if items and num_bytes > _MAX_BATCH_BYTES:
                break
            items.append(self._queue.popleft())
            if item.is_alone:
                break
        return items

    def _fail_queued(self, reason: RewardError) -> None:
        queued, self._queue = self._queue, deque()
        for item in queued:
            item.fail(reason)
