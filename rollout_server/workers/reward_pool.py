"""Scores the completions of one task in worker processes.

    worker:  STARTING -> SERVING -> (time limit or crash) -> STARTING ...  -> CLOSED
    item:    queued -> sent to the next free worker -> scored
                       -> worker lost while scoring this item: failed
                       -> worker lost while scoring another item: queued again
                       -> behind an item that takes long: queued again; its first score counts

All items wait in one queue, and a worker gets the next ones when it has returned the last, so a slow reward
does not delay other items while a worker is free. At 700 samples per second, sending one item at a time would
double the cost of a reward, so a worker gets several fast ones at a time. If one of them takes long after
all, the items behind it are also given to other workers.

While a reward that takes far longer than the others holds a worker, a spare worker takes its place, up to
twice `rollout.reward_workers` in all. If more of them hang, the queue keeps workers for the other tasks of a
mixture (reward_queue.py). The time limit stays the same for all, because a shorter one could change the
reward of a completion that is only slow. The load on a service is the user's decision, so asynchronous
rewards get no spare workers. So if a reward blocks the event loop of an asynchronous worker, the others in
that worker wait until the time limit; if it is the only worker, all wait. A task with one asynchronous reward
computes its synchronous ones in that loop, too. Threads would not help: a pattern that backtracks keeps the
GIL, and a library that limits itself by a signal needs the main thread.

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
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Self

from areal_like.config import Config
from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.rewards.scores import score_of, scorer_in
from rollout_server.tasks.base import Completion, Score, Split, Task
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_queue import Item, RewardQueue
from rollout_server.workers.reward_worker import pack_item
from rollout_server.workers.worker import REWARD, Worker

log = logging.getLogger(__name__)

_MAX_BATCH = 64
_MAX_ITEM_BYTES = 32 << 20
_RESTART_DELAY_S = 1.0
"""Pause after a worker could not start, or was lost without an item."""
_CHECK_S = 0.05
"""Interval at which the workers are checked."""
_SLOW_S = 0.1
"""After this time with one item, the items behind it go back to the queue."""
_SUSPENDED_S = 1.0
"""A check may be this late because the process is busy. The rest of a longer delay is not counted: the
process was suspended."""
_BLOCKED_S = 2.0
"""An asynchronous worker ends late rewards itself. If it is late by this much more, its event loop is
blocked."""
_MAX_SCORERS = 64
"""Most identities of reward models that are remembered for one reward."""
_LATE_S = 2.0
"""Completions that wait longer are listed among the server's waits."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The score of one completion."""

    score: Score
    """Checked: finite numbers, and `turns` and `tokens` of the completion's length or empty."""
    seconds: float
    """Time spent in the task's code, in seconds."""


