"""The buffer as a process: one ROUTER socket around the ledger, to which all peers connect.

    STARTING -> READY -> DRAINING (SIGTERM; continues while a trainer needs it to finish its step) -> exit 0
                   |
                   +-> the run is finished: every peer is told -> they leave, or `daemon.linger_s` -> exit 0
                   +-> the job fails (too many failures in a row): every peer gets the reason -> exit 1

The daemon contains no rules: `Handlers` passes each message to the ledger, and one `Outbox.flush` per burst
of messages sends the consequences (leases, aborts, groups that a rank waits for). Left out: threads, because
the ledger's operations take microseconds.

A buffer that was killed continues with its ledger after a restart. Peers have to send Hello again, and repeat
requests without a reply and samples without an acknowledgement. While the store cannot write (a full disk),
the buffer is not ready, grants no leases, and reports the reason in the reply to every heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Iterator
from typing import Any

from areal_like.errors import RefusedError, RunFinishedError, StaleIncarnationError
from areal_like.runtime.command_line import keep_config
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.security.binding import admits_only_this_machine, require_loopback_or_keys
from areal_like.security.session_keys import new_secret
from areal_like.shards import Shard
from areal_like.wire.addresses import buffer_host, buffer_port, reachable_host
from areal_like.wire.channel import Envelope, Listener, tcp_address
from areal_like.wire.curve import CurveServer
from areal_like.wire.fingerprint import as_number, dataset_fingerprint, shared_settings
from areal_like.wire.messages import TO_BUFFER, consumer
from areal_like.wire.messages.hello import JobFinished, Role
from buffer.ledger.recovery import recover
from buffer.service import status
from buffer.service.handlers import NEEDS_DURABILITY, Handlers
from buffer.service.job_watch import JobWatch
from buffer.service.operations import Operations
from buffer.service.outbox import Outbox
from buffer.service.peers import KEY_FIELDS, ROLES, ConnectedPeers, PeerKeys
from buffer.service.prometheus import BufferSeries
from buffer.service.registration import refusal_of
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_store

log = logging.getLogger(__name__)

_TICK_S = 0.25
_TELL_AGAIN_S = 0.5
"""Interval at which peers that have not left are told again that the run is finished."""
_FAREWELL_S = 2.0
"""Time for a failed job's peers to receive the reason before the socket closes."""
_LAST_REPLY_S = 0.2
"""Time for the last peer of a finished run to receive the reply to its goodbye."""


async def main(runtime: Runtime) -> None:
    """Serves until it is stopped. Raises ArealError if the job fails."""
    daemon = BufferDaemon(runtime, Shard.named(runtime.name, count=runtime.config.buffer.num_shards))
    keep_config(runtime.config, runtime.paths.config)
    try:
        await daemon.serve()
    finally:
        daemon.close()


class RunEnd:
    """The end of a finished run: how long the buffer keeps running so that it can tell every peer. Pure.

        (the run is finished) -> has_ended(): every peer has said goodbye, or `linger_s` is over

    A server that was lost recently may be restarting, and a buffer that is started for a finished run does
    not know which peers are left. In both cases the buffer waits for the whole time. Times are seconds on any
    one clock.
    """

    def __init__(self, peers: ConnectedPeers, *, linger_s: float, was_finished: bool) -> None:
        """`was_finished`: an earlier buffer served the run to its end."""
        self._peers = peers
        self._linger_s = linger_s
        self._was_finished = was_finished
        self._lost_s: dict[str, float] = {}
        self._since_s: float | None = None

    def lost(self, name: str, *, now_s: float) -> None:
        """Notes that a server stopped responding."""
        self._lost_s[name] = now_s

    def reopened(self) -> None:
        """Notes that a trainer has resumed at an earlier step."""
        self._was_finished, self._since_s = False, None

    def has_ended(self, *, now_s: float) -> bool:
        """True if the buffer of a finished run may end. Poll it from the end of the run on."""
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= self._linger_s:
            return True
        may_come_back = any(
            now_s - lost_s < self._linger_s and self._peers.named(name) is None
            for name, lost_s in self._lost_s.items()
        )
        has_peers = any(self._peers.of(role) for role in Role)
        return not (has_peers or may_come_back or self._was_finished)


