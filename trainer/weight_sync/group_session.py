"""One epoch: a process group of rank 0 and some engines, from the rendezvous to its end.

    form() -> FORMED -> push() -> push() -> ... -> dissolve()
       \\-> None: somebody refused        \\-> broken, or somebody failed: dissolve() and form another

An epoch never changes its members and is never mended: a broken group is left behind, because a rank that may still be blocked in it cannot
be told from one that is not. Survivors of a broken broadcast are told to leave, which makes them answer; how long that took is their
recovery time. Control messages run in the caller's event loop, the blocking broadcast in a thread of the epoch's own, so that
one epoch that hangs holds up no other. Every wait for such a thread has an end: one that never returns is left behind with the group.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
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
)
from trainer.weight_sync.receivers import Answer, Key, Member
from trainer.weight_sync.snapshot import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

ALIVE_S = 2.0
"""How fast a healthy control socket answers; also the grace for survivors of a broken broadcast, and for one that a member has given up."""
_VERDICT_S = 5.0
"""How long after its time limit a receiver may ask its engine which weights it has, before it gives its reason."""


@dataclass(frozen=True, kw_only=True)
class RankRange:
    """A member's place in a group."""

    member: Member
    first_rank: int


def rank_ranges(members: Sequence[Member], alive: Sequence[Alive]) -> tuple[list[RankRange], int]:
    """Places in the order given, each as wide as its engine has ranks, after rank 0 (the trainer); and the group's size."""
    seats, next_rank = [], 1
    for member, facts in zip(members, alive, strict=True):
        seats.append(RankRange(member=member, first_rank=next_rank))
        next_rank += facts.num_ranks
    return seats, next_rank


@dataclass(frozen=True, kw_only=True)
class SessionOutcome:
    """What came of forming an epoch or of a push through it."""

    answers: list[Answer]
    """One a member, in their order."""
    blameless: set[Key] = field(default_factory=set)
    """Members that failed because of another."""
    broken: str = ""
    """Why the group broke; empty when it did not."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Name of each survivor of a broken broadcast -> seconds until it had left it."""


