"""The NCCL or gloo process group of a weight push: trainer rank 0 and some engines, for many pushes.

The members of a session never change, and a session is never repaired. After a failure its members leave it
and the next push forms a new session, because rank 0 cannot distinguish a rank that is still blocked in a
broken group from a rank that is not. DissolveGroup makes the survivors of a broken broadcast leave the group,
which ends their wait; the time until they have left is their recovery time.

Control messages run in the caller's event loop, the blocking broadcast in a thread of this session, so that
a session that hangs does not delay other sessions. Every wait for such a thread is bounded: a thread that
never returns is abandoned with its group.

On the wire a session's number is the field `epoch` of FormGroup, PushWeights and DissolveGroup (in the code,
an epoch is a pass over the prompts).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import device as Device

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import in_thread
from areal_like.weights.collective import WeightGroup
from areal_like.wire.messages.weights import (
    Alive,
    AskAlive,
    DissolveGroup,
    FormGroup,
    PushChecksums,
    PushWeights,
    WeightsFailed,
    WeightsOk,
)
from trainer.weights.bucket_sender import BucketSender
from trainer.weights.receivers import Receiver, ReceiverId, Reply
from trainer.weights.snapshot import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

ALIVE_S = 2.0
"""Time in which a healthy control socket replies. Also the grace period for survivors of a broken broadcast,
and for a broadcast after a receiver has failed."""
_REPLY_GRACE_S = 5.0
"""Time after a push's deadline in which a receiver may ask its engine which weights it has."""


@dataclass(frozen=True, kw_only=True)
class RankRange:
    """A receiver's ranks in the process group: one per tensor-parallel rank, from `first_rank` on."""

    receiver: Receiver
    first_rank: int


def assign_ranks(receivers: Sequence[Receiver], alive: Sequence[Alive]) -> tuple[list[RankRange], int]:
    """Ranks in the order given, after rank 0 (the trainer); and the group's world size."""
    rank_ranges, next_rank = [], 1
    for receiver, reply in zip(receivers, alive, strict=True):
        rank_ranges.append(RankRange(receiver=receiver, first_rank=next_rank))
        next_rank += reply.num_ranks
    return rank_ranges, next_rank


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """Result of forming a session, or of one push through it."""

    replies: list[Reply]
    """One for each receiver, in their order."""
    not_at_fault: set[ReceiverId] = field(default_factory=set)
    """Receivers that failed only because another receiver did."""
    broken_reason: str = ""
    """Why the group broke; empty if it did not."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Name of each survivor of a broken broadcast -> seconds until it had left the group."""
    broadcast_s: float = 0.0
    """From the request to the end of the last broadcast, at rank 0."""


