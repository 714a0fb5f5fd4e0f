"""The server's clients of the buffers: registration, heartbeats with credit, results, acknowledgements.

    UNREGISTERED -> hello -> REGISTERED -> HelloRequired (the buffer was restarted) -> UNREGISTERED
                             `-> unacknowledged results are sent again

While a buffer does not respond, the client sends only an occasional hello, because messages would pile up in
the socket. Without new leases the server becomes idle, and it keeps finished results until they are
acknowledged. The server exits only if the buffer refuses it (a newer process has the same name, the model
differs), if the job has failed, or when the run is finished.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from areal_like.config import Config
from areal_like.errors import ArealError, DeadlineError, RunFinishedError
from areal_like.runtime.daemon import cancelled_on_exit
from areal_like.runtime.logs import follow_level
from areal_like.runtime.waits import PendingWaits
from areal_like.security.keyring import Keyring
from areal_like.security.session_keys import SessionKeys
from areal_like.shards import WHOLE, Shard, all_shards
from areal_like.wire.addresses import buffer_addresses, buffer_lookup
from areal_like.wire.buffer_connection import BufferConnection
from areal_like.wire.limits import MAX_SESSION_CHARS, bounded_stats, shortened
from areal_like.wire.messages.hello import Goodbye, Hello
from areal_like.wire.messages.producer import (
    BATCH_BYTES,
    AbortLeases,
    AppendSession,
    FindSession,
    ForgetSession,
    HeartbeatAck,
    Lease,
    Leases,
    ReadSession,
    ReturnLeases,
    SampleAcks,
    SampleDone,
    SampleFailed,
    Samples,
    ServerHeartbeat,
    ServerState,
    SessionEntries,
    SessionPlace,
    SessionStored,
)
from rollout_server.leases.held_leases import HeldLeases, Place, SampleResult

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 5.0
_RESEND_AFTER_S = 5.0
"""An acknowledgement takes milliseconds; after this time a small result, or its acknowledgement, is
considered lost. `HeldLeases` gives others more time."""
_ASK_TIMEOUT_S = 5.0
"""A request about a session is sent again after this time."""
_FIND_TIMEOUT_S = 5.0
_GOODBYE_TIMEOUT_S = 2.0
_LARGE_RISE = 0.1
"""Increase in capacity that is announced before the next heartbeat is due, as a fraction of the samples that
may be at the engine."""
_MAX_DIGITS = 20
_EARLY_HEARTBEAT_S = 0.05
"""The increase is announced after this time, if it has lasted."""


class BufferClient(BufferConnection):
    """The connection to one buffer. Create it in its event loop; `run` registers and sends heartbeats."""

    def __init__(
        self,
        config: Config,
        shard: Shard = WHOLE,
        *,
        hello: Callable[[], Hello],
        held: HeldLeases,
        waits: PendingWaits,
        on_leases: Callable[[list[Lease]], None],
        on_abort: Callable[[list[int]], None],
        on_drain: Callable[[], None] = lambda: None,
        on_finished: Callable[[], None] = lambda: None,
        keyring: Keyring | None = None,
        session_keys: SessionKeys | None = None,
    ) -> None:
        """`hello` returns the current registration; `session_keys` gets the buffer's secret; `on_abort` is
        called with the leases that the buffer aborted, `on_drain` when an operator drains the server,
        `on_finished` when the run is finished."""
        self._config = config
        self._session_keys = session_keys or SessionKeys()
        self._shard = shard
        self._hello = hello
        self._held = held
        self._waits = waits
        self._on_leases = on_leases
        self._on_abort = on_abort
        super().__init__(
            buffer_addresses(config)[shard.index],
            max_message_bytes=config.buffer.max_message_bytes,
            keyring=keyring,
            look_up=buffer_lookup(config, shard.index),
        )
        self._on_drain = on_drain
        self._on_finished = on_finished
        self._heartbeat_now = asyncio.Event()
        self._announced_samples = 0
        """`HeldLeases.capacity_samples` of the last heartbeat."""
        self._is_checking = False
        """True while `_heartbeat_if_room` is scheduled."""
        self._outbox: list[SampleResult] = []
        """Results delivered in this turn of the loop, to be sent together."""
        self._fatal: ArealError | None = None
        self._has_left = False
        """True once goodbye was sent: no heartbeat may follow it."""
        self.state = ServerState.STARTING
        self.weights_version = 0
        self.stats: dict[str, float] = {}
        """Sent with every heartbeat."""
        self.newest_version = 0
        """Newest weights version that the buffer has allocated, as of its last response."""
        self.num_refused: Counter[str] = Counter()
        """Number of samples that the buffer refused, by reason."""

    @property
    def problem(self) -> str:
        """Why the buffer cannot be used now; empty if it can."""
        if not self.is_registered:
            return f"not registered at the buffer ({self.address})"
        if self.is_silent:
            return f"the buffer ({self.address}) has not responded for {self.silent_s:.0f} s"
        return ""

    async def run(self) -> None:
        """Registers, and sends heartbeats until cancelled.

        Raises RefusedError or ArealError when the buffer refuses this server or the job has failed.
        """
        while True:
            if self._has_left:  # the buffer would ask this server to register again
                await asyncio.Event().wait()
            if not self.is_registered or self.is_silent:
                await self._register()
            self._send_heartbeat()
            # A buffer that is out of disk space queues one response per resend, so do not resend.
            if not self.is_stuck:
                self._resend(shortest_s=_RESEND_AFTER_S)
            try:
                async with asyncio.timeout(self._config.daemon.heartbeat_s):
                    await self._heartbeat_now.wait()
            except TimeoutError:
                pass
            self._heartbeat_now.clear()
            if self._fatal is not None:
                raise self._fatal

    def announce(self, *, state: ServerState | None = None, weights_version: int | None = None) -> None:
        """Changes the announced state or version, and sends a heartbeat in the next turn of the loop."""
        self.state = self.state if state is None else state
        self.weights_version = self.weights_version if weights_version is None else weights_version
        self._wake()

    def deliver(self, result: SampleResult) -> None:
        """Sends a result, and resends it until it is acknowledged.

        Results delivered in the same turn of the loop are sent together.
        """
        if self._held.finish(result, now_s=self._loop.time()):
            if not self._outbox:
                self._loop.call_soon(self._flush)
            self._outbox.append(result)

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        """Records that a sample left the engine or came back to it.

        The buffer learns of the credit freed by a finished sample when the sample arrives, but not of the
        credit freed here. So that the engine is not idle until the next heartbeat, a large increase is
        announced early. An increase that lasts only milliseconds (a fast reward) is not worth a message.
        """
        self._held.moved(lease_id, sample_index, place)
        if not self._is_checking and self._has_more_room():
            self._is_checking = True
            self._loop.call_later(_EARLY_HEARTBEAT_S, self._heartbeat_if_room)

    def _heartbeat_if_room(self) -> None:
        self._is_checking = False
        if self._has_more_room():
            self._wake()

    def _has_more_room(self) -> bool:
        num_more = self._held.capacity_samples - self._announced_samples
        return self.state is ServerState.SERVING and num_more > self._held.engine_samples * _LARGE_RISE

    async def ask(self, request: Any, *, waits_for: str) -> Any:
        """Returns the reply to a request about a session, however long the buffer takes: it may be starting
        again. Raises ArealError if the buffer refuses this process, or the job has failed."""
        with self._waits(f"{self._shard.name}: {waits_for}"):
            while True:
                try:
                    return await self.call(request, timeout_s=_ASK_TIMEOUT_S)
                except DeadlineError:
                    log.debug("no reply to %s yet", type(request).__name__)

    def give_back(self, *, reason: str) -> list[int]:
        """Returns every lease with a missing sample to the buffer; returns the ids of these leases."""
        leases = self._held.drop_unfinished()
        if leases:
            self._flush()  # first, so that finished samples of these leases still count
            self.send(ReturnLeases(leases=leases, reason=shortened(reason)))
        return leases

    async def leave(self) -> None:
        """Completes a drain: gives leases back, waits briefly for acknowledgements, sends goodbye."""
        if not self.is_registered:
            return
        self.give_back(reason="draining")
        self._send_heartbeat()
        try:
            async with asyncio.timeout(_GOODBYE_TIMEOUT_S):
                while self._held.num_unacknowledged:
                    await asyncio.sleep(0.02)
            self._has_left = True
            await self.call(Goodbye(stats=bounded_stats(self.stats)), timeout_s=_GOODBYE_TIMEOUT_S)
        except TimeoutError:
            num = self._held.num_unacknowledged
            log.warning("leaving without a goodbye: the buffer has not acknowledged %d samples", num)
        except ArealError as error:
            log.info("the buffer did not confirm the goodbye: %s", error)

    def close(self) -> None:
        """Closes the socket. Unacknowledged results are lost; their leases expire at the buffer."""
        self._outbox.clear()
        super().close()

    async def _register(self) -> None:
        for attempt in itertools.count(1):
            hello = dataclasses.replace(self._hello(), shard=self._shard.index, num_shards=self._shard.count)
            try:
                with self._waits(f"{self._shard.name}: welcome"):
                    welcome = await self.register(hello, timeout_s=_HELLO_TIMEOUT_S)
                break
            except RunFinishedError:
                self._on_finished()
                with self._waits(f"{self._shard.name}: the run is finished"):
                    await asyncio.Event().wait()  # the drain cancels it
            except DeadlineError:
                if self._fatal is not None:
                    raise self._fatal from None
                if attempt.bit_count() == 1:  # log attempts 1, 2, 4, 8, ...: a buffer may be down for days
                    log.warning("no welcome from the buffer at %s yet", self.address)
        log.info("registered at %s: job %s, step %d", self.address, welcome.job, welcome.step)
        if welcome.session_secret:
            self._session_keys.set_secret(self._shard, welcome.session_secret)
        self.newest_version = max(self.newest_version, welcome.newest_version)
        self._outbox.clear()  # its results are also unacknowledged, so they are sent by the next line
        self._resend(shortest_s=0)

    def _resend(self, *, shortest_s: float) -> None:
        """Resends results that may have been lost with a connection."""
        self._outbox += self._held.to_resend(now_s=self._loop.time(), shortest_s=shortest_s)
        self._flush()

    def _flush(self) -> None:
        results, self._outbox = self._outbox, []
        samples = (result for result in results if isinstance(result, SampleDone))
        max_bytes = min(BATCH_BYTES, self._config.buffer.max_message_bytes // 2)
        for batch in Samples.batches(samples, max_bytes=max_bytes):
            self.send(batch)
        for result in results:
            if isinstance(result, SampleFailed):
                self.send(dataclasses.replace(result, error=shortened(result.error)))

    def _send_heartbeat(self) -> None:
        self._flush()  # first: the credit counts samples in the outbox as sent
        self._announced_samples = self._held.capacity_samples
        self.send(
            ServerHeartbeat(
                state=self.state,
                free_samples=self._held.free_samples if self.state is ServerState.SERVING else 0,
                holding_samples=self._held.holding_samples,
                weights_version=self.weights_version,
                leases=self._held.lease_ids,
                stats=bounded_stats(self.stats),
                waits=self._waits.longest(),
            )
        )

    def on_message(self, message: Any) -> None:
        """Handles leases, acknowledgements and aborts."""
        match message:
            case SampleAcks():
                self._acknowledge(message)
            case Leases():
                self._take(message.leases)
            case AbortLeases():
                self._on_abort(self._held.drop(message.leases))
                self._wake()
            case HeartbeatAck():
                self.newest_version = max(self.newest_version, message.newest_version)
                follow_level(message.log_level)
            case _:
                log.warning("unexpected %s from the buffer", type(message).__name__)

    def _acknowledge(self, message: SampleAcks) -> None:
        for ack in message.acks:
            self._held.acknowledge(ack)
            if ack.refused:
                self.num_refused[ack.refused] += len(ack.sample_indices)

    def _take(self, leases: list[Lease]) -> None:
        if self.state is not ServerState.SERVING:  # granted before the buffer received the new state
            lease_ids = [lease.lease_id for lease in leases]
            self.send(ReturnLeases(leases=lease_ids, reason=self.state.value))
            return
        self._on_leases([lease for lease in leases if self._held.grant(lease)])

    def fatal(self, error: ArealError) -> None:
        """Makes `run` raise this error."""
        self._fatal = self._fatal or error
        self._wake()

    def hello_required(self) -> None:
        self._wake()

    def reopened(self) -> None:
        super().reopened()
        self._wake()

    def drain(self) -> None:
        self._on_drain()

    def finished(self) -> None:
        self._on_finished()

    def _wake(self) -> None:
        """Sends the next heartbeat (or registers) in the next turn of the loop."""
        self._heartbeat_now.set()


class ShardedBufferClient:
    """A `BufferClient` for each shard. Create it in its event loop; `run` is its task.

    Its methods and properties are those of the clients and of their leases, for all shards.

    The buffers are independent: each grants leases within its own budget, gets separate heartbeats with the
    server's state and version, and receives the samples that it has leased. Only the server's capacity is
    shared. It is split evenly and statically: each shard may lease floor or ceil of capacity / num_shards
    samples, so that buffers never exceed the capacity without coordinating. The cost is unused capacity while
    a buffer is down, but then its part of the step is missing too. (As with one buffer, a ticket with more
    samples than the share is still leased as a whole to a server that holds no samples of that shard.)
    """

    def __init__(self, config: Config, *, engine_samples: int, max_episodes: int, **options: Any) -> None:
        """`engine_samples`, `max_episodes`: see `HeldLeases`; for the whole server. `options`: those of
        `BufferClient`."""
        self._num_shards = config.buffer.num_shards
        self._shards = shards = all_shards(self._num_shards)
        self._held = [
            HeldLeases(engine_samples=shard.share(engine_samples), max_episodes=shard.share(max_episodes))
            for shard in shards
        ]
        self._clients = [
            BufferClient(config, shard, held=held, **options)
            for shard, held in zip(shards, self._held, strict=True)
        ]

    @property
    def state(self) -> ServerState:
        return self._clients[0].state

    @property
    def problem(self) -> str:
        return "; ".join(filter(None, (client.problem for client in self._clients)))

    @property
    def newest_version(self) -> int:
        """Newest weights version that every buffer has reported."""
        return min(client.newest_version for client in self._clients)

    @property
    def num_refused(self) -> dict[str, int]:
        total = sum((client.num_refused for client in self._clients), Counter[str]())
        return dict(sorted(total.items()))

    @property
    def lease_ids(self) -> list[int]:
        return [lease_id for held in self._held for lease_id in held.lease_ids]

    @property
    def holding_samples(self) -> int:
        return sum(held.holding_samples for held in self._held)

    @property
    def num_at(self) -> Counter[Place]:
        return sum((held.num_at for held in self._held), Counter())

    @property
    def num_unacknowledged(self) -> int:
        return sum(held.num_unacknowledged for held in self._held)

    async def run(self) -> None:
        """Registers at every buffer, and sends heartbeats until cancelled. Raises like `BufferClient.run`."""
        tasks = [
            asyncio.create_task(client.run(), name=f"buffer {index}")
            for index, client in enumerate(self._clients)
        ]
        async with cancelled_on_exit(*tasks):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def announce(self, *, state: ServerState | None = None, weights_version: int | None = None) -> None:
        for client in self._clients:
            client.announce(state=state, weights_version=weights_version)

    def set_stats(self, stats: dict[str, float]) -> None:
        """Sends these statistics with every heartbeat from now on."""
        for client in self._clients:
            client.stats = stats

    def set_engine_samples(self, engine_samples: int) -> None:
        """Changes the server's limit of samples at the engine, at least one per shard; existing leases
        stay."""
        engine_samples = max(engine_samples, self._num_shards)
        for shard, held in zip(self._shards, self._held, strict=True):
            held.engine_samples = shard.share(engine_samples)

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        self._client_of(lease_id).moved(lease_id, sample_index, place)

    def deliver(self, result: SampleResult) -> None:
        self._client_of(result.lease_id).deliver(result)

    async def append_session(self, entry: AppendSession) -> str:
        """Returns when an entry of a journal is durable; returns why it was refused, or an empty string."""
        stored = await self._client_of(entry.lease_id).ask(entry, waits_for="entry of a session's journal")
        assert isinstance(stored, SessionStored)
        return stored.refused

    async def forget_session(self, forgotten: ForgetSession) -> str:
        """Returns when a journal is gone; returns why it was refused, or an empty string."""
        client = self._client_of(forgotten.lease_id)
        stored = await client.ask(forgotten, waits_for="end of a session's journal")
        assert isinstance(stored, SessionStored)
        return stored.refused

    async def read_session(self, lease: Lease, sample_index: int) -> tuple[str, list[bytes]]:
        """Returns the id of the session of a leased sample, and the entries of its journal; an empty id if
        there is none."""
        client = self._client_of(lease.lease_id)
        entries: list[bytes] = []
        while True:
            request = ReadSession(
                lease_id=lease.lease_id,
                ticket_id=lease.ticket_id,
                sample_index=sample_index,
                first=len(entries),
            )
            found = await client.ask(request, waits_for="journal of a session")
            assert isinstance(found, SessionEntries)
            entries += [one.tobytes() for one in found.entries]
            if not found.session or len(entries) >= found.num_entries or not found.entries:
                return found.session, entries

    async def find_session(self, id: str) -> SessionPlace | None:
        """Returns where a session is; None if its buffer does not reply."""
        ticket = id.partition("-")[0]
        number = int(ticket) if ticket.isascii() and ticket.isdecimal() and len(ticket) < _MAX_DIGITS else 0
        try:
            request = FindSession(session=shortened(id, max_chars=MAX_SESSION_CHARS))
            found = await self._client_of(number).call(request, timeout_s=_FIND_TIMEOUT_S)
        except ArealError:
            return None
        return found if isinstance(found, SessionPlace) else None

    def _client_of(self, lease_id: int) -> BufferClient:
        return self._clients[Shard.of(lease_id, count=self._num_shards).index]

    def give_back(self, *, reason: str) -> list[int]:
        return [lease_id for client in self._clients for lease_id in client.give_back(reason=reason)]

    async def leave(self) -> None:
        await asyncio.gather(*(client.leave() for client in self._clients))

    def close(self) -> None:
        for client in self._clients:
            client.close()
