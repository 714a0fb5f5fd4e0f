"""Pushes one snapshot of the weights from trainer rank 0 to the rollout servers.

`weights.topology` decides which servers share a process group. `shared`: all servers are in one group. One
broadcast serves all of them, and if one server breaks it, the push fails for all of them. `per_engine`: each
server has its own group. Rank 0 sends everything once per engine, and a failure affects only that server.

`weights.max_unavailable` bounds the number of servers that are updated at a time: shared groups are cut to
that size and updated one after the other, so that generation never stops completely where an engine has to
pause for an update.

A server that fails or misses its deadline backs off (`receivers.py`). If a shared broadcast breaks and every
receiver survives it, rank 0 cannot know which server failed. A server that was in `_ISOLATE_AFTER` such
pushes in a row therefore gets its own group, where the faulty server fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.runtime.waits import PendingWaits
from areal_like.security.keyring import Keyring
from areal_like.weights.buckets import Manifest
from areal_like.weights.collective import WeightGroup, device_facts
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    PushWeights,
    ScoreTokens,
    TokenScores,
    WeightsFailed,
    WeightsOk,
)
from trainer.weights.backend import NcclTrial, choose_backend, refuse_mixed_nccl
from trainer.weights.group_session import ALIVE_S, SessionOutcome, WeightGroupSession, assign_ranks
from trainer.weights.receivers import (
    Receiver,
    ReceiverBackoff,
    ReceiverId,
    Reply,
    failure_reason,
    has_valid_key,
    receiver_id,
    split_groups,
)
from trainer.weights.snapshot import Snapshot

log = logging.getLogger(__name__)

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


class Broadcaster:
    """Pushes snapshots to servers, one `push` at a time. For each group of servers a push does this:

        alive = await receiver.request(AskAlive())          # each receiver; the silent ones are left out
        session = WeightGroupSession(group=WeightGroup.create(backend=...), ...)    # an NCCL or gloo group
        await session.form()                                # FormGroup to each receiver, then the rendezvous
        await session.stage(snapshot, ...)                  # only if an engine loads in place
        await session.push(PushWeights(...), snapshot)      # buckets, PushChecksums; each replies WeightsOk
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
    ) -> None:
        """`device`, `keyring`: of the trainer. `waits`: lists the servers that have not replied."""
        self._waits = waits
        self._config = config
        self._keyring = keyring
        self._device = torch.device(device)
        # Not the trainer's identity (`Hello.process`), which the names of groups would show to every server.
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
        """Sessions formed so far, failed attempts included."""

    def eligible(self, servers: Iterable[ServerEntry]) -> list[ServerEntry]:
        """The servers of the directory that a push would go to now."""
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
        `weights.host` is no address of this machine, or the first session finds every port of
        `weights.port_range` taken. Later a port is taken for a while only, and the push is tried again.
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
        """Asks a server of the last push for log-probs; every failure is a WeightsFailed."""
        if (known := self._receivers.get(receiver)) is None:
            return WeightsFailed(version=-1, reason="no longer connected")
        return await known.score(request, timeout_s=_SCORE_S)

    async def close(self, left: Collection[ReceiverId] | None = None) -> None:
        """Dissolves the groups and closes every link.

        `left`: the servers that are still there; None: all. Nobody is asked to leave a group of which none is
        there: a killed launcher takes its servers with it, and the trainer would wait for their replies.
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
        manifest = Manifest(version=version, buckets=snapshot.buckets)
        integrity, limit_s = self._config.integrity, self._config.deadline_s(manifest.num_bytes)
        if session.loads_in_place:
            started_s = time.monotonic()
            try:
                await session.stage(snapshot, integrity=integrity, timeout_s=limit_s)
            except WeightSyncError as error:  # no engine has been asked for anything yet
                outcome.failed["broadcast"] = str(error)
                return
            outcome.staging_s = max(outcome.staging_s, time.monotonic() - started_s)
        request = PushWeights(
            epoch=session.number,  # "epoch" is the field's name on the wire
            group_name=session.group.group_name,
            version=version,
            step=step,
            # A job resolves `auto` before (Config.update_mode): it depends on engines and objective.
            update_mode="recompute" if self._config.update_mode == "auto" else self._config.update_mode,
            manifest=manifest.to_dict(),
            integrity=integrity,
            timeout_s=limit_s,
        )
        pushed = await session.push(request, snapshot)
        if session.group.backend == "nccl":
            self._nccl.report(broken_reason=pushed.broken_reason)
        outcome.recovery_s |= pushed.recovery_s
        outcome.broadcast_s = max(outcome.broadcast_s, pushed.broadcast_s)
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
        replies = await asyncio.gather(*(r.request(AskAlive(), timeout_s=ALIVE_S) for r in receivers))
        alive = dict[ReceiverId, Alive]()
        for receiver, reply in zip(receivers, replies, strict=True):
            if isinstance(reply, Alive):
                alive[receiver.id] = reply
            else:
                self._record_failure(receiver, reply, outcome)
        receivers = [receiver for receiver in receivers if receiver.id in alive]
        if not receivers:
            return None
        try:
            session = self._new_session(receivers, [alive[receiver.id] for receiver in receivers])
        except WeightSyncError as error:
            if self.num_sessions == 1:
                raise ConfigError(str(error)) from None
            for receiver in receivers:
                self._record_failure(receiver, WeightsFailed(version=-1, reason=str(error)), outcome)
            return None
        formed = await session.form()
        if self._record_replies(session, formed, outcome) < len(receivers) or formed.broken_reason:
            await session.dissolve(is_broken=False)
            return None
        names = [receiver.entry.name for receiver in receivers]
        log.info("weight session %d: %s over %s", session.number, names, session.group.backend)
        self._sessions[session.receiver_ids] = session
        return session

    def _new_session(self, receivers: list[Receiver], alive: list[Alive]) -> WeightGroupSession:
        self.num_sessions += 1
        facts = device_facts(self._device)
        if self.num_sessions == 1:
            refuse_mixed_nccl(self._nccl.wanted, ours=facts, engines=alive)
        backend, warning = choose_backend(self._nccl.wanted, ours=facts, engines=alive)
        if warning and warning != self._last_warning:
            log.warning("weights travel over gloo: %s", warning)
        self._last_warning = warning
        rank_ranges, world_size = assign_ranks(receivers, alive)
        is_authenticated = backend == "gloo" and all(engine.authenticates_store for engine in alive)
        group = WeightGroup.create(
            host=self._config.host,
            ports=self._config.ports,
            world_size=world_size,
            group_name=f"{self._group_prefix}-{self.num_sessions}",
            backend=backend,
            timeout_s=min(self._config.push_deadline_s, _FORM_S),
            secret=secrets.token_hex(32) if is_authenticated else "",
        )
        return WeightGroupSession(
            number=self.num_sessions,
            group=group,
            rank_ranges=rank_ranges,
            device=self._device,
            loads_in_place=any(engine.loads_in_place for engine in alive),
        )

    def _record_replies(
        self,
        session: WeightGroupSession,
        result: SessionOutcome,
        outcome: PushOutcome,
        *,
        version: int | None = None,
    ) -> int:
        """Adds the replies to a push (without `version`: to FormGroup) to `outcome`.

        Returns the number of receivers that succeeded.
        """
        num_succeeded = 0
        for receiver, reply in zip(session.receivers, result.replies, strict=True):
            key = receiver.id
            if isinstance(reply, WeightsOk) and version in (None, reply.version):
                num_succeeded += 1
                if version is not None:
                    outcome.activated[receiver.entry.name] = reply
                    self._backoff.record_success(key)
                    del self._num_breaks_survived[key]
            elif key in result.not_at_fault and (
                len(session.receivers) > 1 or self._num_breaks_survived[key] < _ISOLATE_AFTER
            ):
                outcome.failed[receiver.entry.name] = failure_reason(reply, version)
                self._num_breaks_survived[key] += 1
            else:
                self._record_failure(receiver, reply, outcome, version=version)
        return num_succeeded

    def _record_failure(
        self, receiver: Receiver, reply: Reply, outcome: PushOutcome, *, version: int | None = None
    ) -> None:
        outcome.failed[receiver.entry.name] = failure_reason(reply, version)
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