class WeightGroupSession:
    """A process group for pushes. All methods run in one event loop.

    form() -> FORMED -> push() -> push() -> ... -> dissolve()
      |                   +-> broken, or a receiver failed: dissolve() and form another session
      +-> not formed (a receiver refused or did not come): dissolve()
    """

    def __init__(
        self,
        *,
        number: int,
        group: WeightGroup,
        rank_ranges: Sequence[RankRange],
        device: Device,
        loads_in_place: bool = False,
    ) -> None:
        """`loads_in_place`: one of the engines does not decode while it receives, so `stage` comes first."""
        self.number = number
        self.loads_in_place = loads_in_place
        self.group = group
        self.receivers = [rank_range.receiver for rank_range in rank_ranges]
        self._rank_ranges = rank_ranges
        self._sender = BucketSender(group, device=device, name=f"weight-session-{number}")

    @property
    def receiver_ids(self) -> frozenset[ReceiverId]:
        """Ids of the receivers."""
        return frozenset(receiver.id for receiver in self.receivers)

    async def form(self) -> SessionOutcome:
        """Sends FormGroup to every receiver and meets them in the rendezvous.

        If one of them failed, the session is not usable: call `dissolve`.
        """
        timeout_s = self.group.timeout_s
        requests = [
            asyncio.create_task(
                rank_range.receiver.request(self._form_group(rank_range), timeout_s=timeout_s + 2 * ALIVE_S)
            )
            for rank_range in self._rank_ranges
        ]
        connecting = in_thread(self.group.connect, name=f"weight-session-{self.number}")
        not_at_fault: set[ReceiverId] = set()
        broken_reason = ""
        try:
            await _wait_unless_refused(connecting, requests, timeout_s=timeout_s + ALIVE_S)
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
            # A receiver that was interrupted knows only that it was: rank 0 knows why.
            WeightsFailed(version=reply.version, reason=broken_reason)
            if receiver.id in not_at_fault and isinstance(reply, WeightsFailed)
            else reply
            for receiver, reply in zip(self.receivers, await asyncio.gather(*requests), strict=True)
        ]
        if not broken_reason and all(isinstance(reply, WeightsOk) for reply in replies):
            closing = in_thread(self.group.close_store, name=f"weight-session-{self.number}-store")
            await asyncio.wait([closing], timeout=ALIVE_S)
        return SessionOutcome(replies=replies, not_at_fault=not_at_fault, broken_reason=broken_reason)

    async def stage(self, snapshot: Snapshot, *, integrity: str, timeout_s: float) -> None:
        """Makes every bucket ready, so that engines that stand still wait only for the broadcast.

        Raises WeightSyncError if it fails or takes longer than `timeout_s`.
        """
        staging = in_thread(
            lambda: snapshot.stage(integrity=integrity), name=f"weight-session-{self.number}-stage"
        )
        await _wait_unless_refused(staging, (), timeout_s=timeout_s)

    async def push(self, request: PushWeights, snapshot: Snapshot) -> SessionOutcome:
        """Broadcasts the snapshot's buckets and waits for activation.

        On return every receiver has replied or its request was cancelled, also if the broadcast broke.
        """
        requests = [
            asyncio.create_task(
                receiver.request(request, timeout_s=request.timeout_s + _REPLY_GRACE_S + ALIVE_S)
            )
            for receiver in self.receivers
        ]
        recovery_s: dict[str, float] = {}
        broken_reason = ""
        started_s = time.monotonic()
        broadcast_s = 0.0
        try:
            sending = in_thread(
                lambda: self._sender.send(snapshot, integrity=request.integrity, timeout_s=request.timeout_s),
                name=f"weight-session-{self.number}",
            )
            # A receiver that failed may still take part in the broadcast, or may have received all of it
            # already. The broadcast may then succeed for the other receivers, hence the grace period.
            sums = await _wait_unless_refused(sending, requests, timeout_s=request.timeout_s, grace_s=ALIVE_S)
        except WeightSyncError as error:
            broken_reason = str(error)
            await self._leave_group()
            # Survivors may be blocked in the broadcast that the dead peer broke: DissolveGroup makes them
            # reply.
            recovery_s, _ = await asyncio.gather(
                self._ask_all_to_leave(), asyncio.wait(requests, timeout=ALIVE_S)
            )
        else:
            broadcast_s = time.monotonic() - started_s
            sent = PushChecksums(version=request.version, checksums=sums.checksums, digests=sums.digests)
            for receiver in self.receivers:
                receiver.link.send(sent)
            await _wait_for_replies_while_alive(self.receivers, requests, sent=sent)
        for task in requests:
            task.cancel()
        replies = [
            WeightsFailed(version=-1, reason="silent") if isinstance(reply, BaseException) else reply
            for reply in await asyncio.gather(*requests, return_exceptions=True)
        ]
        survivors = set[ReceiverId]()
        # A receiver that reports the failure has survived it; the receiver that caused it is silent.
        if broken_reason:
            survivors = {
                receiver.id
                for receiver, reply in zip(self.receivers, replies, strict=True)
                if isinstance(reply, WeightsFailed) and reply.version >= 0
            }
        return SessionOutcome(
            replies=replies,
            not_at_fault=survivors,
            broken_reason=broken_reason,
            recovery_s=recovery_s,
            broadcast_s=broadcast_s,
        )

    async def dissolve(self, *, is_broken: bool) -> None:
        """Leaves the group. If it is not broken, the receivers get DissolveGroup first."""
        if not is_broken:
            await self._ask_all_to_leave()
        await self._leave_group()
        self._sender.close()

    async def _leave_group(self) -> None:
        # In a thread: NCCL's abort, and the broadcast that it ends, may wait for a receiver that hangs.
        leaving = in_thread(self.group.close, name=f"weight-session-{self.number}-close")
        await asyncio.wait([leaving], timeout=ALIVE_S)

    def _form_group(self, rank_range: RankRange) -> FormGroup:
        return FormGroup(
            epoch=self.number,
            group_name=self.group.group_name,
            master_address=self.group.address,
            master_port=self.group.port,
            rank=rank_range.first_rank,
            world_size=self.group.world_size,
            backend=self.group.backend,
            # Longer than rank 0's own timeout, so that at its end a receiver that still waits has not replied
            # yet, while a receiver that refused has.
            timeout_s=self.group.timeout_s + ALIVE_S,
            secret=self.group.secret,
        )

    async def _ask_all_to_leave(self) -> dict[str, float]:
        """Sends DissolveGroup to every receiver; returns name -> seconds until it had left the group."""
        started_s = time.monotonic()
        left_after_s: dict[str, float] = {}

        async def ask_to_leave(receiver: Receiver) -> None:
            request = DissolveGroup(epoch=self.number, group_name=self.group.group_name)
            reply = await receiver.request(request, timeout_s=ALIVE_S)
            if not isinstance(reply, WeightsFailed):
                left_after_s[receiver.entry.name] = time.monotonic() - started_s

        await asyncio.gather(*map(ask_to_leave, self.receivers))
        return left_after_s


async def _wait_unless_refused(
    work: asyncio.Future[T],
    requests: Sequence[asyncio.Task[Reply]],
    *,
    timeout_s: float,
    grace_s: float = 0.0,
) -> T:
    """Waits for rank 0's own part and returns its result.

    Raises WeightSyncError at the timeout, or `grace_s` after a receiver has replied WeightsFailed.
    """
    loop = asyncio.get_running_loop()
    end_s, reason = loop.time() + timeout_s, f"rank 0 was not done within {timeout_s:.4g} s"
    pending: set[asyncio.Future[Any]] = set(requests)
    while not work.done() and (left_s := end_s - loop.time()) > 0:
        done, _ = await asyncio.wait({work, *pending}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for request in pending & done:
            if isinstance(refusal := request.result(), WeightsFailed):
                end_s, reason = min(end_s, loop.time() + grace_s), f"a receiver failed: {refusal.reason}"
        pending -= done
    if not work.done():
        work.cancel()
        raise WeightSyncError(reason)
    return work.result()


async def _wait_for_replies_while_alive(
    receivers: list[Receiver], requests: list[asyncio.Task[Reply]], *, sent: PushChecksums
) -> None:
    """Waits for the replies to a push, but not for a server that no longer replies to AskAlive.

    `sent` is repeated meanwhile: a connection that was interrupted (a renewed key) may have lost it.

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
                *(receiver.request(AskAlive(), timeout_s=ALIVE_S) for receiver in pending.values())
            )
            done = {
                task for task, reply in zip(pending, alive, strict=True) if isinstance(reply, WeightsFailed)
            }
        for task in done:
            del pending[task]
