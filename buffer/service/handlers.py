"""Handles the messages of registered peers: each is an operation on the ledger, and most have a reply."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from areal_like.errors import RefusedError
from areal_like.runtime.logs import follow_level
from areal_like.spans.recorder import unix_now
from areal_like.wire.channel import Envelope
from areal_like.wire.limits import check_lengths
from areal_like.wire.messages import consumer, producer
from areal_like.wire.messages.hello import (
    Goodbye,
    Hello,
    HelloRequired,
    JobFailed,
    Ok,
    Role,
    StillAlive,
    Welcome,
)
from areal_like.wire.pump import log_at_powers_of_2
from areal_like.wire.routes import RoutesShape
from buffer.ledger.ledger import Ledger
from buffer.service.outbox import Outbox
from buffer.service.peers import ConnectedPeers, Peer, PeerKeys
from buffer.service.registration import Newcomer, Registration
from buffer.tables.lease_table import Server
from buffer.tickets import Verdict

log = logging.getLogger(__name__)

NEEDS_DURABILITY = (
    consumer.StartTraining,
    consumer.AllocVersion,
    consumer.AdoptVersion,
    consumer.Fetch,
    consumer.CompleteStep,
    consumer.SetMaxStaleness,
    consumer.CommitStep,
    consumer.CloseAdmission,
    consumer.FinishRun,
    producer.AppendSession,
    producer.ForgetSession,
    Goodbye,
)
"""Requests whose reply waits until the ledger's rows are durable, so that a restarted buffer can honor it."""


