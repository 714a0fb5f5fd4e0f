"""Scores the completions of one task in worker processes.

    worker:  STARTING -> SERVING -> (time limit or crash) -> STARTING ...  -> CLOSED
    item:    queued -> sent to the next free worker -> scored
                       -> worker lost while scoring this item: failed
                       -> worker lost while scoring another item: queued again
                       -> behind an item that takes long: queued again; its first score counts

All items wait in one queue, and a worker gets the next ones when it has returned the last, so a slow reward
does not delay other items while a worker is free. At 700 samples per second, sending one item at a time would
double the cost of a reward, so a worker gets as many fast rewards at a time as take `_BATCH_S`. If one of
them takes long after all, the items behind it are also given to other workers.

While a reward that takes far longer than the others holds a worker, a spare worker takes its place, up to
twice `rollout.reward_workers` in all. If more of them hang, the order of the queue keeps a worker for the
other tasks of a mixture (reward_queue.py). The time limit stays the same for all, because a shorter one could
change the reward of a completion that is only slow. The load on a service is the user's decision, so
asynchronous rewards get no spare workers.

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
from dataclasses import dataclass
from typing import Any, Self

from areal_like.config import Config
from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.rewards.scores import score_of
from rollout_server.tasks.base import Completion, Score, Split, Task
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_queue import Item, RewardQueue
from rollout_server.workers.reward_worker import pack_item
from rollout_server.workers.worker import REWARD, Worker

log = logging.getLogger(__name__)

_BATCH_S = 0.02
"""Target time for all items that are sent together."""
_MAX_BATCH = 64
_MAX_ITEM_BYTES = 32 << 20
_RESTART_DELAY_S = 1.0
"""Pause after a worker could not start, or was lost without an item."""
_CHECK_S = 0.05
"""Interval at which the workers are checked."""
_SLOW_S = 0.1
"""After this time with one item, the items behind it go back to the queue."""
_HELD_S = 0.25
_HELD_MEANS = 10.0
"""A reward holds its worker after `_HELD_S` and this many times the mean duration of a reward, or, before the
first score, after half of the time limit: first calls may import libraries."""
_SPARE_S = 10.0
"""A spare worker is kept for this time, because rewards that hang come again."""
_RESERVED = 0.25
"""Share of the workers, at least one, that is kept for the rewards of labels that do not hang."""
_SUSPENDED_S = 0.25
"""If a check is later than this, the process was suspended."""
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


class RewardPool:
    """Scores completions. Belongs to one event loop; runs inside `async with`. Its host must outlive it."""

    def __init__(self, host: WorkerHost, *, num_workers: int, timeout_s: float, concurrency: int = 1) -> None:
        """`timeout_s`: time limit of one reward; `concurrency`: rewards that one worker computes at the same
        time, if the reward is asynchronous."""
        self.host = host
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.queue = RewardQueue()
        self._loop = asyncio.get_running_loop()
        self._num_workers = num_workers
        self._num_spares = 0
        self._keep_spares_until_s = -math.inf
        self._workers: list[_RewardWorker] = []
        self._keeping: asyncio.Task[None] | None = None
        self._held: list[Item] = []
        """Items that hold a worker, as of the last check."""
        self._last_number = 0
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

    async def __aenter__(self) -> Self:
        if self._num_workers:
            self._keeping = asyncio.create_task(self._keep_workers(), name="rewards")
        return self

    async def __aexit__(self, *exc: object) -> None:
        tasks = [worker.running for worker in self._workers]
        tasks += [self._keeping] if self._keeping is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closed = RewardError("the reward pool was closed")
        for item in [*self.queue.take_all(), *(item for worker in self._workers for item in worker.taken())]:
            item.fail(closed)

    @property
    def serving(self) -> list[asyncio.Task[None]]:
        """Tasks that end only when the pool or its host is closed, or if no process can be started."""
        return [*([] if self._keeping is None else [self._keeping]), *self.host.serving]

    @property
    def num_restarts(self) -> int:
        """Number of workers lost to a timeout or a crash, and of losses of the process that starts them."""
        return self.host.num_restarts(REWARD)

    @property
    def num_waiting(self) -> int:
        """Number of completions that are not scored yet."""
        return len(self._since_s)

    @property
    def num_held(self) -> int:
        """Number of completions whose rewards take far longer than the others and hold a worker."""
        return len(self._held)

    def waits(self) -> dict[str, float]:
        """Returns how long the oldest completion has waited for its score, and what holds the workers; empty
        for less than `_LATE_S`."""
        oldest_s = next(iter(self._since_s.values()), math.inf)
        if (seconds := self._loop.time() - oldest_s) <= _LATE_S:
            return {}
        held = f", {len(self._held)} hold a worker ({self._held[0]})" if self._held else ""
        return {f"rewards: {self.num_waiting} completions{held}": round(seconds, 3)}

    async def score(self, *, split: Split, index: int, completion: Completion, label: str = "") -> Reward:
        """Returns the reward of a completion. `label`: that of the example.

        Raises RewardTimeoutError if the task exceeded the time limit, and RewardError if it raised, crashed,
        or returned no valid score.
        """
        self._last_number += 1
        try:
            frame = pack_item(self._last_number, split=split, index=index, completion=completion)
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(f"the conversation cannot be sent to a reward process: {error}") from None
        if len(frame) > _MAX_ITEM_BYTES:
            raise RewardError(
                f"the conversation has {len(frame)} bytes: at most {_MAX_ITEM_BYTES} are sent to a reward"
            )
        item = Item(
            number=self._last_number,
            place=f"{split} {index}",
            label=label,
            frame=frame,
            done=self._loop.create_future(),
        )
        self.queue.add(item)
        if not self._is_dispatching:
            self._is_dispatching = True
            self._loop.call_soon(self.dispatch)
        self._since_s[item.number] = self._loop.time()
        try:
            score, seconds = await item.done
        finally:
            del self._since_s[item.number]
        self._mean_s += _SMOOTHING * (seconds - self._mean_s) if self._mean_s else seconds
        self.seconds_total += seconds
        return Reward(score=score, seconds=seconds)

    def ended_in_time(self, item: Item) -> None:
        """Notes that a reward was computed, or raised."""
        if all(item.label != held.label for held in self._held):
            self.queue.trust(item.label)

    def dispatch(self) -> None:
        """Distributes queued items evenly among the free workers."""
        self._is_dispatching = False
        free = [worker for worker in self._workers if worker.room]
        for position, worker in enumerate(free):
            share = -(-len(self.queue) // (len(free) - position))
            if not worker.is_async:
                share = min(share, self._batch_size)
            items = self.queue.take(
                min(share, worker.room),
                is_idle=not worker.items,
                is_async=worker.is_async,
                room_for_suspects=self._room_for_suspects(),
            )
            if items:
                worker.submit(items)
        if not free and self._workers and all(worker.problem for worker in self._workers):
            for item in self.queue.take_all():
                item.fail(RewardError(f"reward worker cannot start: {self._workers[0].problem}"))

    @property
    def _batch_size(self) -> int:
        return max(1, min(_MAX_BATCH, int(_BATCH_S / self._mean_s))) if self._mean_s else 1

    def _room_for_suspects(self) -> int:
        """Returns how many more items with suspect labels the workers may take."""
        num_slots = sum(worker.num_slots for worker in self._workers)
        num_reserved = max(1, int(_RESERVED * num_slots))
        return max(1, num_slots - num_reserved) - sum(worker.num_suspects for worker in self._workers)

    async def _keep_workers(self) -> None:
        """Keeps the workers running, ends those that hang, and starts spare ones for those that are held."""
        late_s = 0.0
        while True:
            # This process was suspended, and perhaps its workers, too, so the time does not count.
            self._check(now_s=self._loop.time(), not_counted_s=late_s if late_s > _SUSPENDED_S else 0.0)
            due_s = self._loop.time() + _CHECK_S
            await asyncio.sleep(_CHECK_S)
            late_s = self._loop.time() - due_s

    def _check(self, *, now_s: float, not_counted_s: float) -> None:
        usual_s = max(_HELD_S, _HELD_MEANS * self._mean_s if self._mean_s else self.timeout_s / 2)
        self._held, num_held = [], 0
        for worker in self._workers:
            worker.check(now_s=now_s, not_counted_s=not_counted_s)
            late = worker.late(now_s - usual_s)
            num_held += bool(late) and not worker.is_async
            self._held += late
        for item in self._held:
            self.queue.suspect(item.label)
        if (num_held := min(num_held, self._num_workers)) > self._num_spares:
            log.warning("a reward has run for %.2g s and holds its worker: %s", usual_s, self._held[-1])
        if num_held >= self._num_spares or now_s >= self._keep_spares_until_s:
            self._num_spares, self._keep_spares_until_s = num_held, now_s + _SPARE_S
        for ended in [worker for worker in self._workers if worker.running.done()]:
            ended.running.result()  # raises what is not a failure of a reward
            self._workers.remove(ended)
        used = [worker for worker in self._workers if not worker.is_retired]
        num_wanted = self._num_workers + self._num_spares
        self._workers += [_RewardWorker(self) for _ in range(num_wanted - len(used))]
        for surplus in [worker for worker in used if worker.is_idle][: max(0, len(used) - num_wanted)]:
            surplus.retire()


class _RewardWorker:
    """A worker process, restarted when it is lost, and the items sent to it, oldest first."""

    def __init__(self, pool: RewardPool) -> None:
        """Starts it in the running loop."""
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._worker: Worker | None = None
        """The worker; None while no process is ready."""
        self.is_async = False
        """True if the process computes several rewards at the same time."""
        self._began_s = 0.0
        """When a synchronous worker started its first item."""
        self._is_slow = False
        """True if the items behind the first one were also given to other workers."""
        self.items: dict[int, Item] = {}
        self.problem = ""
        """Why the last process could not start; empty if it could."""
        self.is_retired = False
        """True for a spare worker that is no longer needed."""
        self.running = asyncio.create_task(self._run(), name="reward worker")

    @property
    def num_slots(self) -> int:
        """Number of rewards that it computes at the same time."""
        if self._worker is None or not self._worker.is_connected:
            return 0
        return self._pool.concurrency if self.is_async else 1

    @property
    def is_idle(self) -> bool:
        """True if it waits for items."""
        return self.num_slots > 0 and not self.items

    @property
    def room(self) -> int:
        """Number of items that can be sent to it now."""
        if not self.is_async:
            return sys.maxsize if self.is_idle else 0
        is_alone = any(item.is_alone for item in self.items.values())
        return 0 if is_alone else max(0, self.num_slots - len(self.items))

    @property
    def num_suspects(self) -> int:
        """Number of its slots that are used by items with suspect labels."""
        num_suspects = sum(map(self._pool.queue.is_suspect, self.items.values()))
        return num_suspects if self.is_async else min(1, num_suspects)

    def submit(self, items: list[Item]) -> None:
        """Sends items; at most `room`."""
        assert self._worker is not None
        now_s = self._loop.time()
        if not self.items:
            self._began_s, self._is_slow = now_s, False
        for item in items:
            item.sent_s = now_s
            self.items[item.number] = item
        self._worker.send(b"".join([item.frame for item in items]))

    def late(self, before_s: float) -> list[Item]:
        """Returns the items whose rewards were started before a time and have not ended."""
        if self.is_async:
            return [item for item in self.items.values() if item.sent_s < before_s]
        return [*self.items.values()][:1] if self._began_s < before_s else []

    def check(self, *, now_s: float, not_counted_s: float) -> None:
        """Ends the process if it hangs, and gives away the items behind a slow reward.

        `not_counted_s`: part of the time since the last check that is not counted.
        """
        self._began_s += not_counted_s
        for item in self.items.values():
            item.sent_s += not_counted_s
        if self._worker is None or not self.items:
            return
        limit_s = self._pool.timeout_s + (_BLOCKED_S if self.is_async else 0.0)
        if self.late(now_s - limit_s):
            self._worker.lose(self._too_long())
        elif not (self.is_async or self._is_slow) and self.late(now_s - _SLOW_S):
            self._is_slow = True
            self._put_back([*self.items.values()][1:])

    def retire(self) -> None:
        """Ends an idle worker."""
        assert self._worker is not None
        self.is_retired = True
        self._pool.host.end(self._worker)

    async def _run(self) -> None:
        """Keeps a process running until it is retired."""
        while not self.is_retired:
            ended: asyncio.Future[Worker] = self._loop.create_future()
            try:
                worker, self.is_async = await self._pool.host.start(
                    REWARD, on_message=self._take, on_lost=ended.set_result, timeout_s=self._pool.timeout_s
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
                self._pool.host.end(worker)
            await self._give_back(worker.lost)

    def _take(self, message: Any) -> None:
        """Handles the result of one item. Raises ValueError or TypeError if it is invalid."""
        number, seconds, fields, error, is_timeout = message
        score = None if error else score_of(fields)
        item = self.items.pop(number, None)
        if item is None:
            raise ValueError("a score that was not requested")
        self._began_s = self._loop.time()
        if is_timeout:
            self._fail(item, self._too_long())
        else:
            self._pool.ended_in_time(item)
            if score is None:
                item.fail(RewardError(error))
            elif not item.done.done():
                item.done.set_result((score, seconds))
        if self.room:
            self._pool.dispatch()

    async def _give_back(self, reason: Exception | None) -> None:
        """Fails the item that caused the loss of the process, and requeues the others."""
        assert isinstance(reason, RewardError)
        items = self.taken()
        if self.is_async and len(items) > 1:
            for item in items:
                item.is_alone = True
            self._put_back(items)
        elif items:
            self._fail(items[0], reason)
            self._put_back([] if self._is_slow else items[1:])
        elif not self.is_retired:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _fail(self, item: Item, reason: RewardError) -> None:
        if isinstance(reason, RewardTimeoutError):
            self._pool.queue.suspect(item.label)
        item.fail(reason)

    def _put_back(self, items: list[Item]) -> None:
        self._pool.queue.put_back(items)
        self._pool.dispatch()

    def _too_long(self) -> RewardTimeoutError:
        return RewardTimeoutError(
            f"reward took longer than rollout.reward_timeout_s={self._pool.timeout_s:g}"
        )

    def taken(self) -> list[Item]:
        """Removes and returns its items."""
        items, self.items = [*self.items.values()], {}
        return items
