"""The server's connection to one buffer: registration, heartbeats with credit, samples out, acknowledgements in.

    (start) -> hello -> REGISTERED -> "who are you?" from a restarted buffer -> hello, unacknowledged answers again -> REGISTERED

A silent buffer is waited for, with nothing but an occasional hello, because what is sent piles up in the socket: with no new leases the
server falls idle by itself, and what it finished is kept until acknowledged. Only a refusal (a newer process of our name, another model)
or a failed job ends the server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Callable
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, DeadlineError
from areal_like.runtime.waits import PendingWaits
from areal_like.shards import WHOLE, Shard
from areal_like.wire.addresses import buffer_addresses
from areal_like.wire.channel import Link
from areal_like.wire.messages.hello import Goodbye, Hello, HelloRequired, JobFailed, Refused, Welcome
from areal_like.wire.messages.producer import (
    BATCH_BYTES,
    AbortLeases,
    HeartbeatAck,
    Lease,
    Leases,
    ReturnLeases,
    SampleAcks,
    SampleDone,
    SampleFailed,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from rollout_server.buffer_client.lease_desk import Answer, LeaseDesk

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_RESEND_AFTER_S = 5.0
"""An acknowledgement takes milliseconds; one that is so late was lost with a connection."""
_SILENT_AFTER_S = 5.0
_GOODBYE_TIMEOUT_S = 2.0


class BufferLink:
    """Create it in its event loop. `run` is the task that registers and keeps the heartbeat."""

    def __init__(
        self,
        config: Config,
        shard: Shard = WHOLE,
        *,
        hello: Callable[[], Hello],
        desk: LeaseDesk,
        waits: PendingWaits,
        on_leases: Callable[[list[Lease]], None],
        on_abort: Callable[[list[int]], None],
    ) -> None:
        """`hello` says what to register as at the moment it is called; `on_abort` gets leases that were dropped from the desk."""
        self._config = config
        self._shard = shard
        self._hello = hello
        self._desk = desk
        self._waits = waits
        self._on_leases = on_leases
        self._on_abort = on_abort
        address = buffer_addresses(config)[shard.index]
        self._link = Link(
            address, handler=self._on_message, max_message_bytes=config.buffer.max_message_bytes
        )
        self._loop = asyncio.get_running_loop()
        self._beat_now = asyncio.Event()
        self._outbox: list[Answer] = []
        """Finished in this turn of the loop."""
        self._registered = False
        self._is_stuck = False
        self._fatal: ArealError | None = None
        self.state = ServerState.STARTING
        self.weights_version = 0
        self.stats: dict[str, float] = {}
        """Goes out with every heartbeat."""
        self.newest_version = 0
        """Newest version that the buffer has allocated, as far as we heard."""
        self.num_refused: dict[str, int] = {}
        """Samples that the buffer did not want, by reason."""

    @property
    def problem(self) -> str:
        """Why the buffer cannot be used now; empty if it can."""
        if not self._registered:
            return f"not registered at the buffer ({self._link.address})"
        silent_s = self._silent_s
        return (
            f"the buffer ({self._link.address}) has been silent for {silent_s:.0f} s"
            if silent_s > _SILENT_AFTER_S
            else ""
        )

    @property
    def _silent_s(self) -> float:
        return self._loop.time() - self._link.last_heard_s

    async def run(self) -> None:
        """Registers, and beats for ever. Raises RefusedError or ArealError when the buffer does not want us or the job has failed."""
        while True:
            if not self._registered or self._silent_s > _SILENT_AFTER_S:
                await self._register()
            self._beat()
            # One that cannot write has what was sent, and would keep an answer for each time that it hears it again.
            if not self._is_stuck:
                self._resend(older_than_s=_RESEND_AFTER_S)
            try:
                async with asyncio.timeout(self._config.daemon.heartbeat_s):
                    await self._beat_now.wait()
            except TimeoutError:
                pass
            self._beat_now.clear()
            if self._fatal is not None:
                raise self._fatal

    def announce(self, *, state: ServerState | None = None, weights_version: int | None = None) -> None:
        """State or version changed: the buffer hears of it in the next turn of the loop."""
        self.state = self.state if state is None else state
        self.weights_version = self.weights_version if weights_version is None else weights_version
        self._beat_now.set()

    def deliver(self, answer: Answer) -> None:
        """Sends a finished or failed sample, with what else is finished in this turn of the loop, and again until it is acknowledged."""
        if self._desk.finish(answer, now_s=self._loop.time()):
            if not self._outbox:
                self._loop.call_soon(self._flush)
            self._outbox.append(answer)

    def give_back(self, *, reason: str) -> list[int]:
        """Returns every lease with an unfinished sample to the buffer; says which."""
        leases = self._desk.drop_unfinished()
        if leases:
            self._flush()  # what is finished still counts
            self._link.send(ReturnLeases(leases=leases, reason=reason))
        return leases

    async def leave(self) -> None:
        """The last words of a server that drains: gives leases back, waits for acknowledgements a moment, says goodbye."""
        self.give_back(reason="draining")
        self._beat()
        try:
            async with asyncio.timeout(_GOODBYE_TIMEOUT_S):
                while self._desk.num_unacknowledged:
                    await asyncio.sleep(0.02)
            await self._link.call(Goodbye(stats=self.stats), timeout_s=_GOODBYE_TIMEOUT_S)
        except (TimeoutError, ArealError) as error:
            log.info("the buffer did not confirm the goodbye: %s", error)

    def close(self) -> None:
        """Closes the socket. What was not acknowledged is lost here; its leases run out."""
        self._outbox.clear()
        self._link.close()

    async def _register(self) -> None:
        for attempt in itertools.count(1):
            try:
                hello = dataclasses.replace(
                    self._hello(), shard=self._shard.index, num_shards=self._shard.count
                )
                with self._waits(f"{self._shard.name}: welcome"):
                    welcome = await self._link.call(hello, timeout_s=_HELLO_TIMEOUT_S)
                break
            except DeadlineError:
                if self._fatal is not None:
                    raise self._fatal from None
                if attempt.bit_count() == 1:  # 1, 2, 4, 8, ...: it may be away for days
                    log.warning("no welcome from the buffer at %s yet", self._link.address)
        assert isinstance(welcome, Welcome)
        log.info("registered at %s: job %s, step %d", self._link.address, welcome.job, welcome.step)
        self._registered = True
        self.newest_version = max(self.newest_version, welcome.newest_version)
        self._outbox.clear()  # of which what is still owed is among the rest
        self._resend(older_than_s=0)

    def _resend(self, *, older_than_s: float) -> None:
        """What may have been lost."""
        self._outbox += self._desk.to_resend(now_s=self._loop.time(), older_than_s=older_than_s)
        self._flush()

    def _flush(self) -> None:
        answers, self._outbox = self._outbox, []
        samples = (answer for answer in answers if isinstance(answer, SampleDone))
        for batch in Samples.batches(
            samples, max_bytes=min(BATCH_BYTES, self._config.buffer.max_message_bytes // 2)
        ):
            self._link.send(batch)
        for answer in answers:
            if isinstance(answer, SampleFailed):
                self._link.send(answer)

    def _beat(self) -> None:
        self._flush()  # credit counts what is sent
        self._link.send(
            ServerHeartbeat(
                state=self.state,
                free_samples=self._desk.free_samples if self.state is ServerState.SERVING else 0,
                holding_samples=self._desk.holding_samples,
                weights_version=self.weights_version,
                leases=self._desk.lease_ids,
                stats=self.stats,
            )
        )

    def _on_message(self, message: Any) -> None:
        match message:
            case SampleAcks():
                for ack in message.acks:
                    self._desk.acknowledge(ack)
                    if ack.refused:
                        self.num_refused[ack.refused] = self.num_refused.get(ack.refused, 0) + len(
                            ack.sample_indices
                        )
            case Leases():
                self._take(message.leases)
            case AbortLeases():
                self._on_abort(self._desk.drop(message.leases))
                self._beat_now.set()
            case HeartbeatAck():
                self._is_stuck = bool(message.trouble)
                self.newest_version = max(self.newest_version, message.newest_version)
            case HelloRequired():
                self._registered = self._is_stuck = False
                self._beat_now.set()
            case JobFailed():
                self._end(ArealError(message.reason))
            case Refused():
                self._end(ArealError(f"the buffer refused this server ({message.field}): {message.reason}"))
            case _:
                log.warning("unexpected %s from the buffer", type(message).__name__)

    def _take(self, leases: list[Lease]) -> None:
        if self.state is not ServerState.SERVING:  # granted while the news was on its way
            self._link.send(
                ReturnLeases(leases=[lease.lease_id for lease in leases], reason=self.state.value)
            )
            return
        self._on_leases([lease for lease in leases if self._desk.grant(lease)])

    def _end(self, error: ArealError) -> None:
        self._fatal = self._fatal or error
        self._beat_now.set()