class RewardPool:
    """Scores completions. Belongs to one event loop; runs inside `async with`. Its host must outlive it."""

    def __init__(
        self,
        host: WorkerHost,
        *,
        num_workers: int,
        timeout_s: float,
        concurrency: int = 1,
        part_of: Callable[[Split, int], str] = lambda split, index: "",
    ) -> None:
        """`timeout_s`: time limit of one reward; `concurrency`: rewards that one worker computes at the same
        time, if the reward is asynchronous; `part_of`: that of the task."""
        self.host = host
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.queue = RewardQueue(timeout_s=timeout_s)
        self._part_of = part_of
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
        self._since_s: dict[int, float] = {}
        """When each completion that is not yet scored was submitted, oldest first."""
        self.seconds_total = 0.0
        """Time spent in the task's code by all workers, in seconds."""
        self.num_scorer_changes = 0
        """Number of reward models, beyond the first of each reward, that have scored completions."""
        self._scorers: dict[str, dict[str, None]] = {}
        """Name of a reward -> identities of the reward models that have scored for it, in order."""

    @classmethod
    def of(cls, config: Config, task: Task, host: WorkerHost) -> Self:
        """Creates a pool with the settings of a job; it has no workers if the task has no reward."""
        rollout = config.rollout
        return cls(
            host,
            num_workers=rollout.reward_workers if task.has_reward else 0,
            timeout_s=rollout.reward_timeout_s,
            concurrency=rollout.reward_concurrency,
            part_of=task.part_of,
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

    async def score(self, *, split: Split, index: int, completion: Completion) -> Reward:
        """Returns the reward of a completion.

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
            part=self._part_of(split, index),
            frame=frame,
            done=self._loop.create_future(),
        )
        self.queue.add(item, now_s=self._loop.time())
        if not self._is_dispatching:
            self._is_dispatching = True
            self._loop.call_soon(self.dispatch)
        self._since_s[item.number] = self._loop.time()
        try:
            score, seconds = await item.done
        finally:
            del self._since_s[item.number]
        self.seconds_total += seconds
        for name in score.metrics:
            if (found := scorer_in(name)) is not None:
                self._note_scorer(*found)
        return Reward(score=score, seconds=seconds)

    def _note_scorer(self, reward: str, identity: str) -> None:
        """Notes which reward model has scored for a reward."""
        known = self._scorers.setdefault(reward, {})
        if identity in known or len(known) >= _MAX_SCORERS:
            return
        if known:
            self.num_scorer_changes += 1
            log.warning(
                "another reward model scores samples of this run: %s, and before %s (%s)",
                *(identity, next(reversed(known)), reward or "reward"),
            )
        known[identity] = None

    def dispatch(self) -> None:
        """Distributes queued items evenly among the free workers."""
        self._is_dispatching = False
        free = [worker for worker in self._workers if worker.room]
        num_slots = sum(worker.num_slots for worker in self._workers)
        used = Counter(part for worker in self._workers for part in worker.parts)
        for position, worker in enumerate(free):
            share = -(-len(self.queue) // (len(free) - position))
            items = self.queue.take(
                min(share, worker.room),
                is_idle=not worker.items,
                is_async=worker.is_async,
                num_slots=num_slots,
                used=used,
                now_s=self._loop.time(),
            )
            if items:
                worker.submit(items)
        if not free and self._workers and all(worker.problem for worker in self._workers):
            for item in self.queue.take_all():
                item.fail(RewardError(f"reward worker cannot start: {self._workers[0].problem}"))

    async def _keep_workers(self) -> None:
        """Keeps the workers running, ends those that hang, and starts spare ones for those that are held."""
        late_s = 0.0
        while True:
            self._check(now_s=self._loop.time(), not_counted_s=max(0.0, late_s - _SUSPENDED_S))
            due_s = self._loop.time() + _CHECK_S
            await asyncio.sleep(_CHECK_S)
            late_s = self._loop.time() - due_s

    def _check(self, *, now_s: float, not_counted_s: float) -> None:
        self._held, num_held = [], 0
        for worker in self._workers:
            worker.check(now_s=now_s, not_counted_s=not_counted_s)
            held = worker.held(now_s)
            num_held += bool(held) and not worker.is_async
            self._held += held
        self.queue.suspect(self._held, now_s=now_s)
        if (num_held := min(num_held, self._num_workers)) > self._num_spares:
            log.warning("a reward takes far longer than usual and holds its worker: %s", self._held[-1])
        if num_held >= self._num_spares or now_s >= self._keep_spares_until_s:
            self._num_spares, self._keep_spares_until_s = num_held, now_s + self.queue.remembered_s
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
        self._known: set[str] = set()
        """Parts of which the process has computed a reward. The first one may import libraries."""
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
            return _MAX_BATCH if self.is_idle else 0
        is_alone = any(item.is_alone for item in self.items.values())
        return 0 if is_alone else max(0, self.num_slots - len(self.items))

    @property
    def parts(self) -> Collection[str]:
        """The parts of its items, one for each slot in use; of a synchronous worker that has several items,
        each once."""
        parts = [item.part for item in self.items.values()]
        return parts if self.is_async else set(parts)

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

    def started(self) -> Iterator[tuple[Item, float]]:
        """Yields the items that it computes, and when each was started."""
        for item in self.items.values():
            yield item, item.sent_s if self.is_async else self._began_s
            if not self.is_async:
                return

    def held(self, now_s: float) -> list[Item]:
        """Returns the items that take far longer than the others of their part."""
        queue = self._pool.queue
        return [
            item
            for item, began_s in self.started()
            if now_s - began_s
            > (queue.held_after_s(item) if item.part in self._known else queue.latest_held_s)
        ]

    def check(self, *, now_s: float, not_counted_s: float) -> None:
        """Ends the process if it hangs, and gives away the items behind a slow reward.

        `not_counted_s`: part of the time since the last check that is not counted.
        """
        # Items may have been started after the time that is not counted.
        self._began_s = min(now_s, self._began_s + not_counted_s)
        for item in self.items.values():
            item.sent_s = min(now_s, item.sent_s + not_counted_s)
        if self._worker is None or not self.items:
            return
        seconds = now_s - min(began_s for _, began_s in self.started())
        if seconds > self._pool.timeout_s + (_BLOCKED_S if self.is_async else 0.0):
            self._worker.lose(self._too_long())
        elif seconds > _SLOW_S and not (self.is_async or self._is_slow):
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
            self._known.clear()
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
        seconds = max(0.0, float(seconds))
        score = None if error else score_of(fields)
        item = self.items.pop(number, None)
        if item is None:
            raise ValueError("a score that was not requested")
        self._began_s = self._loop.time()
        self._known.add(item.part)
        if is_timeout:
            item.fail(self._too_long())
        else:
            self._pool.queue.ended(item, seconds)
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
            items[0].fail(reason)
            self._put_back([] if self._is_slow else items[1:])
        elif not self.is_retired:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _put_back(self, items: list[Item]) -> None:
        for item in items:
            self._pool.queue.add(item, now_s=self._loop.time())
        self._pool.dispatch()

    def _too_long(self) -> RewardTimeoutError:
        return RewardTimeoutError(
            f"reward took longer than rollout.reward_timeout_s={self._pool.timeout_s:g}"
        )

    def taken(self) -> list[Item]:
        """Removes and returns its items."""
        items, self.items = [*self.items.values()], {}
        return items
