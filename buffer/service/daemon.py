"""The buffer as a process: one ROUTER socket around the ledger. Everybody connects here; nobody else has a configured address.

    STARTING -> READY -> DRAINING (SIGTERM: serves on while a trainer is there to finish its step) -> exit 0
                   |
                   +-> the job fails (too many failures in a row): every peer is told why -> exit 1

It is a thin shell: a message is handed to the ledger, then a *turn* sends what came of it (leases, aborts, groups that somebody waits
for). Turns are coalesced, so that a burst of samples costs one. Left out on purpose: threads (the ledger takes microseconds), and queues
of its own (credit bounds what servers send; a rank waits for one step's groups and the next one's).

A buffer that was killed comes back with its ledger: whoever speaks is asked to say hello again, and asks or sends again what was not
answered. So every answer that promises something (a version, a place in a step, an acknowledgement) leaves only when the ledger's rows
survive; leases may leave earlier, because one that the next buffer does not know is aborted there. While the store cannot write (a full
disk), the buffer is not ready, grants nothing, and says why in every heartbeat's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from areal_like.errors import ArealError, RefusedError, StaleIncarnationError, UserError
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.shards import Shard
from areal_like.wire.addresses import buffer_host, buffer_port, reachable_host
from areal_like.wire.channel import Envelope, Listener, tcp_address
from areal_like.wire.fingerprint import as_number, dataset_fingerprint, shared_settings
from areal_like.wire.messages import consumer, producer
from areal_like.wire.messages.hello import (
    Goodbye,
    Hello,
    HelloRequired,
    JobFailed,
    Ok,
    Refused,
    Role,
    Welcome,
)
from buffer.ledger.recovery import recover
from buffer.service.peers import Peer, PeerBook
from buffer.service.prometheus import BufferSeries
from buffer.settings import LedgerSettings
from buffer.storage.durable import open_store
from buffer.tickets import Drop, Verdict

log = logging.getLogger(__name__)

_TICK_S = 0.25
_PROMISED = (
    consumer.StartTraining,
    consumer.AllocVersion,
    consumer.AdoptVersion,
    consumer.Fetch,
    consumer.CompleteStep,
    consumer.SetMaxStaleness,
    consumer.CommitStep,
    consumer.CloseAdmission,
    Goodbye,
)
"""Requests whose answers wait until the ledger's rows survive what they are promised to survive."""
_FAREWELL_S = 2.0
"""Time that a failed job's peers have to hear of it before the socket closes."""


async def main(runtime: Runtime) -> None:
    """Serves until told to stop. Raises ArealError when the job fails."""
    daemon = BufferDaemon(runtime, Shard.named(runtime.name, count=runtime.config.buffer.num_shards))
    try:
        await daemon.serve()
    finally:
        daemon.close()


