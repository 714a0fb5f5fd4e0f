"""Handlers of peers' messages: a table from role and message type to the method that handles the message."""

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
from buffer.ledger.ledger import Ledger
from buffer.service.name_claims import Newcomer
from buffer.service.outbox import Outbox
from buffer.service.peer_keys import PeerKeys
from buffer.service.peers import ConnectedPeers, Peer
from buffer.service.registration import Registration
from buffer.tickets import Verdict

log = logging.getLogger(__name__)

Handler = Callable[[Peer, Envelope], Any]

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
        """Messages of peers that have not registered; each was answered with HelloRequired."""
        self.num_absurd_stats = 0
        """Messages of servers with totals that cannot be true."""
        self._table: dict[Role, dict[type, Handler]] = {
            Role.ROLLOUT: {
                producer.ServerHeartbeat: self._server_heartbeat,
                producer.Samples: self._samples,
                producer.SampleFailed: self._sample_failed,
                producer.ReturnLeases: self._return_leases,
                StillAlive: _nothing,
                Goodbye: self._server_goodbye,
            },
            Role.TRAINER: {
                consumer.TrainerHeartbeat: self._trainer_heartbeat,
                consumer.Fetch: self._fetch,
                consumer.StartTraining: _rank0_only(self._start_training),
                consumer.GetStepSettings: _rank0_only(self._step_settings),
                consumer.AllocVersion: _rank0_only(self._alloc_version),
                consumer.AdoptVersion: _rank0_only(self._adopt_version),
                consumer.CompleteStep: _rank0_only(self._complete_step),
                consumer.SetMaxStaleness: _rank0_only(self._set_max_staleness),
                consumer.CommitStep: _rank0_only(self._commit_step),
                consumer.GetStreamState: _rank0_only(self._stream_state),
                consumer.RequestEval: _rank0_only(self._request_eval),
                consumer.CloseAdmission: _rank0_only(self._close_admission),
                consumer.FinishRun: _rank0_only(self._finish_run),
                consumer.GetRunCounters: _rank0_only(self._get_run_counters),
                StillAlive: _nothing,
                Goodbye: self._trainer_goodbye,
            },
        }

    def may_send(self, route: bytes, kind: type) -> bool:
        """False if a message is not to be decoded, because its sender has not registered."""
        if kind is Hello or self._peers.at(route) is not None:
            return True
        self.num_unregistered_frames += 1
        self._outbox.send(route, HelloRequired())
        return False

    def malformed(self, route: bytes, what: str) -> None:
        """A frame that cannot be decoded: a registered server does not send any."""
        peer = self._peers.at(route)
        if peer is not None and peer.hello.role is Role.ROLLOUT:
            self._ledger.failed_samples.lied(peer.hello.name, f"a malformed message ({what})")

    def handle(self, envelope: Envelope) -> Any:
        """The reply to a message that `may_send` let pass, or None.

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
        role = peer.hello.role
        server = self._ledger.servers.get(peer.hello.name)
        if server is not None and server.health.is_refused:
            assert server.health.quarantine is not None
            raise RefusedError("conduct", server.health.quarantine.reason)
        handler = self._table[role].get(type(message))
        if handler is None:
            raise RefusedError("message", f"{type(message).__name__} is not for a {role.value} to send")
        return handler(peer, envelope)

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

    def _server_heartbeat(self, peer: Peer, envelope: Envelope) -> producer.HeartbeatAck:
        beat: producer.ServerHeartbeat = envelope.message
        self._ledger.dispatcher.heartbeat(peer.hello.name, beat, now_s=self._clock())
        self._outbox.servers_changed()
        peer.state, peer.waits = beat.state.value, beat.waits
        self._take_stats(peer, beat.stats)
        return self._heartbeat_ack(sent_s=beat.sent_s)

    def _samples(self, peer: Peer, envelope: Envelope) -> None:
        name = peer.hello.name
        samples: list[producer.SampleDone] = envelope.message.samples
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

    def _sample_failed(self, peer: Peer, envelope: Envelope) -> None:
        failed: producer.SampleFailed = envelope.message
        log.warning(
            "%s could not make sample %d of ticket %d (%s): %s",
            peer.hello.name,
            failed.sample_index,
            failed.ticket_id,
            failed.kind.value,
            failed.error,
        )
        self._outbox.acknowledge(peer, failed, self._ledger.intake.sample_failed(peer.hello.name, failed))

    def _return_leases(self, peer: Peer, envelope: Envelope) -> None:
        message: producer.ReturnLeases = envelope.message
        log.info("%s returned %d leases: %s", peer.hello.name, len(message.leases), message.reason)
        self._ledger.dispatcher.return_leases(peer.hello.name, message.leases)

    def _server_goodbye(self, peer: Peer, envelope: Envelope) -> Ok:
        if stats := envelope.message.stats:
            self._take_stats(peer, stats)
        self._ledger.dispatcher.remove_server(peer.hello.name)
        self._outbox.servers_changed()
        self._peers.remove(peer.hello.name)
        log.info("%s left", peer.hello.name)
        return Ok()

    # --- trainer ---

    def _trainer_heartbeat(self, peer: Peer, envelope: Envelope) -> producer.HeartbeatAck:
        beat: consumer.TrainerHeartbeat = envelope.message
        peer.state, peer.waits, peer.step = beat.state, beat.waits, beat.step
        self._take_stats(peer, beat.stats)
        ack = self._heartbeat_ack(sent_s=beat.sent_s, progress=self._peers.total("progress"))
        if ack.trouble:
            return ack
        # Its limits of time must not run out.
        paused = "the run is paused by an operator" if self._ledger.state.holds.is_paused else ""
        return dataclasses.replace(ack, trouble=paused or self._ledger.failed_samples.task_trouble)

    def _trainer_goodbye(self, peer: Peer, envelope: Envelope) -> Ok:
        self._peers.remove(peer.hello.name)
        return Ok()

    def _fetch(self, peer: Peer, envelope: Envelope) -> consumer.Group | None:
        message: consumer.Fetch = envelope.message
        self._ledger.trainer.refuse_older_trainer(peer.hello.incarnation)
        group = self._ledger.trainer.fetch(step=message.step, position=message.position)
        if group is None:
            self._outbox.add_fetch(peer.route, message, rid=envelope.rid)
        return group

    def _start_training(self, peer: Peer, envelope: Envelope) -> Welcome:
        message: consumer.StartTraining = envelope.message
        incarnation = peer.hello.incarnation
        self._ledger.trainer.start_training(
            incarnation=incarnation,
            step=message.step,
            stream=message.stream,
            settings=message.settings,
            unix_s=time.time(),
        )
        follow_level(self._ledger.state.live.log_level)
        self._outbox.keep_evals_of(peer.route)
        for rank in self._peers.of(Role.TRAINER):
            if rank.hello.incarnation < incarnation:
                self._peers.remove(rank.hello.name)
        log.info("training starts at step %d, incarnation %d", message.step, incarnation)
        return self.registration.welcome(incarnation)

    def _step_settings(self, peer: Peer, envelope: Envelope) -> consumer.StepSettings:
        return self._ledger.trainer.settings_of(
            incarnation=peer.hello.incarnation, step=envelope.message.step
        )

    def _alloc_version(self, peer: Peer, envelope: Envelope) -> consumer.VersionGranted:
        version = self._ledger.trainer.alloc_version(
            incarnation=peer.hello.incarnation, step=envelope.message.step
        )
        return consumer.VersionGranted(version=version)

    def _adopt_version(self, peer: Peer, envelope: Envelope) -> Ok:
        message: consumer.AdoptVersion = envelope.message
        self._ledger.trainer.adopt_version(
            incarnation=peer.hello.incarnation, version=message.version, step=message.step
        )
        return Ok()

    def _complete_step(self, peer: Peer, envelope: Envelope) -> Ok:
        self._ledger.trainer.complete_step(incarnation=peer.hello.incarnation, step=envelope.message.step)
        return Ok()

    def _set_max_staleness(self, peer: Peer, envelope: Envelope) -> Ok:
        bound = envelope.message.max_staleness
        self._ledger.trainer.set_max_staleness(incarnation=peer.hello.incarnation, max_staleness=bound)
        log.info("max_staleness of new tickets is %d from now on", bound)
        return Ok()

    def _commit_step(self, peer: Peer, envelope: Envelope) -> Ok:
        message: consumer.CommitStep = envelope.message
        self._ledger.trainer.commit(
            incarnation=peer.hello.incarnation, step=message.step, oldest_kept_step=message.oldest_kept_step
        )
        return Ok()

    def _stream_state(self, peer: Peer, envelope: Envelope) -> consumer.StreamState:
        return consumer.StreamState(stream=self._ledger.trainer.stream_state(step=envelope.message.step))

    def _request_eval(self, peer: Peer, envelope: Envelope) -> consumer.EvalResult | None:
        message: consumer.RequestEval = envelope.message
        if sets := self.registration.eval_sets:
            if message.eval_set not in sets:
                raise RefusedError("eval_set", f"the servers have no set of this name, but {', '.join(sets)}")
            if sets[message.eval_set] < message.num_prompts:
                reason = (
                    f"the task of the set {message.eval_set} has {sets[message.eval_set]} held-out prompts, "
                    f"{message.num_prompts} were requested: lower num_prompts"
                )
                raise RefusedError("num_prompts", reason)
        result = self._ledger.trainer.request_eval(**dataclasses.asdict(message))
        if result is None:
            self._outbox.add_eval(peer.route, message, rid=envelope.rid)
        return result

    def _close_admission(self, peer: Peer, envelope: Envelope) -> Ok:
        self._ledger.trainer.close(envelope.message.reason)
        log.info("admission closed: %s", envelope.message.reason)
        return Ok()

    def _finish_run(self, peer: Peer, envelope: Envelope) -> Ok:
        self._ledger.trainer.finish(incarnation=peer.hello.incarnation)
        self._ledger.state.store.when_durable(self._on_finished)
        return Ok()

    def _get_run_counters(self, peer: Peer, envelope: Envelope) -> consumer.RunCounters:
        return self._run_counters()


def _nothing(peer: Peer, envelope: Envelope) -> None:
    """For a message whose arrival is all that counts."""


def _rank0_only(handler: Handler) -> Handler:
    def checked(peer: Peer, envelope: Envelope) -> Any:
        if peer.hello.rank != 0:
            raise RefusedError("rank", f"only rank 0 may send {type(envelope.message).__name__}")
        return handler(peer, envelope)

    return checked
