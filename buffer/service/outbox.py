"""The outbox: sends all messages of the buffer, at once, when the ledger is durable, or with the next flush.

Replies are sent at once, or when the request's changes are durable. `flush` sends the consequences of changes
in the ledger: acknowledgements, leases, aborts, and groups and evaluations that a trainer waits for. The
daemon calls it once per burst of messages.

A buffer that is restarted after a crash has only what the ledger has on disk. So a message on which a peer
may rely after that (a version, a recorded group, an acknowledgement) is sent only when its rows are durable.
Leases are sent earlier: the restarted buffer aborts a lease that it does not have. Left out: limits on the
queues, because credit bounds the messages of servers, and a rank waits only for the groups of one step and
the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from areal_like.errors import ArealError
from areal_like.wire.channel import Listener
from areal_like.wire.limits import shortened
from areal_like.wire.messages import consumer, producer
from areal_like.wire.messages.hello import JobFailed, JobFinished, Role
from areal_like.wire.records import Record
from buffer.ledger.ledger import Ledger
from buffer.service.peers import ConnectedPeers, Peer
from buffer.tickets import Journal, Verdict

log = logging.getLogger(__name__)


class Outbox:
    """OPEN -> close() -> CLOSED (sends nothing more)."""

    def __init__(
        self,
        ledger: Ledger,
        peers: ConnectedPeers,
        listener: Listener,
        *,
        on_error: Callable[[Exception], None],
    ) -> None:
        """`on_error` is called for routes that cannot be read from disk."""
        self._ledger = ledger
        self._peers = peers
        self._listener = listener
        self._on_error = on_error
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="routes")
        self._acks: dict[bytes, dict[tuple[int, str], dict[int, None]]] = {}
        """Indices of samples that arrived since the last flush, by route and (lease, reason of a refusal)."""
        self._fetches: dict[tuple[bytes, int, int], int] = {}
        """Request ids of fetches whose group is not recorded yet, by (route, step, position)."""
        self._evals: dict[tuple[bytes, int, str], tuple[int, dict[str, Any]]] = {}
        """(request id, fields of the request) of running evaluations, by (route, eval id, set)."""
        self._num_recorded_seen = 0
        self._rejection_seen = ""
        self._directory = consumer.Directory(servers=[])
        self._servers_changed = False
        self._is_closed = False

    @property
    def num_fetches(self) -> int:
        """Number of fetches that wait for their group."""
        return len(self._fetches)

    def close(self) -> None:
        """Stops sending: the socket is about to be closed."""
        self._is_closed = True
        self._reading.shutdown(wait=False, cancel_futures=True)

    def send(self, route: bytes, message: Any, *, rid: int = 0) -> bool:
        """Sends at once. False if the peer cannot be reached."""
        return not self._is_closed and self._listener.send(route, message, rid=rid)

    def send_when_durable(self, route: bytes, reply: Any, *, rid: int) -> None:
        """Sends once everything written so far is durable, and routes that are only on disk are read."""

        def send() -> None:
            self.send(route, reply, rid=rid)

        store = self._ledger.state.store
        if isinstance(reply, consumer.Group) and any(record.lacks_routes for record in reply.records):
            read = store.routes_reader(reply.records)
            store.when_durable(lambda: self._send_with_routes(route, reply, read, rid=rid))
        else:
            store.when_durable(send)

    def _send_with_routes(
        self, route: bytes, group: consumer.Group, read: Callable[[], list[Record]], *, rid: int
    ) -> None:
        """Sends a group when a thread has read its routes."""

        def send(reading: asyncio.Future[list[Record]]) -> None:
            if reading.cancelled() or self._is_closed:
                return
            if not isinstance(error := reading.exception(), Exception):
                self.send(route, dataclasses.replace(group, records=reading.result()), rid=rid)
            # Otherwise they were released meanwhile, and no rank waits for them.
            elif self._ledger.state.steps.has(group.step, group.ticket_id):
                self._on_error(error)

        if not self._is_closed:
            asyncio.get_running_loop().run_in_executor(self._reading, read).add_done_callback(send)

    def send_journal(
        self, route: bytes, read: Callable[[], tuple[Journal | None, list[bytes]]], *, rid: int
    ) -> None:
        """Sends a part of a session's journal, when it is durable."""

        def send() -> None:
            if self._is_closed:
                return
            journal, entries = read()
            reply = producer.SessionEntries(
                session="" if journal is None else journal.session,
                num_entries=0 if journal is None else journal.num_entries,
                entries=[np.frombuffer(data, np.uint8) for data in entries],
            )
            self.send(route, reply, rid=rid)

        self._ledger.state.store.when_durable(send)

    def acknowledge(
        self, peer: Peer, sample: producer.SampleDone | producer.SampleFailed, verdict: Verdict
    ) -> None:
        """Acknowledges a sample with the next flush, when it is durable."""
        by_lease = self._acks.setdefault(peer.route, {})
        by_lease.setdefault((sample.lease_id, verdict.refusal), {})[sample.sample_index] = None

    def add_fetch(self, route: bytes, fetch: consumer.Fetch, *, rid: int) -> None:
        """Sends the group when it is recorded."""
        self._fetches[route, fetch.step, fetch.position] = rid

    def add_eval(self, route: bytes, request: consumer.RequestEval, *, rid: int) -> None:
        """Sends the result of an evaluation when it is done."""
        self._evals[route, request.eval_id, request.eval_set] = (rid, dataclasses.asdict(request))

    def keep_evals_of(self, route: bytes) -> None:
        """Removes the evaluations for which other routes wait: they belong to an older trainer."""
        self._evals = {key: waiting for key, waiting in self._evals.items() if key[0] == route}

    def servers_changed(self) -> None:
        """Makes the next flush send the directory of servers, if it differs from the last one sent."""
        self._servers_changed = True

    def send_directory_to(self, peer: Peer) -> None:
        """Sends the directory of servers to a rank that has just registered."""
        self.send(peer.route, self._directory)

    def flush(self, *, now_s: float) -> None:
        """Sends the consequences of all messages since the last flush.

        Raises ArealError if the job has failed.
        """
        for notice in self._ledger.take_notices():
            log.warning("%s", notice)
        if self._ledger.state.failure_reason:
            raise ArealError(self._ledger.state.failure_reason)
        if self._ledger.intake.last_rejection != self._rejection_seen:
            self._rejection_seen = self._ledger.intake.last_rejection
            log.warning("group rejected: %s", self._rejection_seen)
        self._send_acks()
        self._send_leases(now_s=now_s)
        self._send_aborts()
        self._answer_fetches()
        self._answer_evals()
        if self._servers_changed:
            self._servers_changed = False
            self._send_directory()

    def fail(self, reason: str) -> None:
        """Sends the reason of a failed job to every peer, and as the reply to every waiting request."""
        failed = JobFailed(reason=shortened(reason))
        for role in Role:
            for peer in self._peers.of(role):
                self.send(peer.route, failed)
        for (route, _, _), rid in self._fetches.items():
            self.send(route, failed, rid=rid)
        for (route, _, _), (rid, _) in self._evals.items():
            self.send(route, failed, rid=rid)

    def finish(self) -> None:
        """Tells every peer that the run is finished."""
        for role in Role:
            for peer in self._peers.of(role):
                self.send(peer.route, JobFinished())

    def _send_acks(self) -> None:
        for route, by_lease in self._acks.items():
            # A server may have repeated a sample any number of times: each index is named once.
            acks = (
                producer.SampleAck(lease_id=lease_id, sample_indices=list(indices), refused=refused)
                for (lease_id, refused), indices in by_lease.items()
            )
            for message in producer.SampleAcks.batches(acks):
                self.send_when_durable(route, message, rid=0)
        self._acks = {}

    def _send_leases(self, *, now_s: float) -> None:
        for name, leases in self._ledger.dispatcher.grant(now_s=now_s).items():
            peer = self._peers.named(name)
            for message in producer.Leases.batches(leases):
                if peer is None or not self.send(peer.route, message):
                    undelivered = [lease.lease_id for lease in message.leases]
                    self._ledger.dispatcher.take_back_undelivered(name, undelivered)

    def _send_aborts(self) -> None:
        for name, lease_ids in self._ledger.state.leases.take_aborts().items():
            peer = self._peers.named(name)
            if peer is not None:
                reason = "these leases have ended: their samples are no longer needed"
                for message in producer.AbortLeases.batches(lease_ids, reason=reason):
                    self.send(peer.route, message)

    def _answer_fetches(self) -> None:
        if self._num_recorded_seen == self._ledger.state.steps.num_recorded:
            return
        self._num_recorded_seen = self._ledger.state.steps.num_recorded
        for (route, step, position), rid in list(self._fetches.items()):
            # No reply is needed: the rank has left, or the step was committed meanwhile.
            if step <= self._ledger.state.steps.committed or self._peers.at(route) is None:
                del self._fetches[route, step, position]
            elif (group := self._ledger.trainer.fetch(step=step, position=position)) is not None:
                del self._fetches[route, step, position]
                self.send_when_durable(route, group, rid=rid)

    def _answer_evals(self) -> None:
        for key, (rid, request) in list(self._evals.items()):
            route = key[0]
            if self._peers.at(route) is None:
                del self._evals[key]
            elif (result := self._ledger.trainer.request_eval(**request)) is not None:
                del self._evals[key]
                self.send_when_durable(route, result, rid=rid)

    def _send_directory(self) -> None:
        """Sends the directory of servers to every rank if it has changed."""
        servers = self._ledger.servers
        entries = [
            consumer.ServerEntry(
                name=peer.hello.name,
                incarnation=peer.hello.incarnation,
                weights_address=peer.hello.weights_address,
                device=peer.hello.device,
                state=server.state.value,
                weights_version=server.weights_version,
                public_key=peer.key.public if peer.key is not None else "",
            )
            for peer in self._peers.of(Role.ROLLOUT)
            if (server := servers.get(peer.hello.name)) is not None
        ]
        if entries != self._directory.servers:
            self._directory = consumer.Directory(servers=entries)
            for rank in self._peers.of(Role.TRAINER):
                self.send_directory_to(rank)