class BufferDaemon:
    """The socket, event loop and ticks around one ledger. Everything runs in one event loop."""

    def __init__(self, runtime: Runtime, shard: Shard) -> None:
        config = runtime.config
        self._runtime = runtime
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._received_bytes = 0
        self._flush_is_due = False
        self._over: asyncio.Future[None] = self._loop.create_future()
        """Receives the exception when the job fails."""
        self._ticking = self._loop.call_soon(lambda: None)
        self._wake = asyncio.Event()
        """Set when `serve` may have to stop serving: a stop was requested, the job failed or the run is
        finished."""
        dataset = dataset_fingerprint(config)
        self._ledger = recover(
            LedgerSettings.from_config(config, shard),
            open_store(config, on_error=self._fail, shard=shard),
            now_s=self._loop.time(),
            dataset=as_number(dataset),
            generation=0 if config.buffer.durability != "none" else secrets.randbits(16),
            # With `auto` a supervisor may restart the roles of a finished run: it stays finished.
            reopen=config.resume not in ("", "auto"),
            new_secret=new_secret(),
        )
        self._ledger.hold_grants()
        self._peers = ConnectedPeers(
            job=config.name,
            dataset=dataset,
            settings={role: shared_settings(config, role) for role in Role},
            shard=shard,
            max_peers=config.buffer.max_peers,
            only_loopback=admits_only_this_machine(config.security, buffer_host(config, shard)),
        )
        is_finished = self._ledger.state.is_finished
        self._end = RunEnd(self._peers, linger_s=config.daemon.linger_s, was_finished=is_finished)
        keyring = runtime.keyring
        self._recent = status.RecentNumbers()
        self._watch = JobWatch(config, runtime.metrics, self._ledger, self._peers, now_s=self._loop.time())
        self._series = BufferSeries(runtime.metrics, max_staleness=config.staleness_cap)
        self._keys = PeerKeys(keyring)
        curve = None
        if keyring is not None:
            curve = CurveServer(keyring, roles=ROLES, on_failure=self._fail)
        require_loopback_or_keys(config.security, buffer_host(config, shard), setting="buffer.host")
        self._listener = Listener(
            host=buffer_host(config, shard),
            port=buffer_port(config, shard),
            handler=self._on_envelope,
            max_message_bytes=config.buffer.max_message_bytes,
            setting="buffer.port",
            curve=curve,
            accepts=TO_BUFFER,
            screen=self._screen,
            on_malformed=self._on_malformed,
        )
        self._outbox = Outbox(self._ledger, self._peers, self._listener, on_error=self._fail)
        self._handlers = Handlers(
            self._ledger,
            self._peers,
            self._outbox,
            job=config.name,
            clock=self._loop.time,
            run_counters=self.run_counters,
            on_finished=self._on_finished,
            keys=self._keys,
        )
        runtime.status = self.status
        runtime.verbs |= Operations(
            self._ledger,
            self._peers,
            self._outbox,
            self._handlers.registration,
            changing=self._failing_on_error,
            changed=self._flush_soon,
        ).verbs
        runtime.advertise(stream=tcp_address(reachable_host(config, shard), self._listener.port))

    async def serve(self) -> None:
        """Returns when the run has ended, or after a stop was requested and no trainer needs the buffer.

        Raises if the job fails.
        """
        self._tick()
        self._ledger.state.store.when_durable(self._show_readiness)
        log.info("listening on port %d", self._listener.port)
        stopping = asyncio.create_task(self._runtime.stopping.wait(), name="stopping")
        stopping.add_done_callback(lambda _: self._wake.set())
        async with cancelled_on_exit(stopping):
            if self._ledger.state.is_finished:
                log.info("the run is finished: telling late peers")
                self._wake.set()
            while True:
                await self._wake.wait()
                self._wake.clear()
                is_stopped = self._over.done() or self._runtime.stopping.is_set()
                if is_stopped or (self._ledger.state.is_finished and await self._linger()):
                    break
        if not self._over.done() and not self._ledger.state.is_finished:
            await self._drain()
        self._runtime.is_finished = self._ledger.state.is_finished and not self._over.done()
        if self._over.done():
            await asyncio.sleep(_FAREWELL_S)
            self._over.result()
        log.info("counters of the run: %s", self.run_counters())

    def close(self) -> None:
        """Closes the socket, and the ledger's files after writing what is pending."""
        self._outbox.close()
        self._ticking.cancel()
        self._listener.close()
        self._ledger.state.store.close()

    def run_counters(self) -> consumer.RunCounters:
        """Tickets, drops and counters of the whole run."""
        return status.run_counters(self._ledger.state, self._peers, received_bytes=self._received_bytes)

    def status(self) -> dict[str, Any]:
        """The body of /status."""
        return status.status(
            self._config,
            self._ledger,
            self._peers,
            now_s=self._loop.time(),
            received_bytes=self._received_bytes,
            refused=self._refused_frames(),
            num_fetches=self._outbox.num_fetches,
            recent=self._recent,
            why=self._watch.report(),
        )

    async def _linger(self) -> bool:
        """Waits for the end of a finished run; returns False if a trainer has reopened it."""
        told_s = self._loop.time()
        with self._runtime.waits("peers: to leave the finished run"):
            while not (self._over.done() or self._runtime.stopping.is_set()):
                # The message is lost if a connection is interrupted at this moment.
                if self._loop.time() > told_s + _TELL_AGAIN_S:
                    told_s = self._loop.time()
                    self._outbox.finish()
                if not self._ledger.state.is_finished:
                    self._end.reopened()
                    return False
                if self._end.has_ended(now_s=self._loop.time()):
                    await asyncio.sleep(_LAST_REPLY_S)
                    break
                await asyncio.sleep(0.05)
        return True

    def _on_finished(self) -> None:
        log.info("the run is finished after %d steps", self._ledger.state.steps.current)
        self._outbox.finish()
        self._wake.set()

    def _refused_frames(self) -> dict[str, int]:
        return {
            "bad_frames": self._listener.num_bad_frames,
            "unregistered_frames": self._handlers.num_unregistered_frames,
            "refused_frames": self._listener.num_refused_frames,
            "refused_handshakes": self._listener.num_refused_handshakes,
            "undelivered_messages": self._listener.num_dropped,
        }

    async def _drain(self) -> None:
        """Waits for the trainer: if it is stopping too, it needs the buffer to finish and commit its step."""
        deadline_s = self._loop.time() + self._config.daemon.drain_timeout_s / 2
        with self._runtime.waits("trainer: to end before its buffer"):
            while self._has_trainer() and self._loop.time() < deadline_s and not self._over.done():
                await asyncio.sleep(0.05)
        # A trainer that is still running continues with the next buffer, if that one recovers an open ledger.
        if not (self._has_trainer() and self._ledger.settings.durable):
            self._ledger.trainer.close("the buffer is draining")
        self._flush()

    def _has_trainer(self) -> bool:
        alive_s = max(1.0, 3 * self._config.daemon.heartbeat_s)
        ranks = self._peers.of(Role.TRAINER)
        return any(self._loop.time() - peer.last_heard_s <= alive_s for peer in ranks)

    def _screen(self, route: bytes, kind: type) -> bool:
        try:  # not `_failing_on_error`, which is slower: every message passes here
            return self._handlers.may_send(route, kind)
        except Exception as error:
            self._fail(error)
            return False

    def _on_malformed(self, route: bytes, what: str) -> None:
        with self._failing_on_error():
            self._handlers.malformed(route, what)
            self._flush_soon()

    def _on_envelope(self, envelope: Envelope) -> None:
        self._received_bytes += envelope.num_bytes
        with self._failing_on_error():
            try:
                reply = self._handlers.handle(envelope)
            except (RefusedError, StaleIncarnationError) as error:
                reply = refusal_of(error)
                if reply.field in KEY_FIELDS:
                    self._listener.count_refused_frame(reply.reason)
            except RunFinishedError:
                reply = JobFinished()
            if reply is not None:
                if isinstance(envelope.message, NEEDS_DURABILITY):
                    self._outbox.send_when_durable(envelope.peer, reply, rid=envelope.rid)
                else:
                    self._outbox.send(envelope.peer, reply, rid=envelope.rid)
            self._flush_soon()

    @contextlib.contextmanager
    def _failing_on_error(self) -> Iterator[None]:
        """Ends the job on any exception in a callback of the event loop.

        The loop itself would only log it, and a ledger whose conservation check failed must not continue.
        """
        try:
            yield
        except Exception as error:
            self._fail(error)

    def _flush_soon(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._over.done():
            return
        with self._failing_on_error():
            self._outbox.flush(now_s=self._loop.time())

    def _tick(self) -> None:
        """Periodic work: expires leases, removes silent servers, updates the Prometheus series."""
        self._ticking = self._loop.call_later(_TICK_S, self._tick)
        with self._failing_on_error():
            self._watch.tick(now_s=self._loop.time(), interval_s=_TICK_S)
            self._show_readiness()
            for name in self._ledger.dispatcher.expire(now_s=self._loop.time()):
                log.warning(
                    "%s has sent nothing for %g s: its samples are leased again",
                    name,
                    self._config.buffer.lease_timeout_s,
                )
                self._peers.remove(name)
                self._end.lost(name, now_s=self._loop.time())
                self._watch.lost(name, now_s=self._loop.time())
            self._handlers.registration.tick()
            self._remove_revoked()
            self._outbox.servers_changed()
            self._flush_soon()
            state = self._ledger.state
            counters = status.stream_counters(state, self._peers, received_bytes=self._received_bytes)
            self._recent.see(state, counters, now_s=self._loop.time())
            self._series.update(state, self._peers, counters | self._refused_frames())

    def _show_readiness(self) -> None:
        """The buffer is ready while it can write, from the time when its first rows are durable."""
        if reason := self._ledger.state.store.write_blocked_reason:
            self._runtime.unready(reason)
        elif self._ledger.state.leases.may_grant:
            self._runtime.ready()

    def _remove_revoked(self) -> None:
        """Removes peers whose key was revoked; the leases of servers are returned."""
        if self._runtime.keyring is None:
            return
        for role in Role:
            for peer in self._keys.revoked(self._peers.of(role), now_s=self._loop.time()):
                name = peer.hello.name
                log.warning(
                    "%s is removed: its key %s is revoked or has expired", name, peer.key and peer.key.name
                )
                self._handlers.registration.remove(name)

    def _fail(self, error: Exception) -> None:
        """Ends the job: sends the reason to every peer, and makes `serve` raise."""
        if self._over.done():
            return
        self._over.set_exception(error)
        self._wake.set()
        self._outbox.fail(str(error) or type(error).__name__)