class WeightGroupSession:
    """See the module. Everything but the broadcast runs in one event loop."""

    def __init__(
        self, *, number: int, group: WeightGroup, seats: Sequence[RankRange], device: Device
    ) -> None:
        self.number = number
        self.group = group
        self.members = [seat.member for seat in seats]
        self._seats = seats
        self._device = device
        # Not the default stream: training would wait for the whole broadcast, and the broadcast for what training has queued.
        self._stream = torch.cuda.Stream(device) if group.backend == "nccl" else None  # type: ignore[no-untyped-call]
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"epoch-{number}-read")

    @property
    def keys(self) -> frozenset[Key]:
        """Who takes part."""
        return frozenset(member.key for member in self.members)

    async def form(self) -> SessionOutcome:
        """Invites everybody and meets them. If anybody is not there afterwards, the epoch has to be dissolved."""
        timeout_s = self.group.timeout_s
        invited = [
            asyncio.create_task(seat.member.ask(self._invitation(seat), timeout_s=timeout_s + 2 * ALIVE_S))
            for seat in self._seats
        ]
        connecting = in_thread(self.group.connect, name=f"epoch-{self.number}")
        blameless: set[Key] = set()
        broken = ""
        try:
            await _unless_refused(connecting, invited, timeout_s=timeout_s + ALIVE_S)
        except WeightSyncError as error:
            log.warning("epoch %d was not formed: %s", self.number, error)
            broken = str(error)
            # Whoever is still waiting in the rendezvous did what it was asked; it answers when told to leave.
            blameless = {
                member.key for member, answer in zip(self.members, invited, strict=True) if not answer.done()
            }
            await self._close()
            await self._farewell()
        return SessionOutcome(answers=await asyncio.gather(*invited), blameless=blameless, broken=broken)

    async def push(self, request: PushWeights, snapshot: Snapshot) -> SessionOutcome:
        """Sends the snapshot's buckets and waits for activation. Broken or not, everybody has answered or fallen silent when it returns."""
        asked = [
            asyncio.create_task(member.ask(request, timeout_s=request.timeout_s + _VERDICT_S + ALIVE_S))
            for member in self.members
        ]
        recovery_s: dict[str, float] = {}
        broken = ""
        try:
            sending = in_thread(
                lambda: self._send(snapshot, timeout_s=request.timeout_s), name=f"epoch-{self.number}"
            )
            # A failure breaks nothing by itself: that member may have had all that it needs of the broadcast.
            checksums = await _unless_refused(sending, asked, timeout_s=request.timeout_s, grace_s=ALIVE_S)
        except WeightSyncError as error:
            broken = str(error)
            await self._close()
            # Survivors may be blocked in the broadcast that the dead peer broke: telling them to leave makes them answer.
            recovery_s, _ = await asyncio.gather(self._farewell(), asyncio.wait(asked, timeout=ALIVE_S))
        else:
            for member in self.members:
                member.link.send(PushChecksums(version=request.version, checksums=checksums))
            await _while_alive(self.members, asked)
        for task in asked:
            task.cancel()
        answers = [
            WeightsFailed(version=-1, reason="silent") if isinstance(answer, BaseException) else answer
            for answer in await asyncio.gather(*asked, return_exceptions=True)
        ]
        survivors = set[Key]()
        if broken:  # whoever reports it has survived it; whoever broke it is silent
            reports = zip(self.members, answers, strict=True)
            survivors = {
                member.key
                for member, answer in reports
                if isinstance(answer, WeightsFailed) and answer.version >= 0
            }
        return SessionOutcome(answers=answers, blameless=survivors, broken=broken, recovery_s=recovery_s)

    async def dissolve(self, *, is_broken: bool) -> None:
        """Leaves the group; members of one that still stands are told to leave too."""
        if not is_broken:
            await self._farewell()
        await self._close()
        self._reader.shutdown(wait=False)

    async def _close(self) -> None:
        """Leaves the group; in a thread of its own, because NCCL's abort and the broadcast that it ends may wait for a hung member."""
        await asyncio.wait([in_thread(self.group.close, name=f"epoch-{self.number}-close")], timeout=ALIVE_S)

    def _send(self, snapshot: Snapshot, *, timeout_s: float) -> list[int]:
        """Broadcasts every bucket; returns their checksums. Runs in the sender's thread."""
        with torch.cuda.stream(self._stream):
            return self._send_all(snapshot, timeout_s=timeout_s)

    def _send_all(self, snapshot: Snapshot, *, timeout_s: float) -> list[int]:
        checksums = []
        ahead = self._reader.submit(snapshot.read, 0)
        for index in range(len(snapshot.buckets)):
            whole = ahead.result()
            if index + 1 < len(snapshot.buckets):
                ahead = self._reader.submit(snapshot.read, index + 1)
            summing = self._reader.submit(getattr, whole, "checksum")
            try:
                on_wire = whole.data.to(self._device) if self.group.backend == "nccl" else whole.data
            except RuntimeError as error:  # the GPU's memory is full: another push may find room
                raise WeightSyncError(
                    f"a bucket of {len(whole.data)} bytes did not get to {self._device}: {error}"
                ) from None
            self.group.broadcast(on_wire, timeout_s=timeout_s)
            checksums.append(summing.result())
        return checksums

    def _invitation(self, seat: RankRange) -> FormGroup:
        return FormGroup(
            epoch=self.number,
            group_name=self.group.group_name,
            master_address=self.group.address,
            master_port=self.group.port,
            rank=seat.first_rank,
            world_size=self.group.world_size,
            backend=self.group.backend,
            timeout_s=self.group.timeout_s
            + ALIVE_S,  # after us, so that we can tell who is waiting from who refused
        )

    async def _farewell(self) -> dict[str, float]:
        """Tells everybody to leave; the seconds after which each had left."""
        started_s = time.monotonic()
        left_s: dict[str, float] = {}

        async def tell(member: Member) -> None:
            request = DissolveGroup(epoch=self.number, group_name=self.group.group_name)
            answer = await member.ask(request, timeout_s=ALIVE_S)
            if not isinstance(answer, WeightsFailed):
                left_s[member.entry.name] = time.monotonic() - started_s

        await asyncio.gather(*map(tell, self.members))
        return left_s


async def _unless_refused(
    work: asyncio.Future[T], asked: Sequence[asyncio.Task[Answer]], *, timeout_s: float, grace_s: float = 0.0
) -> T:
    """The outcome of our own end, unless the time is over or a member says that it takes no part: then it has `grace_s` left.

    Raises WeightSyncError.
    """
    loop = asyncio.get_running_loop()
    end_s, why = loop.time() + timeout_s, f"rank 0 was not done within {timeout_s:g} s"
    answers: set[asyncio.Future[Any]] = set(asked)
    while not work.done() and (left_s := end_s - loop.time()) > 0:
        done, _ = await asyncio.wait({work, *answers}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for answer in answers & done:
            if isinstance(refusal := answer.result(), WeightsFailed):
                end_s, why = min(end_s, loop.time() + grace_s), f"a member takes no part: {refusal.reason}"
        answers -= done
    if not work.done():
        work.cancel()
        raise WeightSyncError(why)
    return work.result()


async def _while_alive(members: list[Member], asked: list[asyncio.Task[Answer]]) -> None:
    """Waits for answers, but not for a server that has died with the whole broadcast in its socket's buffer."""
    pending = dict(zip(asked, members, strict=True))
    while pending:
        done, _ = await asyncio.wait(pending, timeout=ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            alive = await asyncio.gather(
                *(member.ask(AskAlive(), timeout_s=ALIVE_S) for member in pending.values())
            )
            done = {
                task for task, answer in zip(pending, alive, strict=True) if isinstance(answer, WeightsFailed)
            }
        for task in done:
            del pending[task]
