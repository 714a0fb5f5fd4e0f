"""One rank's client of the buffer (all its shards), for the training thread.

The training thread is inside torch most of the time, so an event loop in another thread has the heartbeats,
HTTP server, prefetch and (on rank 0) publisher. It is used only through `call`, `groups` and the flags here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Self

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config
from areal_like.errors import ArealError, DeadlineError, PeerLostError
from areal_like.paths import model_path
from areal_like.runtime.daemon import Runtime
from areal_like.runtime.logs import follow_level
from areal_like.runtime.progress import ProgressClock
from areal_like.runtime.threads import NamedThread
from areal_like.runtime.waits import PendingWaits
from areal_like.wire.addresses import buffer_addresses, buffer_lookup, wait_for_addresses
from areal_like.wire.fingerprint import (
    dataset_fingerprint,
    model_fingerprint,
    shared_settings,
    tokenizer_fingerprint,
)
from areal_like.wire.limits import bounded_stats
from areal_like.wire.messages.consumer import Directory, Fetch, Group, TrainerHeartbeat
from areal_like.wire.messages.hello import Goodbye, Hello, Role
from areal_like.wire.messages.producer import HeartbeatAck, ServerState
from trainer.buffer_client.connection import RankConnection
from trainer.buffer_client.shards import call_shards
from trainer.distributed.ranks import share_of

log = logging.getLogger(__name__)

_RESEND_AFTER_S = 20.0
_LEAVE_S = 2.0
"""Time for tasks to end after they were cancelled."""
_CLOSE_S = 60.0
"""Longest wait for the loop's thread to close the connections: on a busy machine that may take long."""
_POLL_S = 0.25
"""Interval at which a blocked training thread checks for a lost buffer or a requested stop."""
_OUTSIDE = (
    "; external agents make the samples: `areal-like why` counts the sessions that wait for one, and "
    "names the agents that fail"
)


class StopRequestedError(ArealError):
    """A drain began while the training thread waited for something that a drain does not need."""


@dataclass(kw_only=True)
class Patience:
    """The limits of one wait, by default none; the wait ends at the first that is reached."""

    name: str
    """The object of the wait, for error messages."""
    started_s: float
    timeout_s: float = math.inf
    """Longest time of the wait."""
    stall_s: float = math.inf
    """Longest time without progress of any rollout server."""
    setting: str = ""
    """The setting behind `stall_s`."""
    _num_warnings: int = 0

    def check(self, *, now_s: float, progressed_s: float, servers: Callable[[], str]) -> None:
        """Raises DeadlineError at a limit. Warns periodically about a long wait during which there is
        progress.

        `progressed_s`: time of the last progress of any rollout server; `servers`: describes them.
        """
        waited_s = now_s - self.started_s
        if waited_s > self.timeout_s:
            raise DeadlineError(f"waited {self.timeout_s:g} s for {self.name}")
        if now_s - max(self.started_s, progressed_s) > self.stall_s:
            raise DeadlineError(
                f"waited {waited_s:.0f} s for {self.name}, and no rollout server has made progress for "
                f"{self.stall_s:g} s ({self.setting} after rollout.generate_timeout_s): {servers()}"
            )
        if waited_s > (self._num_warnings + 1) * self.stall_s:
            self._num_warnings += 1
            log.warning(
                "waiting for %s since %.0f s while the rollout servers make progress: %s",
                self.name,
                waited_s,
                servers(),
            )