class BufferDaemon:
    """See the module. Everything runs in one event loop."""

    def __init__(self, runtime: Runtime, shard: Shard) -> None:
        config = runtime.config
        self._runtime = runtime
        self._config = config
        self._loop = asyncio.get_running_loop()
        dataset = dataset_fingerprint(config)
        self.ledger = recover(
            LedgerSettings.from_config(config, shard),
            open_store(config, on_error=self._end, shard=shard),
            now_s=self._loop.time(),
            # Lease ids grow over restarts too: what a server still makes for an earlier buffer must not look like a lease of this one.
            first_lease_id=int(time.time()) << 20,
            dataset=as_number(dataset),
        )
        settings = {role: shared_settings(config, role) for role in Role}
        self.peers = PeerBook(job=config.name, dataset=dataset, settings=settings, shard=shard)
        self._series = BufferSeries(runtime.metrics, max_staleness=config.staleness_cap)
        self._fetches: dict[tuple[bytes, int, int], int] = {}
        self._evals: dict[tuple[bytes, int], tuple[int, consumer.RequestEval]] = {}
        self._num_eval_prompts = 0
        self._acks: dict[bytes, dict[tuple[int, str], list[int]]] = {}
        """Sample indices that came since the last turn, by route, then by lease and refusal."""
        self._num_recorded_seen = 0
        self._rejection_seen = ""
        self._received_bytes = 0
        self._directory = consumer.Directory(servers=[])
        self._servers_changed = False
        """Since the directory was looked at."""
        self._turn_is_due = False
        self._is_closed = False
        self._over: asyncio.Future[None] = self._loop.create_future()
        """Failed when the job is."""
        self._ticking = self._loop.call_soon(lambda: None)
        self._wake = asyncio.Event()
        """Set when `serve` has something to do."""
        self._handlers: dict[Role, dict[type, Callable[[Peer, Envelope], Any]]] = {
            Role.ROLLOUT: {
                producer.ServerHeartbeat: self._server_beats,
                producer.Samples: self._samples,
                producer.SampleFailed: self._sample_failed,
                producer.ReturnLeases: self._leases_return,
                Goodbye: self._server_leaves,
            },
            Role.TRAINER: {
                consumer.TrainerHeartbeat: self._trainer_beats,
                consumer.Fetch: self._fetch,
                consumer.StartTraining: self._lead(self._start_training),
                consumer.AllocVersion: self._lead(self._alloc_version),
                consumer.AdoptVersion: self._lead(self._adopt_version),
                consumer.CompleteStep: self._lead(self._complete_step),
                consumer.SetMaxStaleness: self._lead(self._set_max_staleness),
                consumer.CommitStep: self._lead(self._commit_step),
                consumer.GetStreamState: self._lead(self._stream_state),
                consumer.RequestEval: self._lead(self._request_eval),
                consumer.CloseAdmission: self._lead(self._close_admission),
                consumer.GetRunCounters: self._lead(lambda peer, envelope: self.books()),
                Goodbye: self._trainer_leaves,
            },
        }
        self._listener = Listener(
            host=buffer_host(config, shard),
            port=buffer_port(config, shard),
            handler=self._on_envelope,
            max_message_bytes=config.buffer.max_message_bytes,
            setting="buffer.port",
        )
        runtime.status = self.status
        runtime.verbs["drop"] = self._drop
        runtime.advertise(stream=tcp_address(reachable_host(config, shard), self._listener.port))

    async def serve(self) -> None:
        """Until a stop is asked for and no trainer needs us, or the job fails."""
        self._tick()
        log.info("listening on port %d", self._listener.port)
        stopping = asyncio.create_task(self._runtime.stopping.wait(), name="stopping")
        stopping.add_done_callback(lambda _: self._wake.set())
        async with cancelled_on_exit(stopping):
            await self._wake.wait()
        if not self._over.done():
            await self._drain()
        if self._over.done():
            await asyncio.sleep(_FAREWELL_S)
            self._over.result()
        log.info("books: %s", self.books())

    def close(self) -> None:
        """Closes the socket, and the ledger's files after writing what is pending."""
        self._is_closed = True
        self._ticking.cancel()
        self._listener.close()
        self.ledger.store.close()

    def books(self) -> consumer.RunCounters:
        """The account of the run."""
        tickets = {state.value: count for state, count in self.ledger.register.num_by_state().items()}
        return consumer.RunCounters(
            tickets=tickets | {"issued": self.ledger.register.num_issued},
            drops={reason.value: self.ledger.drops[reason] for reason in Drop},
            counters=self._counters(),
        )

    def status(self) -> dict[str, Any]:
        """For /status."""
        ledger, books, now_s = self.ledger, self.books(), self._loop.time()
        return {
            "step": ledger.trainer_step,
            "committed_steps": ledger.committed_step + 1,
            "max_staleness": ledger.bound.max_staleness,
            "open_step": {
                "step": ledger.recorder.step,
                "recorded": ledger.recorder.position,
                "due_and_running": ledger.recorder.num_due,
            },
            "newest_version": ledger.versions.newest,
            "curriculum": ledger.prompts.curriculum.status() if ledger.prompts.curriculum else None,
            "closed_because": ledger.closed_because,
            "store_trouble": ledger.store.health,
            "trainers_lost": {
                str(step): {
                    "starts": num_starts,
                    "tickets": [ticket.ticket_id for ticket in ledger.steps.of(step)],
                }
                for step, num_starts in sorted(ledger.steps.attempts.items())
            },
            "failed_because": ledger.fatal,
            "tickets": books.tickets,
            "drops": books.drops,
            "last_rejection": ledger.last_rejection,
            "counters": books.counters,
            "lag_histogram": {
                str(lag): count for lag, count in sorted(ledger.statistics.lag_histogram.items())
            },
            "fetches_waiting": len(self._fetches),
            "buffer_bytes": ledger.store.num_bytes,
            "bad_frames": self._listener.num_bad_frames,
            "peers": [
                {
                    "name": peer.hello.name,
                    "role": peer.hello.role.value,
                    "state": peer.state,
                    "http": peer.hello.http_address,
                    "silent_s": round(now_s - peer.last_heard_s, 3),
                    "stats": peer.stats,
                }
                | self._server_status(peer.hello.name)
                for role in Role
                for peer in self.peers.of(role)
            ],
        }

    def _server_status(self, name: str) -> dict[str, Any]:
        server = self.ledger.book.servers.get(name)
        if server is None:
            return {}
        return {
            "weights_version": server.weights_version,
            "free_samples": server.free_samples,
            "owed_samples": server.owed_samples,
        }

    def _counters(self) -> dict[str, float]:
        counters = self.ledger.statistics.counters()
        # Engines also count what they generated for nothing: aborted requests, which never become samples.
        counters["tokens_generated"] = max(counters["tokens_generated"], self.peers.total("tokens_generated"))
        counters["generation_busy_s"] = self.peers.total("busy_s")
        counters["generation_idle_s"] = self.peers.total("idle_s")
        counters["received_bytes"] = self._received_bytes
        return counters

    async def _drain(self) -> None:
        """A trainer that is stopping too still needs this process to finish and commit its step."""
        deadline_s = self._loop.time() + self._config.daemon.drain_timeout_s / 2
        with self._runtime.waits("trainer: to end before its buffer"):
            while self._has_trainer() and self._loop.time() < deadline_s and not self._over.done():
                await asyncio.sleep(0.05)
        if not (
            self._has_trainer() and self.ledger.settings.durable
        ):  # one that stays goes on with the next buffer
            self.ledger.close("the buffer is draining")
        self._turn()

    def _has_trainer(self) -> bool:
        alive_s = max(1.0, 3 * self._config.daemon.heartbeat_s)
        return any(self._loop.time() - peer.last_heard_s <= alive_s for peer in self.peers.of(Role.TRAINER))

    # --- messages in ---

    def _on_envelope(self, envelope: Envelope) -> None:
        self._received_bytes += envelope.num_bytes
        with self._ending_on_error():
            try:
                answer = self._handle(envelope)
            except RefusedError as error:
                field, reason = error.args
                answer = Refused(field=field, reason=reason)
            except StaleIncarnationError as error:
                answer = Refused(field="incarnation", reason=str(error))
            if isinstance(envelope.message, _PROMISED):
                self._send_when_durable(envelope.peer, answer, rid=envelope.rid)
            elif answer is not None:
                self._listener.send(envelope.peer, answer, rid=envelope.rid)
            self._turn_soon()

    def _send_when_durable(self, route: bytes, answer: Any, *, rid: int) -> None:
        if answer is not None:
            self.ledger.store.when_durable(lambda: self._send_if_open(route, answer, rid=rid))

    def _send_if_open(self, route: bytes, answer: Any, *, rid: int) -> None:
        if not self._is_closed:
            self._listener.send(route, answer, rid=rid)

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """The outermost frame of every callback: the loop would only log an error, and a ledger that broke its own law must not go on."""
        try:
            yield
        except Exception as error:  # whatever it is ends the buffer, which says why
            self._end(error)

    def _handle(self, envelope: Envelope) -> Any:
        """The answer, or None if there is none yet. Raises RefusedError or StaleIncarnationError."""
        message, now_s = envelope.message, self._loop.time()
        if isinstance(message, Hello):
            return self._hello(envelope.peer, message, now_s=now_s)
        peer = self.peers.at(envelope.peer)
        if peer is None:
            self._listener.send(envelope.peer, HelloRequired())
            return None
        peer.last_heard_s = now_s
        if self.ledger.fatal:
            return JobFailed(reason=self.ledger.fatal)
        handler = self._handlers[peer.hello.role].get(type(message))
        if handler is None:
            raise RefusedError(
                "message", f"{type(message).__name__} is not for a {peer.hello.role.value} to send"
            )
        return handler(peer, envelope)

    def _hello(self, route: bytes, hello: Hello, *, now_s: float) -> Welcome:
        peer = self.peers.admit(route, hello, now_s=now_s)
        try:
            self._let_in(hello, now_s=now_s)
        except (RefusedError, StaleIncarnationError):
            self.peers.forget(hello.name)
            raise
        self.peers.welcome(hello)
        self._servers_changed = True
        if hello.role is Role.TRAINER:
            self._listener.send(peer.route, self._directory)
        log.info("%s registered, incarnation %d", hello.name, hello.incarnation)
        return Welcome(
            job=self._config.name, step=self.ledger.trainer_step, newest_version=self.ledger.versions.newest
        )

    def _let_in(self, hello: Hello, *, now_s: float) -> None:
        """Raises RefusedError or StaleIncarnationError."""
        if hello.role is Role.ROLLOUT:
            self.ledger.set_num_train_prompts(hello.num_train_prompts)
            self.ledger.register_server(
                hello.name, incarnation=hello.incarnation, weights_version=hello.weights_version, now_s=now_s
            )
            self._num_eval_prompts = hello.num_eval_prompts
        else:
            self.ledger.fence(hello.name, hello.incarnation)
            self._check_trainer(hello.incarnation)

    # --- rollout servers ---

    def _server_beats(self, peer: Peer, envelope: Envelope) -> producer.HeartbeatAck:
        beat: producer.ServerHeartbeat = envelope.message
        self.ledger.heartbeat(peer.hello.name, beat, now_s=self._loop.time())
        self._servers_changed = True
        peer.state, peer.stats = beat.state.value, beat.stats
        return self._heartbeat_ack()

    def _samples(self, peer: Peer, envelope: Envelope) -> None:
        samples: list[producer.SampleDone] = envelope.message.samples
        for sample, verdict in zip(samples, self.ledger.samples_done(peer.hello.name, samples), strict=True):
            if verdict in (Verdict.UNKNOWN_VERSION, Verdict.INVALID):
                log.warning(
                    "sample %d of ticket %d by %s refused: %s",
                    sample.sample_index,
                    sample.ticket_id,
                    peer.hello.name,
                    verdict.value,
                )
            self._acknowledge(peer, sample, verdict)

    def _sample_failed(self, peer: Peer, envelope: Envelope) -> None:
        failed: producer.SampleFailed = envelope.message
        log.warning(
            "%s could not make sample %d of ticket %d: %s",
            peer.hello.name,
            failed.sample_index,
            failed.ticket_id,
            failed.error,
        )
        self._acknowledge(peer, failed, self.ledger.sample_failed(peer.hello.name, failed))

    def _acknowledge(
        self, peer: Peer, answer: producer.SampleDone | producer.SampleFailed, verdict: Verdict
    ) -> None:
        acks = self._acks.setdefault(peer.route, {})
        acks.setdefault((answer.lease_id, verdict.refusal), []).append(answer.sample_index)

    def _leases_return(self, peer: Peer, envelope: Envelope) -> None:
        message: producer.ReturnLeases = envelope.message
        log.info("%s returned %d leases: %s", peer.hello.name, len(message.leases), message.reason)
        self.ledger.return_leases(peer.hello.name, message.leases)

    def _server_leaves(self, peer: Peer, envelope: Envelope) -> Ok:
        peer.stats = envelope.message.stats or peer.stats
        self.ledger.remove_server(peer.hello.name)
        self._servers_changed = True
        self.peers.forget(peer.hello.name)
        log.info("%s left", peer.hello.name)
        return Ok()

    # --- trainer ---

    def _lead(self, handler: Callable[[Peer, Envelope], Any]) -> Callable[[Peer, Envelope], Any]:
        def checked(peer: Peer, envelope: Envelope) -> Any:
            if peer.hello.rank != 0:
                raise RefusedError("rank", f"only rank 0 may send {type(envelope.message).__name__}")
            return handler(peer, envelope)

        return checked

    def _trainer_beats(self, peer: Peer, envelope: Envelope) -> producer.HeartbeatAck:
        peer.state, peer.stats = envelope.message.state, envelope.message.stats
        return self._heartbeat_ack()

    def _trainer_leaves(self, peer: Peer, envelope: Envelope) -> Ok:
        self.peers.forget(peer.hello.name)
        return Ok()

    def _fetch(self, peer: Peer, envelope: Envelope) -> consumer.Group | None:
        message: consumer.Fetch = envelope.message
        self._check_trainer(peer.hello.incarnation)
        group = self.ledger.fetch(step=message.step, position=message.position)
        if group is None:
            self._fetches[peer.route, message.step, message.position] = envelope.rid
        return group

    def _check_trainer(self, incarnation: int) -> None:
        if incarnation < self.ledger.trainer_incarnation:
            raise StaleIncarnationError(
                f"trainer incarnation {self.ledger.trainer_incarnation} is newer than {incarnation}"
            )

    def _start_training(self, peer: Peer, envelope: Envelope) -> Welcome:
        message: consumer.StartTraining = envelope.message
        self.ledger.start_training(
            incarnation=peer.hello.incarnation, step=message.step, stream=message.stream, unix_s=time.time()
        )
        self._evals = {
            key: waiting for key, waiting in self._evals.items() if key[0] == peer.route
        }  # nobody else's are asked for
        for rank in self.peers.of(Role.TRAINER):
            if rank.hello.incarnation < peer.hello.incarnation:
                self.peers.forget(rank.hello.name)
        log.info("training starts at step %d, incarnation %d", message.step, peer.hello.incarnation)
        return Welcome(
            job=self._config.name, step=self.ledger.trainer_step, newest_version=self.ledger.versions.newest
        )

    def _alloc_version(self, peer: Peer, envelope: Envelope) -> consumer.VersionGranted:
        return consumer.VersionGranted(
            version=self.ledger.alloc_version(incarnation=peer.hello.incarnation, step=envelope.message.step)
        )

    def _adopt_version(self, peer: Peer, envelope: Envelope) -> Ok:
        message: consumer.AdoptVersion = envelope.message
        self.ledger.adopt_version(
            incarnation=peer.hello.incarnation, version=message.version, step=message.step
        )
        return Ok()

    def _complete_step(self, peer: Peer, envelope: Envelope) -> Ok:
        self.ledger.complete_step(incarnation=peer.hello.incarnation, step=envelope.message.step)
        return Ok()

    def _set_max_staleness(self, peer: Peer, envelope: Envelope) -> Ok:
        bound = envelope.message.max_staleness
        self.ledger.set_max_staleness(incarnation=peer.hello.incarnation, max_staleness=bound)
        log.info("max_staleness is %d for tickets from now on", bound)
        return Ok()

    def _commit_step(self, peer: Peer, envelope: Envelope) -> Ok:
        message: consumer.CommitStep = envelope.message
        self.ledger.commit(
            incarnation=peer.hello.incarnation, step=message.step, oldest_kept_step=message.oldest_kept_step
        )
        return Ok()

    def _stream_state(self, peer: Peer, envelope: Envelope) -> consumer.StreamState:
        return consumer.StreamState(stream=self.ledger.stream_state(step=envelope.message.step))

    def _request_eval(self, peer: Peer, envelope: Envelope) -> consumer.EvalResult | None:
        message: consumer.RequestEval = envelope.message
        if 0 < self._num_eval_prompts < message.num_prompts:
            reason = f"the task has {self._num_eval_prompts} held-out prompts, {message.num_prompts} were asked for: lower eval.num_prompts"
            raise RefusedError("num_prompts", reason)
        result = self.ledger.request_eval(
            eval_id=message.eval_id, num_prompts=message.num_prompts, min_version=message.min_version
        )
        if result is None:
            self._evals[peer.route, message.eval_id] = (envelope.rid, message)
        return result

    def _close_admission(self, peer: Peer, envelope: Envelope) -> Ok:
        self.ledger.close(envelope.message.reason)
        log.info("admission closed: %s", envelope.message.reason)
        return Ok()

    # --- an operator ---

    async def _drop(self, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /control/drop {"tickets": [17, 23]}`: poison them all or, with the reason, none."""
        ticket_ids = body.get("tickets")
        if (
            not isinstance(ticket_ids, list)
            or not ticket_ids
            or not all(type(ticket_id) is int for ticket_id in ticket_ids)
        ):
            raise UserError('want {"tickets": [ID, ...]}')
        refusal = ""
        with self._ending_on_error():
            try:
                self.ledger.poison(ticket_ids)
            except RefusedError as error:
                refusal = "ticket {} {}".format(*error.args)
        if refusal:
            raise UserError(refusal)
        log.warning("an operator dropped tickets %s", ticket_ids)
        self._turn_soon()
        durable = asyncio.Event()
        self.ledger.store.when_durable(durable.set)
        await durable.wait()
        return {"dropped": ticket_ids}

    # --- messages out ---

    def _heartbeat_ack(self) -> producer.HeartbeatAck:
        ledger = self.ledger
        return producer.HeartbeatAck(
            step=ledger.trainer_step, newest_version=ledger.versions.newest, trouble=ledger.store.health
        )

    def _turn_soon(self) -> None:
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Sends what the messages since the last turn have brought about."""
        self._turn_is_due = False
        if self._over.done():
            return
        with self._ending_on_error():
            if self.ledger.fatal:
                raise ArealError(self.ledger.fatal)
            if self.ledger.last_rejection != self._rejection_seen:
                self._rejection_seen = self.ledger.last_rejection
                log.warning("group rejected: %s", self._rejection_seen)
            self._send_acks()
            self._send_leases()
            self._send_aborts()
            self._answer_fetches()
            self._answer_evals()
            if self._servers_changed:
                self._send_directory()

    def _send_acks(self) -> None:
        for route, by_lease in self._acks.items():
            acks = [
                producer.SampleAck(lease_id=lease_id, sample_indices=indices, refused=refused)
                for (lease_id, refused), indices in by_lease.items()
            ]
            self._send_when_durable(route, producer.SampleAcks(acks=acks), rid=0)
        self._acks = {}

    def _tick(self) -> None:
        """What happens without a message: leases run out, servers fall silent, series are refreshed."""
        self._ticking = self._loop.call_later(_TICK_S, self._tick)
        with self._ending_on_error():
            if trouble := self.ledger.store.health:
                self._runtime.unready(trouble)
            else:
                self._runtime.ready()
            for name in self.ledger.expire(now_s=self._loop.time()):
                log.warning(
                    "%s has been silent for %g s: its samples are leased again",
                    name,
                    self._config.buffer.lease_timeout_s,
                )
                self.peers.forget(name)
            self._servers_changed = True
            self._turn_soon()
            self._series.update(
                self.ledger, self.peers, self._counters() | {"bad_frames": self._listener.num_bad_frames}
            )

    def _send_leases(self) -> None:
        for name, leases in self.ledger.grant(now_s=self._loop.time()).items():
            peer = self.peers.named(name)
            if peer is None or not self._listener.send(peer.route, producer.Leases(leases=leases)):
                self.ledger.return_leases(name, [lease.lease_id for lease in leases])
                self.ledger.book.undeliverable(name)

    def _send_aborts(self) -> None:
        for name, lease_ids in self.ledger.take_aborts().items():
            peer = self.peers.named(name)
            if peer is not None:
                self._listener.send(
                    peer.route,
                    producer.AbortLeases(leases=lease_ids, reason="nothing more is expected of them"),
                )

    def _answer_fetches(self) -> None:
        if self._num_recorded_seen == self.ledger.steps.num_recorded:
            return
        self._num_recorded_seen = self.ledger.steps.num_recorded
        for (route, step, position), rid in list(self._fetches.items()):
            if (
                step <= self.ledger.committed_step or self.peers.at(route) is None
            ):  # whoever asked is gone, or has gone on without it
                del self._fetches[route, step, position]
            elif (group := self.ledger.fetch(step=step, position=position)) is not None:
                del self._fetches[route, step, position]
                self._send_when_durable(route, group, rid=rid)

    def _answer_evals(self) -> None:
        for (route, eval_id), (rid, message) in list(self._evals.items()):
            if self.peers.at(route) is None:
                del self._evals[route, eval_id]
                continue
            result = self.ledger.request_eval(
                eval_id=eval_id, num_prompts=message.num_prompts, min_version=message.min_version
            )
            if result is not None:
                del self._evals[route, eval_id]
                self._listener.send(route, result, rid=rid)

    def _send_directory(self) -> None:
        """To every rank, whenever it has changed."""
        self._servers_changed = False
        servers = self.ledger.book.servers
        entries = [
            consumer.ServerEntry(
                name=peer.hello.name,
                incarnation=peer.hello.incarnation,
                weights_address=peer.hello.weights_address,
                device=peer.hello.device,
                state=servers[peer.hello.name].state.value,
                weights_version=servers[peer.hello.name].weights_version,
            )
            for peer in self.peers.of(Role.ROLLOUT)
        ]
        if entries != self._directory.servers:
            self._directory = consumer.Directory(servers=entries)
            for rank in self.peers.of(Role.TRAINER):
                self._listener.send(rank.route, self._directory)

    def _end(self, error: Exception) -> None:
        """The job cannot go on: everybody is told, and `serve` raises."""
        if self._over.done():
            return
        self._over.set_exception(error)
        self._wake.set()
        failed = JobFailed(reason=str(error) or type(error).__name__)
        for role in Role:
            for peer in self.peers.of(role):
                self._listener.send(peer.route, failed)
        for (route, _, _), rid in self._fetches.items():
            self._listener.send(route, failed, rid=rid)
        for (route, _), (rid, _) in self._evals.items():
            self._listener.send(route, failed, rid=rid)
