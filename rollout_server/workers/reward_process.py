"""One reward worker, seen from the server: its process, which is restarted when it is lost, and its items.

    STARTING -> SERVING -> (time limit or crash) -> lost: killed -> STARTING ...  -> CLOSED

Which item was it lost with? A synchronous worker answers in order: the first one. Of an asynchronous worker's
items any can be to blame, so none is, unless it was alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.frames import HEADER, pack
from rollout_server.tasks.base import Score
from rollout_server.workers.reward_worker import MAX_FRAME_BYTES, pack_items, score_of

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
"""Long, because importing a task may import a large library."""
_RESTART_DELAY_S = 1.0
"""Pause before a worker that could not start is restarted: a broken import must not cause a busy loop."""
_REAP_DELAY_S = 0.05
"""Wait between the end of a worker's stream and reading its exit code."""
_SLOW_S = 0.25
"""After this time with one item, the items behind it go back to the queue."""
_BLOCKED_S = 2.0
"""An asynchronous worker ends its late rewards itself. This much later its event loop is blocked."""
_STREAM_LOST = (ConnectionError, asyncio.IncompleteReadError)


@dataclass(eq=False, kw_only=True)
class Item:
    """One completion to score."""

    number: int
    packed: bytes
    """As the worker gets it."""
    done: asyncio.Future[tuple[Score, float]]
    """The score, and the seconds in the task's code; or a RewardError."""
    is_alone: bool = False
    """True after a worker was lost while it scored this item and others at the same time."""
    sent_s: float = 0.0
    """When it was sent to a worker."""

    def fail(self, reason: RewardError) -> None:
        """Ends the item, unless its caller was cancelled."""
        if not self.done.done():
            self.done.set_exception(type(reason)(str(reason)))


