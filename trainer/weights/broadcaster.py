"""Pushes one snapshot of the weights from trainer rank 0 to the rollout servers, in three layers:

    Broadcaster          which servers share a process group, and what a failure means for the next push
    WeightGroupSession   one process group (NCCL or gloo): its rendezvous, its pushes, its end
    SendingEnd           the buckets of one push, in threads: the blocking part (senders.py, bucket_sender.py)

With `weights.senders` above 1 a session has one process group for each sender, all with the same engines, and
each sender broadcasts a share of the buckets. They are formed, used and left together: if one breaks, all of
them have failed.

`weights.topology` decides which servers share a process group. `shared`: all servers are in one group. One
broadcast serves all of them, and if one server breaks it, the push fails for all of them. `per_engine`: each
server has its own group. Rank 0 sends everything once per engine, and a failure affects only that server.

`weights.max_unavailable` bounds the number of servers that are updated at a time: shared groups are cut to
that size and updated one after the other, so that generation never stops completely where an engine has to
pause for an update.

A server that fails or misses its deadline backs off (`receivers.py`). If a shared broadcast breaks and every
receiver survives it, rank 0 cannot know which server failed. A server that was in `_ISOLATE_AFTER` such
pushes in a row therefore gets its own group, where the faulty server fails alone.

The members of a session never change, and a session is never repaired. After a failure its members leave it
and the next push forms a new session, because rank 0 cannot distinguish a rank that is still blocked in a
broken group from a rank that is not. DissolveGroup makes the survivors of a broken broadcast leave the group,
which ends their wait; the time until they have left is their recovery time.

So all members of a session have the version that was pushed in it last, which `weights.delta` needs. The
first push of a session sends all bytes. A later one sends what differs from the one before (`PushedBase`), if
each member has confirmed its digest and the senders still have its bytes.

Control messages run in the caller's event loop, the blocking broadcast in a thread of its session, so that a
session that hangs does not delay other sessions. Every wait for such a thread is bounded: a thread that never
returns is abandoned with its group.

On the wire a session's number is the field `epoch` of FormGroup, PushWeights and DissolveGroup (in the code,
an epoch is a pass over the prompts).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.runtime.threads import in_thread
from areal_like.runtime.waits import PendingWaits
from areal_like.security.keyring import Keyring
from areal_like.weights.buckets import Manifest
from areal_like.weights.integrity import BucketSums, weights_digest
from areal_like.weights.weight_group import WeightGroup, device_facts
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    ScoreTokens,
    TokenScores,
    WeightsFailed,
    WeightsOk,
)
from trainer.weights.backend import NcclTrial, choose_backend, refuse_mixed_nccl
from trainer.weights.bucket_sender import BucketSender, Traffic
from trainer.weights.receivers import (
    Receiver,
    ReceiverBackoff,
    ReceiverId,
    has_valid_key,
    receiver_id,
    split_groups,
)
from trainer.weights.senders import RemoteEnd, SenderLink, SendingEnd
from trainer.weights.snapshot import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

_FORM_S = 15.0
"""Longest rendezvous of servers that have just replied to AskAlive."""

_SCORE_S = 40.0
"""Longest wait for the log-probs of a few tokens; the server itself gives up after 30 s."""

_ISOLATE_AFTER = 2
"""Broken pushes in a row that a server survives before it gets its own group."""


@dataclass(kw_only=True)
class PushOutcome:
    """The servers that activated the new version, and the reasons why the other servers did not."""

    activated: dict[str, WeightsOk] = field(default_factory=dict)
    """Server name -> its reply."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server name (or `broadcast`) -> reason."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Name of each server that survived a broken broadcast -> seconds until it had left the group."""
    staging_s: float = 0.0
    """Time until every bucket was ready, before engines that load in place were asked to receive."""
    broadcast_s: float = 0.0
    """Longest time from the request to the end of the last broadcast, over the groups."""
    is_requested: bool = False
    """True if a server was asked to activate the version."""
    own_failure: str = ""
    """Why the trainer itself could not send, so that no server is at fault; empty if it could."""
    traffic: Traffic = field(default_factory=Traffic)
    """What was broadcast, over all groups."""


class Broadcaster:
    """Pushes snapshots to servers, one `push` at a time. For each group of servers a push does this:

        alive = await receiver.request(AskAlive(), Alive)   # each receiver; without those that do not respond
        session = WeightGroupSession(group=WeightGroup.create(backend=...), ...)    # an NCCL or gloo group
        await session.form()                                # FormGroup to each receiver, then the rendezvous
        await session.stage(snapshot, ...)                  # only if an engine loads in place
        await session.push(PushWeights(...), snapshot)      # each is ReadyToReceive; buckets, PushChecksums;
                                                            # each replies WeightsOk
        await session.dissolve()                            # only after a failure or a change of receivers

    The next push to the same servers reuses a session that has not failed.
    """

    def __init__(
        self,
        config: WeightsConfig,
        *,
        device: str,
        keyring: Keyring | None = None,
        waits: PendingWaits | None = None,
        links: Sequence[SenderLink] = (),
    ) -> None:
        """`device`, `keyring`: the trainer's. `waits`: lists the servers that have not replied. `links`: to
        the other senders, in the order of their numbers."""
        self._links = links
        self.num_senders = 1 + len(links)
        """Trainer ranks that send, each with a group of its own in every session."""
        self._waits = waits
        self._config = config
        self._keyring = keyring
        self._device = torch.device(device)
        # Not the trainer's identity (`Hello.process`): every server would see it in the names of groups.
        self._group_prefix = f"weights-{secrets.token_hex(8)}"
        self._receivers: dict[ReceiverId, Receiver] = {}
        self._directory: dict[ReceiverId, ServerEntry] = {}
        self._backoff = ReceiverBackoff()
        self._num_breaks_survived: Counter[ReceiverId] = Counter()
        """Server -> number of broken broadcasts in a row that it survived."""
        self._sessions: dict[frozenset[ReceiverId], WeightGroupSession] = {}
        self._last_warning = ""
        self._nccl = NcclTrial(config.backend)
        self.num_sessions = 0
        """Sessions formed so far, including failed attempts."""

    def eligible(self, servers: Iterable[ServerEntry]) -> list[ServerEntry]:
        """The servers of the directory to which a push would go now."""
        now_s = time.monotonic()
        return [
            entry
            for entry in servers
            if self._backoff.is_eligible(entry, now_s=now_s) and has_valid_key(entry, self._keyring)
        ]

    async def push(
        self, snapshot: Snapshot, *, version: int, step: int, servers: Sequence[ServerEntry]
    ) -> PushOutcome:
        """Sends an acquired snapshot to every eligible server of the directory and waits for activation.

        Failures of servers do not raise; their reasons are in the outcome. Raises ConfigError when
        `weights.host` is not an address of this machine, or the first session finds every port of
        `weights.port_range` taken. In later sessions taken ports are temporary, and the push is tried again.
        """
        self._directory = {receiver_id(entry): entry for entry in servers}
        self._backoff.keep_only(self._directory)
        targets = [receiver_id(entry) for entry in self.eligible(servers)]
        await self._drop_receivers_except(set(targets))
        groups = split_groups(
            targets,
            topology=self._config.topology,
            max_unavailable=self._config.max_unavailable,
            alone=[key for key, count in self._num_breaks_survived.items() if count >= _ISOLATE_AFTER],
        )
        await self._dissolve_all_except(frozenset(group) for group in groups)
        outcome = PushOutcome()
        # A shared group has `max_unavailable` servers already, so only one group is updated at a time.
        one_at_a_time = self._config.topology == "shared" and self._config.max_unavailable > 0
        slots = asyncio.Semaphore(1 if one_at_a_time else self._config.max_unavailable or len(groups) or 1)

        async def push_when_free(group: list[ReceiverId]) -> None:
            async with slots:
                await self._push_to_group(group, snapshot, outcome, version=version, step=step)

        await asyncio.gather(*map(push_when_free, groups))
        return outcome

    async def score_at(self, receiver: ReceiverId, request: ScoreTokens) -> TokenScores | WeightsFailed:
        """Requests log-probs from a server of the last push; every failure is a WeightsFailed."""
        if (known := self._receivers.get(receiver)) is None:
            return WeightsFailed(version=-1, reason="no longer connected")
        return await known.request(request, TokenScores, timeout_s=_SCORE_S)

    def forget_base(self, receiver: ReceiverId) -> None:
        """Makes the next push to a server send all bytes."""
        for session in self._sessions.values():
            if receiver in session.receiver_ids:
                session.base = None

    async def close(self, left: Collection[ReceiverId] | None = None) -> None:
        """Dissolves the groups and closes every link.

        `left`: the servers that still exist; None: all. If no server of a group exists, none is asked to
        leave: a killed launcher takes its servers with it, and the trainer would wait for their replies.
        """
        for session in list(self._sessions.values()):
            if left is not None and session.receiver_ids.isdisjoint(left):
                await self._dissolve(session, is_broken=True)
        await self._dissolve_all_except(())
        for receiver in self._receivers.values():
            receiver.link.close()

    async def _push_to_group(
        self, group: list[ReceiverId], snapshot: Snapshot, outcome: PushOutcome, *, version: int, step: int
    ) -> None:
        session = await self._session_of(group, outcome)
        if session is None:
            return
        manifest = Manifest(
            version=version,
            buckets=snapshot.buckets,
            adapter=snapshot.adapter,
            untrained=snapshot.untrained,
        )
        integrity, limit_s = self._config.integrity, self._config.deadline_s(manifest.num_bytes)
        if session.loads_in_place:
            started_s = time.monotonic()
            try:
                await session.stage(snapshot, integrity=integrity, timeout_s=limit_s)
            except WeightSyncError as error:  # no engine has been asked for anything yet
                outcome.failed["broadcast"] = outcome.own_failure = str(error)
                return
            outcome.staging_s = max(outcome.staging_s, time.monotonic() - started_s)
        base = session.base if session.base and session.base.snapshot == snapshot.base_number else None
        request = PushWeights(
            epoch=session.number,  # "epoch" is the field's name on the wire
            group_name=session.group.group_name,
            version=version,
            step=step,
            # A job has already resolved `auto` (Config.update_mode), which depends on engines and objective.
            update_mode="recompute" if self._config.update_mode == "auto" else self._config.update_mode,
            manifest=manifest.to_dict(),
            integrity=integrity,
            timeout_s=limit_s,
            base_version=-1 if base is None else base.version,
            base_digest="" if base is None else base.digest,
        )
        outcome.is_requested = True
        pushed = await session.push(request, snapshot)
        if session.group.backend == "nccl" and pushed.has_begun:
            self._nccl.report(broken_reason=pushed.broken_reason, members=session.receiver_ids)
        outcome.recovery_s |= pushed.recovery_s
        outcome.broadcast_s = max(outcome.broadcast_s, pushed.broadcast_s)
        outcome.traffic.add(pushed.traffic)
        if pushed.broken_reason:
            outcome.failed["broadcast"] = pushed.broken_reason
        num_activated = self._record_replies(session, pushed, outcome, version=version)
        if num_activated < len(session.receivers) or pushed.broken_reason:
            await self._dissolve(session, is_broken=bool(pushed.broken_reason))

    async def _session_of(self, group: list[ReceiverId], outcome: PushOutcome) -> WeightGroupSession | None:
        """The group's session; if there is none, a new one of the servers that are alive.

        None if it cannot be formed; the reasons are in `outcome`.
        """
        if (session := self._sessions.get(frozenset(group))) is not None:
            return session
        receivers = self._connected(group, outcome)
        replies = await asyncio.gather(*(r.request(AskAlive(), Alive, timeout_s=ALIVE_S) for r in receivers))
        alive = dict[ReceiverId, Alive]()
        for receiver, reply in zip(receivers, replies, strict=True):
            if isinstance(reply, Alive):
                alive[receiver.id] = reply
            else:
                self._record_failure(receiver, reply.reason, outcome)
        receivers = [receiver for receiver in receivers if receiver.id in alive]
        if not receivers:
            return None
        try:
            session = await self._new_session(receivers, [alive[receiver.id] for receiver in receivers])
        except _SenderLostError as error:  # no server is at fault
            outcome.failed["broadcast"] = outcome.own_failure = str(error)
            return None
        except WeightSyncError as error:
            if self.num_sessions == 1:
                raise ConfigError(str(error)) from None
            for receiver in receivers:
                self._record_failure(receiver, str(error), outcome)
            return None
        formed = await session.form()
        if self._record_replies(session, formed, outcome) < len(receivers) or formed.broken_reason:
            await session.dissolve(is_broken=False)
            return None
        names = [receiver.entry.name for receiver in receivers]
        log.info(
            "weight session %d: %s over %s, from %s",
            session.number,
            names,
            session.group.backend,
            f"{session.num_senders} senders" if session.num_senders > 1 else "one sender",
        )
        self._sessions[session.receiver_ids] = session
        return session

    async def _new_session(self, receivers: list[Receiver], alive: list[Alive]) -> WeightGroupSession:
        self.num_sessions += 1
        number = self.num_sessions
        facts = device_facts(self._device)
        others = await self._in_senders(lambda link: link.facts)
        if number == 1:
            refuse_mixed_nccl(self._nccl.wanted, ours=facts, engines=alive, others=others)
        backend, warning = choose_backend(self._nccl.wanted, ours=facts, engines=alive, others=others)
        if warning and warning != self._last_warning:
            log.warning("weights travel over gloo: %s", warning)
        self._last_warning = warning
        first_ranks, world_size = assign_ranks(alive)
        is_authenticated = backend == "gloo" and all(engine.authenticates_store for engine in alive)
        group = WeightGroup.create(
            host=self._config.host,
            ports=self._config.ports,
            world_size=world_size,
            group_name=f"{self._group_prefix}-{number}",
            backend=backend,
            timeout_s=min(self._config.push_deadline_s, _FORM_S),
            secret=secrets.token_hex(32) if is_authenticated else "",
        )
        own = BucketSender(
            group, device=self._device, name=f"weight-session-{number}", num_senders=self.num_senders
        )
        opened: list[RemoteEnd] = []

        def open_end(link: SenderLink) -> RemoteEnd:
            end = RemoteEnd(
                link,
                session=number,
                timeout_s=group.timeout_s,
                toward=[group.address, group.port],
                world_size=world_size,
                group_name=group.group_name,
                backend=backend,
                secret=group.secret,
            )
            opened.append(end)
            return end

        try:
            remote = await self._in_senders(open_end)
        except WeightSyncError:
            own.leave()
            await _forget([own, *opened])  # closes their stores
            raise
        return WeightGroupSession(
            number=number,
            group=group,
            ends=[own, *remote],
            receivers=receivers,
            first_ranks=first_ranks,
            loads_in_place=any(engine.loads_in_place for engine in alive),
        )

    async def _in_senders(self, work: Callable[[SenderLink], T]) -> list[T]:
        """Does something at every other sender. Raises _SenderLostError when all have done it, or failed."""
        threads = [in_thread(partial(work, link), name=f"sender-{link.rank}") for link in self._links]
        await asyncio.gather(*threads, return_exceptions=True)
        try:
            return [thread.result() for thread in threads]
        except WeightSyncError as error:
            raise _SenderLostError(str(error)) from None

    def _record_replies(
        self,
        session: WeightGroupSession,
        result: GroupOutcome,
        outcome: PushOutcome,
        *,
        version: int | None = None,
    ) -> int:
        """Adds the replies to a push (without `version`: to FormGroup) to `outcome`.

        Returns the number of receivers that succeeded.
        """
        num_succeeded = 0
        for receiver, reply in zip(session.receivers, result.replies, strict=True):
            key, name = receiver.id, receiver.entry.name
            reason = (
                reply.reason
                if isinstance(reply, WeightsFailed)
                else f"is at version {reply.version} after the push of {version}"
            )
            if isinstance(reply, WeightsOk) and version in (None, reply.version):
                num_succeeded += 1
                if version is not None:
                    outcome.activated[name] = reply
                    self._backoff.record_success(key)
                    del self._num_breaks_survived[key]
            elif key in result.not_at_fault and (
                len(session.receivers) > 1 or self._num_breaks_survived[key] < _ISOLATE_AFTER
            ):
                outcome.failed[name] = reason
                self._num_breaks_survived[key] += 1
            else:
                self._record_failure(receiver, reason, outcome)
        return num_succeeded

    def _record_failure(self, receiver: Receiver, reason: str, outcome: PushOutcome) -> None:
        outcome.failed[receiver.entry.name] = reason
        self._backoff.record_failure(self._directory[receiver.id], now_s=time.monotonic())
        del self._num_breaks_survived[receiver.id]

    def _connected(self, group: list[ReceiverId], outcome: PushOutcome) -> list[Receiver]:
        """The receivers of a group; a server that cannot be one is in `outcome`."""
        receivers = []
        for key in group:
            try:
                receivers.append(self._receiver(self._directory[key]))
            except WeightSyncError as error:  # its key was revoked during the push, for example
                outcome.failed[self._directory[key].name] = str(error)
                self._backoff.record_failure(self._directory[key], now_s=time.monotonic())
        return receivers

    def _receiver(self, entry: ServerEntry) -> Receiver:
        key = receiver_id(entry)
        if key not in self._receivers:
            self._receivers[key] = Receiver.connected(entry, self._keyring, self._waits)
        return self._receivers[key]

    async def _drop_receivers_except(self, kept: set[ReceiverId]) -> None:
        gone = self._receivers.keys() - kept
        sessions = [session for session in self._sessions.values() if session.receiver_ids & gone]
        await asyncio.gather(*(self._dissolve(session, is_broken=False) for session in sessions))
        for key in gone:
            self._receivers.pop(key).link.close()
            del self._num_breaks_survived[key]

    async def _dissolve_all_except(self, kept: Iterable[frozenset[ReceiverId]]) -> None:
        unwanted = self._sessions.keys() - set(kept)
        await asyncio.gather(*(self._dissolve(self._sessions[keys], is_broken=False) for keys in unwanted))

    async def _dissolve(self, session: WeightGroupSession, *, is_broken: bool) -> None:
        self._sessions.pop(session.receiver_ids, None)
        await session.dissolve(is_broken=is_broken)


ALIVE_S = 2.0
"""Time in which a healthy control socket replies. Also the grace period for survivors of a broken broadcast,
and for a broadcast after a receiver has failed, and the interval at which a receiver that is not ready yet is
asked if it is alive."""
_REPLY_GRACE_S = 5.0
"""Time after a push's deadline in which a receiver may ask its engine which weights it has."""