class Handlers:
    """Passes messages to the ledger and returns replies; None: no reply, or the outbox sends it later."""

    def __init__(
        self,
        ledger: Ledger,
        peers: ConnectedPeers,
        outbox: Outbox,
        *,
        job: str,
        clock: Callable[[], float],
        run_counters: Callable[[], consumer.RunCounters],
        on_finished: Callable[[], None],
        keys: PeerKeys,
    ) -> None:
        """`on_finished`: called when the end of the run is durable."""
        self._ledger = ledger
        self._peers = peers
        self._outbox = outbox
        self._clock = clock
        self._run_counters = run_counters
        self._on_finished = on_finished
        self._keys = keys
        self.registration = Registration(ledger, peers, outbox, keys, job=job, clock=clock)
        self.num_unregistered_frames = 0
        """Number of messages of peers that have not registered; the reply to each was HelloRequired."""
        self.num_absurd_stats = 0
        """Number of messages of servers with totals that cannot be true."""

    def may_send(self, route: bytes, kind: type) -> bool:
        """False if a message is not to be decoded, because its sender has not registered."""
        if kind is Hello or self._peers.at(route) is not None:
            return True
        self._require_hello(route)
        return False

    def _require_hello(self, route: bytes) -> None:
        self.num_unregistered_frames += 1
        self._outbox.send(route, HelloRequired())

    def malformed(self, route: bytes, what: str) -> None:
        """Handles a frame that cannot be decoded: a registered server does not send any."""
        peer = self._peers.at(route)
        if peer is not None and peer.hello.role is Role.ROLLOUT:
            self._ledger.failed_samples.lied(peer.hello.name, f"a malformed message ({what})")

    def handle(self, envelope: Envelope) -> Any:
        """The reply to a message that `may_send` accepted, or None.

        Raises RefusedError, RunFinishedError or StaleIncarnationError.
        """
        message = envelope.message
        check_lengths(message)
        if isinstance(message, Hello):
            self._keys.check_hello(message, envelope.key)
            newcomer = Newcomer(route=envelope.peer, rid=envelope.rid, hello=message, key=envelope.key)
            self.registration.hello(newcomer)
            return None
        peer = self._peers.at(envelope.peer)
        assert peer is not None
        self._check_key(peer, envelope)
        peer.last_heard_s = self._clock()
        self.registration.heard(envelope.peer)
        if self._ledger.state.failure_reason:
            return JobFailed(reason=self._ledger.state.failure_reason)
        if peer.hello.role is Role.TRAINER:
            return self._from_rank(peer, message, rid=envelope.rid)
        server = self._ledger.servers.get(peer.hello.name)
        if server is None:  # whatever removed it, a message of its process must not end the job
            self._peers.remove(peer.hello.name)
            self._require_hello(envelope.peer)
            return None
        if server.health.is_refused:
            assert server.health.quarantine is not None
            raise RefusedError("conduct", server.health.quarantine.reason)
        return self._from_server(peer, server, message, rid=envelope.rid)

    def _check_key(self, peer: Peer, envelope: Envelope) -> None:
        self._keys.check_message(peer, envelope.key)
        if peer.key != envelope.key:  # the peer has renewed it
            peer.key = envelope.key
            self._outbox.servers_changed()

    def _heartbeat_ack(self, *, sent_s: float, progress: float = 0.0) -> producer.HeartbeatAck:
        ledger = self._ledger
        return producer.HeartbeatAck(
            step=ledger.state.steps.current,
            newest_version=ledger.state.versions.newest,
            trouble=ledger.state.store.write_blocked_reason,
            progress=progress,
            log_level=ledger.state.live.log_level,
            echo_s=sent_s,
            unix_s=unix_now() if ledger.state.settings.shard.index == 0 else 0.0,
        )

    def _take_stats(self, peer: Peer, stats: Mapping[str, float]) -> None:
        if absurd := self._peers.take_stats(peer, stats, now_s=self._clock()):
            self.num_absurd_stats += 1
            log_at_powers_of_2(
                self.num_absurd_stats,
                "%s reports totals that cannot be true (%s): they are left out (%d so far)",
                peer.hello.name,
                absurd,
            )
            self._ledger.failed_samples.lied(peer.hello.name, f"totals that cannot be true ({absurd})")

    # --- rollout servers ---

    def _from_server(self, peer: Peer, server: Server, message: Any, *, rid: int) -> Any:
        name = peer.hello.name
        match message:
            case producer.ServerHeartbeat():
                if (server.state, server.weights_version) != (message.state, message.weights_version):
                    self._outbox.servers_changed()
                self._ledger.dispatcher.heartbeat(name, message, now_s=self._clock())
                peer.state, peer.waits = message.state.value, message.waits
                self._take_stats(peer, message.stats)
                return self._heartbeat_ack(sent_s=message.sent_s)
            case producer.Samples():
                if not self._ledger.intake.is_full:  # else the server sends them again
                    self._samples(peer, message.samples)
            case producer.SampleFailed():
                log.warning(
                    "%s could not make sample %d of ticket %d (%s): %s",
                    name,
                    message.sample_index,
                    message.ticket_id,
                    message.kind.value,
                    message.error,
                )
                self._outbox.acknowledge(peer, message, self._ledger.intake.sample_failed(name, message))
            case producer.ReturnLeases():
                log.info("%s returned %d leases: %s", name, len(message.leases), message.reason)
                self._ledger.dispatcher.return_leases(name, message.leases)
            case producer.AppendSession():
                return producer.SessionStored(refused=self._ledger.journals.append(name, message))
            case producer.ForgetSession():
                return producer.SessionStored(refused=self._ledger.journals.forget(name, message))
            case producer.ReadSession():
                self._outbox.send_journal(peer.route, self._ledger.journals.reader(name, message), rid=rid)
            case producer.FindSession():
                return self._place_of(message)
            case StillAlive():
                pass  # only its arrival matters
            case Goodbye():
                if message.stats:
                    self._take_stats(peer, message.stats)
                self.registration.remove(name)
                log.info("%s left", name)
                return Ok()
            case _:
                raise _not_for(peer, message)
        return None

    def _place_of(self, message: producer.FindSession) -> producer.SessionPlace:
        can_continue, server = self._ledger.journals.find(message)
        holder = self._peers.named(server) if server else None
        url = "" if holder is None else holder.hello.sessions_url
        return producer.SessionPlace(is_over=not can_continue, server=server, url=url)

    def _samples(self, peer: Peer, samples: list[producer.SampleDone]) -> None:
        name = peer.hello.name
        for sample, verdict in zip(samples, self._ledger.intake.samples_done(name, samples), strict=True):
            if verdict in (Verdict.UNKNOWN_VERSION, Verdict.INVALID):
                log.warning(
                    "sample %d of ticket %d by %s refused: %s",
                    sample.sample_index,
                    sample.ticket_id,
                    name,
                    verdict.value,
                )
            self._outbox.acknowledge(peer, sample, verdict)

    # --- trainer ---

    def _from_rank(self, peer: Peer, message: Any, *, rid: int) -> Any:
        match message:
            case consumer.TrainerHeartbeat():
                peer.state, peer.waits = message.state, message.waits
                self._take_stats(peer, message.stats)
                ack = self._heartbeat_ack(sent_s=message.sent_s, progress=self._peers.total("progress"))
                # The trainer's time limits must not expire while it cannot get any groups.
                paused = "the run is paused by an operator" if self._ledger.state.holds.is_paused else ""
                trouble = ack.trouble or paused or self._ledger.failed_samples.task_trouble
                return dataclasses.replace(ack, trouble=trouble)
            case consumer.Fetch():
                self._ledger.trainer.refuse_older_trainer(peer.hello.incarnation)
                group = self._ledger.trainer.fetch(step=message.step, position=message.position)
                if group is None:
                    self._outbox.add_fetch(peer.route, message, rid=rid)
                return group
            case StillAlive():
                return None
            case Goodbye():
                self._peers.remove(peer.hello.name)
                return Ok()
            case _ if peer.hello.rank != 0 and type(message) in consumer.TO_BUFFER:
                raise RefusedError("rank", f"only rank 0 may send {type(message).__name__}")
            case _:
                return self._from_rank_0(peer, message, rid=rid)

    def _from_rank_0(self, peer: Peer, message: Any, *, rid: int) -> Any:
        trainer, incarnation = self._ledger.trainer, peer.hello.incarnation
        match message:
            case consumer.StartTraining():
                return self._start_training(peer, message)
            case consumer.GetStepSettings():
                return trainer.settings_of(incarnation=incarnation, step=message.step)
            case consumer.AllocVersion():
                version = trainer.alloc_version(incarnation=incarnation, step=message.step)
                return consumer.VersionGranted(version=version)
            case consumer.AdoptVersion():
                trainer.adopt_version(incarnation=incarnation, version=message.version, step=message.step)
            case consumer.CompleteStep():
                trainer.complete_step(incarnation=incarnation, step=message.step)
            case consumer.SetMaxStaleness():
                trainer.set_max_staleness(incarnation=incarnation, max_staleness=message.max_staleness)
                log.info("max_staleness of new tickets is %d from now on", message.max_staleness)
            case consumer.CommitStep():
                trainer.commit(
                    incarnation=incarnation, step=message.step, oldest_kept_step=message.oldest_kept_step
                )
            case consumer.GetStreamState():
                return consumer.StreamState(stream=trainer.stream_state(step=message.step))
            case consumer.RequestEval():
                self._check_eval_set(message)
                result = trainer.request_eval(**dataclasses.asdict(message))
                if result is None:
                    self._outbox.add_eval(peer.route, message, rid=rid)
                return result
            case consumer.CloseAdmission():
                trainer.close(message.reason)
                log.info("admission closed: %s", message.reason)
            case consumer.FinishRun():
                trainer.finish(incarnation=incarnation)
                self._ledger.state.store.when_durable(self._on_finished)
            case consumer.GetRunCounters():
                return self._run_counters()
            case _:
                raise _not_for(peer, message)
        return Ok()

    def _start_training(self, peer: Peer, message: consumer.StartTraining) -> Welcome:
        incarnation = peer.hello.incarnation
        self._ledger.trainer.start_training(
            incarnation=incarnation,
            step=message.step,
            stream=message.stream,
            settings=message.settings,
            routes_shape=RoutesShape(*message.routes_shape) if message.routes_shape else None,
            unix_s=time.time(),
        )
        follow_level(self._ledger.state.live.log_level)
        self._outbox.keep_evals_of(peer.route)
        for rank in self._peers.of(Role.TRAINER):
            if rank.hello.incarnation < incarnation:
                self._peers.remove(rank.hello.name)
        log.info("training starts at step %d, incarnation %d", message.step, incarnation)
        return self.registration.welcome(incarnation)

    def _check_eval_set(self, request: consumer.RequestEval) -> None:
        """Raises RefusedError for a set that the servers do not have, or that has fewer prompts."""
        sets = self.registration.eval_sets
        if not sets:
            return
        if request.eval_set not in sets:
            raise RefusedError("eval_set", f"the servers have no set of this name, but {', '.join(sets)}")
        if sets[request.eval_set] < request.num_prompts:
            reason = (
                f"the task of the set {request.eval_set} has {sets[request.eval_set]} held-out prompts, "
                f"{request.num_prompts} were requested: lower num_prompts"
            )
            raise RefusedError("num_prompts", reason)


def _not_for(peer: Peer, message: Any) -> RefusedError:
    kind = type(message).__name__
    return RefusedError("message", f"{kind} is not for a {peer.hello.role.value} to send")