class TrainerBufferClient:
    """A context manager; all methods are for the training thread unless they say otherwise.

        CONNECTED -> IN TROUBLE (the buffer does not respond, or its disk is full) -> CONNECTED
            |          | (the buffer was restarted: register again, then resend every pending request)
            +----------+-> LOST (no message for `trainer.buffer_timeout_s`, or this trainer was replaced) ->
                           every wait raises

    Time in trouble does not count towards the timeouts of requests: they wait for the buffer to come back.
    """

    def __init__(self, config: Config, *, rank: int, world_size: int, device: str, process: str) -> None:
        """`process`: identity of the trainer, 32 hexadecimal digits, the same on all ranks."""
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.state = "starting"
        self.step = 0
        self.stats: dict[str, float] = {}
        self.waits = PendingWaits()
        self.directory = Directory(servers=[])
        self.stop_requested = threading.Event()
        """Set by a signal, never cleared."""
        self.abandon_step = threading.Event()
        """Set when a draining trainer must no longer wait for the groups of its step, nor finish it: after a
        third of `daemon.drain_timeout_s`, or when no server is left. `groups` ends early."""
        self.on_directory: Callable[[], None] = lambda: None
        """Called in the client's loop when the directory of rollout servers changed."""
        self.device = device
        self.process = process
        self._loop = asyncio.new_event_loop()
        self._thread = NamedThread(self._loop.run_forever, name="buffer-client")
        self._lost: ArealError | None = None
        self._fetches: dict[tuple[int, int], concurrent.futures.Future[Group]] = {}
        """(step, position) -> group that was requested and not used yet."""
        self._troubled_s = 0.0
        """Total time in trouble so far."""
        self._progress = ProgressClock(now_s=self._untroubled_time_s())
        """Progress of the rollout servers, as the buffers report it."""
        self.runtime: Runtime
        self._buffers: list[RankConnection] = []
        """Connections to the buffers, in the order of shards."""
        self._heartbeat: asyncio.Task[None] | None = None
        self._exit_stack = contextlib.AsyncExitStack()

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.run(wait_for_addresses(self.config), name="buffer: address", may_stop=True)
            self.run(self._open(), name="buffer (hello)", timeout_s=60.0, may_stop=True)
        except BaseException:  # including a signal: the loop's thread must not outlive a failed start
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        # Not through run(), which raises if the buffer is lost.
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    @property
    def positions(self) -> range:
        """This rank's positions of every step."""
        trainer = self.config.trainer
        return share_of(
            trainer.groups_per_step,
            rank=self.rank,
            world_size=self.world_size,
            context_parallel=trainer.context_parallel,
        )

    def call(self, message: Any, *, timeout_s: float) -> Any:
        """Sends a request and returns the reply. Raises like `Link.call`, and when the buffer is lost."""
        name = type(message).__name__
        return self.run(self.call_async(message, timeout_s=timeout_s), name=name, timeout_s=timeout_s + 5)

    async def call_async(self, message: Any, *, timeout_s: float) -> Any:
        call = self._call_shard
        return await call_shards(
            message, [functools.partial(call, each, timeout_s) for each in self._buffers]
        )

    async def _call_shard(self, buffer: RankConnection, timeout_s: float, message: Any) -> Any:
        """Sends a request to one shard, and repeats it more and more rarely: its reply may be lost with a
        connection, or be a large one that is on its way."""
        deadline_s = self._untroubled_time_s() + timeout_s
        rid, resend_s = buffer.new_rid(), _RESEND_AFTER_S
        while True:
            try:
                left_s = max(0.0, deadline_s - self._untroubled_time_s())
                return await buffer.call(message, timeout_s=min(resend_s, left_s), rid=rid)
            except DeadlineError:
                if self._untroubled_time_s() >= deadline_s:
                    raise
                resend_s = min(2 * resend_s, 4 * _RESEND_AFTER_S)
            # A buffer that is out of disk queues one reply per resend, so do not resend.
            while buffer.is_stuck:
                await asyncio.sleep(_POLL_S)

    def _untroubled_time_s(self) -> float:
        """A clock that stops while a buffer is in trouble. From any thread."""
        return time.monotonic() - self._troubled_s

    def submit_call(self, message: Any, *, timeout_s: float) -> concurrent.futures.Future[Any]:
        """Sends a request to the job's buffers; the reply is the future's result."""
        return self.submit(self.call_async(message, timeout_s=timeout_s))

    def fail(self, error: ArealError) -> None:
        """Makes every wait of the training thread raise `error`.

        For tasks in the client's loop that fail for good.
        """
        self._lost = self._lost or error

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(
        self, coroutine: Coroutine[Any, Any, Any], *, name: str, may_stop: bool = False, **limits: Any
    ) -> Any:
        """Runs a coroutine in the client's loop and waits for it as `wait` does."""
        return self.wait(self.submit(coroutine), name=name, may_stop=may_stop, **limits)

    def wait(
        self, future: concurrent.futures.Future[Any], *, name: str, may_stop: bool = False, **limits: Any
    ) -> Any:
        """Waits for a future of `submit`. Raises DeadlineError, or the error of a lost buffer.

        `name` of the wait and `limits`: see `Patience`. `may_stop`: raises StopRequestedError when a drain
        begins.
        """
        patience = Patience(name=name, started_s=self._untroubled_time_s(), **limits)
        with self.waits(name):
            if not self._is_done(
                future, patience, gives_up=lambda: may_stop and self.stop_requested.is_set()
            ):
                future.cancel()
                raise StopRequestedError(f"draining while waiting for {name}")
        return future.result()

    def _is_done(
        self, future: concurrent.futures.Future[Any], patience: Patience, *, gives_up: Callable[[], bool]
    ) -> bool:
        """Waits for a future; False if `gives_up` was true before. Raises like `wait`."""

        def servers() -> str:
            shown = f"servers {[(s.name, s.state, s.weights_version) for s in self.directory.servers]}"
            return shown + (_OUTSIDE if self.config.has_outside_agents else "")

        while True:
            concurrent.futures.wait([future], timeout=_POLL_S)
            if future.done():
                return True
            if self._lost is not None:
                raise self._lost
            if gives_up():
                return False
            try:
                patience.check(
                    now_s=self._untroubled_time_s(), progressed_s=self._progress.last_s, servers=servers
                )
            except DeadlineError:
                future.cancel()
                raise

    def groups(self, step: int) -> Iterator[Group]:
        """This rank's groups of a step in recorded order, each as soon as the buffer has recorded it.

        The next step's groups are requested too, so that they arrive while this step trains. Ends early only
        after `abandon_step`, which a drain sets when a group is missing and no server is left to make it.
        """
        self.step = step
        for ahead in (step, step + 1):
            if ahead < self.config.trainer.num_steps:
                for position in self.positions:
                    self._request_group(ahead, position)
        for position in self.positions:
            future = self._fetches[step, position]
            patience = Patience(
                name=f"group {position} of step {step}",
                started_s=self._untroubled_time_s(),
                stall_s=self.config.stall_s(self.config.trainer.fetch_timeout_s),
                setting="trainer.fetch_timeout_s",
            )
            with self.waits(f"buffer: {patience.name}"):
                if not self._is_done(future, patience, gives_up=self._gives_up_step):
                    return
            del self._fetches[step, position]
            yield future.result()

    def _request_group(self, step: int, position: int) -> None:
        if (step, position) not in self._fetches:
            self._fetches[step, position] = self.submit(self._fetch(Fetch(step=step, position=position)))

    async def _fetch(self, request: Fetch) -> Group:
        group = await self.call_async(request, timeout_s=math.inf)  # `groups` bounds the wait
        assert isinstance(group, Group)
        return group

    def _gives_up_step(self) -> bool:
        """True once a drain no longer waits for the groups of its step."""
        if not self.abandon_step.is_set() and self.stop_requested.is_set() and not self._has_working_servers:
            log.warning("draining: no rollout server is left that could make a group of step %d", self.step)
            self.abandon_step.set()
        return self.abandon_step.is_set()

    @property
    def _has_working_servers(self) -> bool:
        """True while a rollout server is registered that does not drain, as the buffer says."""
        return any(server.state != ServerState.DRAINING for server in self.directory.servers)

    async def _open(self) -> None:
        self.runtime = Runtime(self.config, role="trainer", name=f"trainer-{self.rank}", waits=self.waits)
        self.runtime.failed.add_done_callback(self._on_runtime_failed)
        self._exit_stack.push_async_exit(self.runtime)
        await self.runtime.__aenter__()
        hello = self._hello()
        for index, address in enumerate(buffer_addresses(self.config)):
            connection = RankConnection(
                address,
                hello=dataclasses.replace(hello, shard=index, num_shards=self.config.buffer.num_shards),
                survives=self.config.buffer.durability != "none",
                max_message_bytes=self.config.buffer.max_message_bytes,
                on_other=functools.partial(self._on_message, index),
                on_ack=functools.partial(self._on_ack, f"buffer {index}"),
                fail=self.fail,
                keyring=self.runtime.keyring,
                look_up=buffer_lookup(self.config, index),
            )
            self._buffers.append(connection)
        with self.waits("buffer: welcome"):
            await asyncio.gather(*(buffer.say_hello(timeout_s=55.0) for buffer in self._buffers))
        self._heartbeat = asyncio.create_task(self._send_heartbeats(), name="heartbeat")
        self._heartbeat.add_done_callback(self._on_heartbeat_end)

    async def _close(self) -> None:
        for future in self._fetches.values():
            future.cancel()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            if self._lost is None:
                goodbye = Goodbye(stats=bounded_stats(self.stats))
                goodbyes = (buffer.call(goodbye, timeout_s=2.0) for buffer in self._buffers)
                with contextlib.suppress(ArealError):  # optional: the trainer ends in any case
                    await asyncio.gather(*goodbyes)
        for buffer in self._buffers:
            buffer.close()
        await self._exit_stack.aclose()
        # After an error, other tasks such as the publisher may still run. Python logs an error for a task
        # that is destroyed with its loop, which would follow the real error in the log.
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=_LEAVE_S)

    def _hello(self) -> Hello:
        path = model_path(self.config)
        return Hello(
            role=Role.TRAINER,
            name=self.runtime.name,
            process=self.process,
            job=self.config.name,
            model=model_fingerprint(path),
            tokenizer=tokenizer_fingerprint(path),
            dataset=dataset_fingerprint(self.config),
            settings=shared_settings(self.config, Role.TRAINER),
            http_address=self.runtime.http_address,
            dtype=compute_dtype(self.config),
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
        )

    async def _send_heartbeats(self) -> None:
        while True:
            waits = self.waits.longest()
            stats = bounded_stats(self.stats)
            beat = TrainerHeartbeat(state=self.state, step=self.step, stats=stats, waits=waits)
            for buffer in self._buffers:
                buffer.send(beat)
            sent_s = self._loop.time()
            await asyncio.sleep(self.config.daemon.heartbeat_s)
            if any(buffer.is_troubled for buffer in self._buffers):
                self._troubled_s += self._loop.time() - sent_s
            for buffer in self._buffers:
                if buffer.silent_s > self.config.trainer.buffer_timeout_s:
                    silent = f"has not responded for {buffer.silent_s:.0f} s"
                    self.fail(PeerLostError(f"the buffer at {buffer.address} {silent}"))

    def _on_heartbeat_end(self, task: asyncio.Task[None]) -> None:
        # This task is not awaited. Without heartbeats the buffer would consider a working trainer dead.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the heartbeat ended", exc_info=error)
            self.fail(ArealError(f"no more heartbeats are sent: {type(error).__name__}: {error}"))

    def _on_runtime_failed(self, failed: asyncio.Future[None]) -> None:
        if not failed.cancelled() and (error := failed.exception()) is not None:
            self.fail(error if isinstance(error, ArealError) else ArealError(f"unexpected: {error!r}"))

    def _on_ack(self, buffer: str, ack: HeartbeatAck) -> None:
        follow_level(ack.log_level)
        self._progress.observe(buffer, ack.progress, now_s=self._untroubled_time_s())

    def _on_message(self, shard: int, message: Any) -> None:
        if isinstance(message, Directory) and shard == 0:
            self.directory = message
            self.on_directory()