def assign_ranks(alive: Sequence[Alive]) -> tuple[list[int], int]:
    """Returns (first rank of each receiver, the group's world size); rank 0 is the trainer.

    A receiver has one rank for each tensor-parallel rank, from its first rank on.
    """
    *first_ranks, world_size = accumulate((reply.num_ranks for reply in alive), initial=1)
    return first_ranks, world_size


@dataclass(frozen=True, kw_only=True)
class GroupOutcome:
    """Result of forming a weight group, or of one push through it."""

    replies: list[WeightsOk | WeightsFailed]
    """One for each receiver, in their order."""
    not_at_fault: set[ReceiverId] = field(default_factory=set)
    """Receivers that failed only because another receiver did."""
    broken_reason: str = ""
    """Why the group broke; empty if it did not."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Name of each survivor of a broken broadcast -> seconds until it had left the group."""
    has_begun: bool = False
    """True if the broadcast of a push began: before, a failure says nothing about the group's backend."""
    broadcast_s: float = 0.0
    """Seconds from the request to the end of the last broadcast, at rank 0."""
    traffic: Traffic = field(default_factory=Traffic)
    """What was broadcast."""


@dataclass(frozen=True, kw_only=True)
class PushedBase:
    """A push of a session that all its members have confirmed."""

    snapshot: int
    """Number of the snapshot."""
    version: int
    digest: str
    """`weights_digest` of what was sent."""