class RewardWorker:
    """A process, restarted when it is lost, and the items it has been sent, oldest first."""

    def __init__(
        self,
        setup: Mapping[str, Any],
        *,
        timeout_s: float,
        concurrency: int,
        on_free: Callable[[], None],
        queue: Callable[[list[Item]], None],
    ) -> None:
        """`setup`: the first frame. `on_free` is called when there may be more room than before; `queue`
        takes back items that this worker will not score."""
        self._setup = dict(setup)
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._on_free = on_free
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._pipe: asyncio.StreamWriter | None = None
        """None while no process is ready."""
        self.is_async = False
        """True if the process computes several rewards at the same time."""
        self._timer: asyncio.TimerHandle | None = None
        """The next call of `_watch`."""
        self._is_late = False
        """True if the process was given up because it hangs."""
        self._began_s = 0.0
        """When a synchronous worker began its first item."""
        self._is_recalling = False
        """True until the process confirms that it has dropped the items that it had not begun."""
        self.running: asyncio.Task[None] | None = None
        self.items: OrderedDict[int, Item] = OrderedDict()
        self.num_lost = 0
        self.problem = ""
        """Why the last process could not start; empty if it could."""

    @property
    def room(self) -> int:
        """Items that it can be sent now."""
        if self._pipe is None or self._is_recalling:
            return 0
        if self.is_async:
            is_alone = any(item.is_alone for item in self.items.values())
            return 0 if is_alone else self._concurrency - len(self.items)
        return 0 if self.items else sys.maxsize

    def start(self) -> None:
        """Starts the first process."""
        self.running = asyncio.create_task(self._run(), name="reward-worker")

    async def close(self) -> None:
        """Kills the process; its items fail."""
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        for item in self._taken():
            item.fail(RewardError("the reward pool was closed"))

    def submit(self, items: list[Item]) -> None:
        """Sends items; at most `room`."""
        assert self._pipe is not None
        now_s = self._loop.time()
        if not self.items:
            self._began_s = now_s
        for item in items:
            item.sent_s = now_s
            self.items[item.number] = item
        self._pipe.write(pack_items([item.packed for item in items]))
        if self._timer is None:
            self._watch()

    def _deadline_s(self) -> float:
        """When the process counts as hanging; infinite while it has nothing to do."""
        if not (self.items or self._is_recalling):
            return math.inf
        if self.is_async:
            return next(iter(self.items.values())).sent_s + self._timeout_s + _BLOCKED_S
        return self._began_s + self._timeout_s

    def _watch(self) -> None:
        """Called every `_SLOW_S` while the process has work, and at its deadline."""
        now_s = self._loop.time()
        if self._timer is not None and (late_s := now_s - self._timer.when()) > _SLOW_S:
            # This process was stopped, and perhaps the worker, too: the time does not count.
            self._began_s += late_s
            for item in self.items.values():
                item.sent_s += late_s
        self._timer = None
        deadline_s = self._deadline_s()
        if self._pipe is None or deadline_s == math.inf:
            return
        if now_s >= deadline_s:
            self._is_late = True
            self._pipe.transport.abort()  # ends the wait for an answer
            return
        if not self.is_async and len(self.items) > 1 and now_s >= self._began_s + _SLOW_S:
            self._recall()
        self._timer = self._loop.call_at(min(now_s + _SLOW_S, deadline_s), self._watch)

    def _recall(self) -> None:
        """Takes back the items behind the first one."""
        assert self._pipe is not None
        first, *behind = self._taken()
        self.items[first.number] = first
        # The process may have begun the next one just now: then it is scored twice. The confirmation says
        # when it is free for other items.
        self._is_recalling = True
        self._pipe.write(pack([]))
        self._queue(behind)

    async def _run(self) -> None:
        while True:
            own_end, worker_end = socket.socketpair()
            with worker_end:
                process = subprocess.Popen(
                    [sys.executable, "-m", "rollout_server.workers.reward_worker"],
                    stdin=worker_end.fileno(),
                    stdout=worker_end.fileno(),
                )
            reader, writer = await asyncio.open_connection(sock=own_end)
            try:
                await self._serve(process, reader, writer)
            finally:
                self._stop_sending()
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
                self.problem, self.is_async = await _read(reader)
        except (TimeoutError, TypeError, ValueError, *_STREAM_LOST) as lost:
            self.problem = (
                f"the process ended or did not answer for {_START_TIMEOUT_S:g} s ({type(lost).__name__}); "
                "see the log"
            )
        if self.problem:
            log.error("reward worker cannot start: %s", self.problem)
            self._on_free()  # if no other worker can start either, the waiting items fail
            await asyncio.sleep(_RESTART_DELAY_S)
            return
        self._pipe, self._is_late = writer, False
        self._on_free()
        try:
            while True:
                # Reads also while idle, so that a worker that dies while idle is noticed before an item is
                # sent to it.
                self._answer(await _read(reader))
        except _STREAM_LOST:
            self._stop_sending()
            reason = (
                self._too_long()
                if self._is_late
                else RewardError(f"the reward process died ({await _exit_reason(process)})")
            )
        except (ValueError, TypeError) as error:
            reason = RewardError(f"the reward process wrote an invalid answer ({_text(error)})")
        await self._on_lost(reason)

    def _answer(self, answer: Any) -> None:
        if answer is None:
            self._is_recalling = False
        else:
            number, seconds, fields, error, is_timeout = answer
            score = None if error else score_of(fields)
            self._began_s = self._loop.time()
            item = self.items.pop(number, None)  # None if it was recalled a moment too late
            if item is None:
                pass
            elif is_timeout:
                item.fail(self._too_long())
            elif score is None:
                item.fail(RewardError(error))
            elif not item.done.done():
                item.done.set_result((score, seconds))
        if self.room:
            self._on_free()

    async def _on_lost(self, reason: RewardError) -> None:
        self._stop_sending()
        self.num_lost += 1
        log.warning("reward worker restarts: %s", reason)
        items = self._taken()
        if self.is_async and len(items) > 1:
            for item in items:
                item.is_alone = True
            self._queue(items)
        elif items:
            items[0].fail(reason)
            self._queue(items[1:])
        else:
            await asyncio.sleep(_RESTART_DELAY_S)

    def _too_long(self) -> RewardTimeoutError:
        return RewardTimeoutError(f"reward took longer than rollout.reward_timeout_s={self._timeout_s:g}")

    def _stop_sending(self) -> None:
        self._pipe = None
        self._is_recalling = False

    def _taken(self) -> list[Item]:
        items, self.items = list(self.items.values()), OrderedDict()
        return items


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