class WeightGroupSession:
    """A process group for pushes. All methods run in one event loop.

    form() -> FORMED -> push(): wait until all are ready, broadcast -> push() -> ... -> dissolve()
      |                   +-> broken, or a receiver failed: dissolve() and form another session
      +-> not formed (a receiver refused or did not arrive): dissolve()
    """

    def __init__(
        self,
        *,
        number: int,
        group: WeightGroup,
        ends: Sequence[SendingEnd],
        receivers: Sequence[Receiver],
        first_ranks: Sequence[int],
        loads_in_place: bool = False,
    ) -> None:
        """`group`: rank 0's. `ends`: those of all senders, in the order of their numbers. `loads_in_place`:
        one of the engines does not decode while it receives, so `stage` comes first."""
        self.number = number
        self.loads_in_place = loads_in_place
        self.group = group
        self.receivers = list(receivers)
        self.base: PushedBase | None = None
        """What the next push may be compared with; None: it sends all bytes."""
        self._first_ranks = first_ranks
        self._ends = ends

    @property
    def num_senders(self) -> int:
        """Number of process groups, each with its own sender."""
        return len(self._ends)

    @property
    def receiver_ids(self) -> frozenset[ReceiverId]:
        """Ids of the receivers."""
        return frozenset(receiver.id for receiver in self.receivers)

    async def form(self) -> GroupOutcome:
        """Sends FormGroup to every receiver and meets them in the rendezvous.

        If one of them failed, the session is not usable: call `dissolve`.
        """
        timeout_s = self.group.timeout_s
        requests = [
            asyncio.create_task(
                receiver.request(self._form_group(rank), WeightsOk, timeout_s=timeout_s + 2 * ALIVE_S)
            )
            for receiver, rank in zip(self.receivers, self._first_ranks, strict=True)
        ]
        connecting = self._at_all_ends(lambda end: end.connect())
        not_at_fault: set[ReceiverId] = set()
        broken_reason = ""
        try:
            await _wait_unless_refused(connecting, requests, limit=_Limit.of(timeout_s + ALIVE_S))
        except WeightSyncError as error:
            log.warning("weight session %d was not formed: %s", self.number, error)
            broken_reason = str(error)
            # A receiver that still waits in the rendezvous has not failed; it replies to DissolveGroup.
            not_at_fault = {
                receiver.id
                for receiver, request in zip(self.receivers, requests, strict=True)
                if not request.done()
            }
            await self._leave_group()
            await self._ask_all_to_leave()
        replies = [
            # An interrupted receiver does not know the reason, but rank 0 does.
            WeightsFailed(version=reply.version, reason=broken_reason)
            if receiver.id in not_at_fault and isinstance(reply, WeightsFailed)
            else reply
            for receiver, reply in zip(self.receivers, await asyncio.gather(*requests), strict=True)
        ]
        if not broken_reason and all(isinstance(reply, WeightsOk) for reply in replies):
            await asyncio.wait([self._at_all_ends(lambda end: end.close_store())], timeout=ALIVE_S)
        return GroupOutcome(replies=replies, not_at_fault=not_at_fault, broken_reason=broken_reason)

    async def stage(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> None:
        """Makes every bucket ready, so that engines that are paused wait only for the broadcast.

        Raises WeightSyncError if it fails or takes longer than `timeout_s`.
        """
        staging = self._at_all_ends(lambda end: end.stage(snapshot, integrity=integrity, timeout_s=timeout_s))
        await _wait_unless_refused(staging, (), limit=_Limit.of(timeout_s))

    async def push(self, request: PushWeights, snapshot: Snapshot) -> GroupOutcome:
        """Broadcasts the snapshot's buckets when every receiver is ready, and waits for activation.

        The first bucket is read and copied to the group's device in the meantime. If the request names a
        base, it is `self.base`. On return every receiver has replied or its request was cancelled, even if
        the broadcast broke.
        """
        requests = [
            asyncio.create_task(
                receiver.request(request, WeightsOk, timeout_s=request.timeout_s + _REPLY_GRACE_S + ALIVE_S)
            )
            for receiver in self.receivers
        ]
        recovery_s: dict[str, float] = {}
        broken_reason = ""
        started_s = time.monotonic()
        broadcast_s = 0.0
        traffic = Traffic()
        digest = ""
        has_begun = False
        base, self.base = self.base if request.base_digest else None, None
        limit, may_begin = _Limit.of(request.timeout_s), threading.Event()
        waiting = [
            asyncio.create_task(_wait_until_ready(receiver, request.version)) for receiver in self.receivers
        ]
        sending = self._at_all_ends(
            lambda end: end.send(
                snapshot,
                integrity=request.integrity,
                timeout_s=request.timeout_s,
                may_begin=may_begin,
                base=None if base is None else base.snapshot,
            )
        )
        try:
            ready = _unlogged(asyncio.gather(*waiting))
            await _wait_unless_refused(ready, requests, limit=limit, failing=sending)
            may_begin.set()
            has_begun = True
            # A receiver that failed may still take part in the broadcast, or may have received all of it
            # already. The broadcast may then succeed for the other receivers, hence the grace period.
            shares = await _wait_unless_refused(sending, requests, limit=limit, grace_s=ALIVE_S)
        except WeightSyncError as error:
            broken_reason = str(error)
            await self._leave_group()
            may_begin.set()  # without a group, the sender's thread ends at once
            sending.cancel()
            # Survivors may be blocked in the broadcast that the dead peer broke: DissolveGroup makes them
            # reply.
            recovery_s, _ = await asyncio.gather(
                self._ask_all_to_leave(), asyncio.wait(requests, timeout=ALIVE_S)
            )
        else:
            broadcast_s = time.monotonic() - started_s
            sums = interleaved([share.sums for share in shares])
            for share in shares:
                traffic.add(share.traffic)
            digest = weights_digest(snapshot.buckets, sums)
            sent = PushChecksums(version=request.version, checksums=sums.checksums, digests=sums.digests)
            for receiver in self.receivers:
                receiver.link.send(sent)
            await _wait_for_replies_while_alive(self.receivers, requests, sent=sent)
        for task in (*requests, *waiting):
            task.cancel()
        replies = [
            WeightsFailed(version=-1, reason="silent") if isinstance(reply, BaseException) else reply
            for reply in await asyncio.gather(*requests, return_exceptions=True)
        ]
        if digest and all(isinstance(reply, WeightsOk) and reply.base_digest == digest for reply in replies):
            self.base = PushedBase(snapshot=snapshot.number, version=request.version, digest=digest)
        survivors = set[ReceiverId]()
        # A receiver that reports the failure has survived it; the receiver that caused it does not reply.
        if broken_reason:
            survivors = {
                receiver.id
                for receiver, reply in zip(self.receivers, replies, strict=True)
                if isinstance(reply, WeightsFailed) and reply.version >= 0
            }
        return GroupOutcome(
            replies=replies,
            not_at_fault=survivors,
            broken_reason=broken_reason,
            recovery_s=recovery_s,
            has_begun=has_begun,
            broadcast_s=broadcast_s,
            traffic=traffic,
        )

    async def dissolve(self, *, is_broken: bool) -> None:
        """Leaves the group. If it is not broken, the receivers get DissolveGroup first."""
        if not is_broken:
            await self._ask_all_to_leave()
        await self._leave_group()
        await _forget(self._ends)

    async def _leave_group(self) -> None:
        # In threads: NCCL's abort, and the broadcast that it ends, may wait for a receiver that hangs.
        leaving = self._at_all_ends(lambda end: end.leave())
        await asyncio.wait([leaving], timeout=ALIVE_S)

    def _at_all_ends(self, work: Callable[[SendingEnd], T]) -> asyncio.Future[list[T]]:
        """Does something at every sender, each in a thread; the first error is that of the future."""
        name = f"weight-session-{self.number}"
        return _unlogged(asyncio.gather(*(in_thread(partial(work, end), name=name) for end in self._ends)))

    def _form_group(self, rank: int) -> FormGroup:
        return FormGroup(
            epoch=self.number,
            group_name=self.group.group_name,
            master_address=self.group.address,
            master_port=self.group.port,
            rank=rank,
            world_size=self.group.world_size,
            backend=self.group.backend,
            # Longer than rank 0's own timeout, so that at its end a receiver that still waits has not replied
            # yet, while a receiver that refused has.
            timeout_s=self.group.timeout_s + ALIVE_S,
            secret=self.group.secret,
            more_senders=[end.store for end in self._ends[1:]],
        )

    async def _ask_all_to_leave(self) -> dict[str, float]:
        """Sends DissolveGroup to every receiver; returns name -> seconds until it had left the group."""
        started_s = time.monotonic()
        left_after_s: dict[str, float] = {}

        async def ask_to_leave(receiver: Receiver) -> None:
            request = DissolveGroup(epoch=self.number, group_name=self.group.group_name)
            reply = await receiver.request(request, WeightsOk, timeout_s=ALIVE_S)
            if not isinstance(reply, WeightsFailed):
                left_after_s[receiver.entry.name] = time.monotonic() - started_s

        await asyncio.gather(*map(ask_to_leave, self.receivers))
        return left_after_s


async def _forget(ends: Sequence[SendingEnd]) -> None:
    # In threads: a sender that is stopped takes no message, and the event loop must not wait for it.
    await asyncio.wait([in_thread(end.forget, name="forget") for end in ends], timeout=ALIVE_S)


class _SenderLostError(WeightSyncError):
    """Another rank of the trainer cannot send: no server is at fault."""


def interleaved(shares: Sequence[BucketSums]) -> BucketSums:
    """The sums of all buckets in their order. `shares`: those of each sender, which has every M-th bucket."""
    num_buckets = sum(len(share.checksums) for share in shares)
    places = [divmod(index, len(shares)) for index in range(num_buckets)]
    return BucketSums(
        checksums=[shares[sender].checksums[position] for position, sender in places],
        digests=[shares[sender].digests[position] for position, sender in places if shares[sender].digests],
    )


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """A deadline of the event loop's clock."""

    timeout_s: float
    end_s: float

    @classmethod
    def of(cls, timeout_s: float) -> _Limit:
        """The limit that ends `timeout_s` from now."""
        return cls(timeout_s=timeout_s, end_s=asyncio.get_running_loop().time() + timeout_s)


def _unlogged(work: asyncio.Future[T]) -> asyncio.Future[T]:
    """`work`, without asyncio's report of its error if it is cancelled and nothing waits for it any more."""
    work.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return work


async def _wait_until_ready(receiver: Receiver, version: int) -> None:
    """Waits until a receiver is ready for the broadcast of this version.

    Raises WeightSyncError if it no longer replies to AskAlive; has no time limit as long as it does.
    """
    while True:
        try:
            async with asyncio.timeout(ALIVE_S):
                await receiver.readiness.wait(version)
                return
        except TimeoutError:
            alive = await receiver.request(AskAlive(), Alive, timeout_s=ALIVE_S)
        if isinstance(alive, WeightsFailed):
            raise WeightSyncError(
                f"{receiver.entry.name} stopped responding before the broadcast: {alive.reason}"
            )


async def _wait_unless_refused(
    work: asyncio.Future[T],
    requests: Sequence[asyncio.Task[WeightsOk | WeightsFailed]],
    *,
    limit: _Limit,
    grace_s: float = 0.0,
    failing: asyncio.Future[Any] | None = None,
) -> T:
    """Waits for a part of a session's work and returns its result.

    `failing`: a later part that has begun already. Raises WeightSyncError at the limit, the error of
    `failing` if it fails, and `grace_s` after a receiver has replied WeightsFailed.
    """
    loop = asyncio.get_running_loop()
    end_s, reason = limit.end_s, f"rank 0 was not done within {limit.timeout_s:.4g} s"
    pending: set[asyncio.Future[Any]] = set(requests)
    others = set() if failing is None else {failing}
    while not work.done() and (left_s := end_s - loop.time()) > 0:
        done, _ = await asyncio.wait(
            {work, *pending, *others}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
        )
        for request in pending & done:
            if isinstance(refusal := request.result(), WeightsFailed):
                end_s, reason = min(end_s, loop.time() + grace_s), f"a receiver failed: {refusal.reason}"
        if failing is not None and failing in done and (error := failing.exception()) is not None:
            work.cancel()
            raise error
        pending -= done
        others -= done
    if not work.done():
        work.cancel()
        raise WeightSyncError(reason)
    return work.result()


async def _wait_for_replies_while_alive(
    receivers: list[Receiver], requests: list[asyncio.Task[WeightsOk | WeightsFailed]], *, sent: PushChecksums
) -> None:
    """Waits for the replies to a push, but not for a server that no longer replies to AskAlive.

    `sent` is repeated in the meantime: a connection that was interrupted (a renewed key) may have lost it.

    A server may die with the whole broadcast in its socket's buffer: the broadcast succeeds and no reply ever
    comes.
    """
    pending = dict(zip(requests, receivers, strict=True))
    while pending:
        done, _ = await asyncio.wait(pending, timeout=ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            for receiver in pending.values():
                receiver.link.send(sent)
            alive = await asyncio.gather(
                *(receiver.request(AskAlive(), Alive, timeout_s=ALIVE_S) for receiver in pending.values())
            )
            done = {
                task for task, reply in zip(pending, alive, strict=True) if isinstance(reply, WeightsFailed)
            }
        for task in done:
            del pending[task]
