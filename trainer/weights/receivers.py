"""The rollout servers that receive a weight push: the link to each, and the back-off after a failure.

A server that failed gets no push for a while: for `first_s` seconds after the first failure, and for twice as
long after each further failure. The back-off ends early when the server's entry in the directory changes
(another incarnation, state or weight version). So a faulty engine delays only a few pushes by a full
deadline, and a healthy server that was slow once is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from areal_like.errors import ArealError, ConfigError, WeightSyncError
from areal_like.runtime.waits import PendingWaits
from areal_like.security.keyring import Keyring
from areal_like.security.keys import AllowedKey, KeyRole
from areal_like.wire.channel import Link
from areal_like.wire.curve import CurveClient
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import (
    Alive,
    DissolveGroup,
    FormGroup,
    PushWeights,
    ReadyToReceive,
    ScoreTokens,
    TokenScores,
    WeightsFailed,
    WeightsOk,
)

ReceiverId = tuple[str, int]
"""(name, incarnation): a restarted server is another receiver."""
R = TypeVar("R", Alive, WeightsOk, TokenScores)
"""The type of reply that a request expects."""


def receiver_id(entry: ServerEntry) -> ReceiverId:
    """The id of the server behind a directory entry."""
    return entry.name, entry.incarnation


def has_valid_key(entry: ServerEntry, keyring: Keyring | None) -> bool:
    """True if weights may go to this server: the job has no keys, or the buffer has verified the server's
    key."""
    return keyring is None or _key_of(entry, keyring) is not None


def _key_of(entry: ServerEntry, keyring: Keyring) -> AllowedKey | None:
    key = keyring.sender(entry.public_key)
    return key if key is not None and key.role is KeyRole.ROLLOUT else None


def split_groups(
    receivers: Sequence[ReceiverId],
    *,
    topology: str,
    max_unavailable: int,
    alone: Iterable[ReceiverId] = (),
) -> list[list[ReceiverId]]:
    """Divides the receivers into process groups.

    `alone`: receivers that each get their own group in any topology.
    """
    isolated = set(alone)
    rest = [key for key in receivers if key not in isolated]
    size = 1 if topology == "per_engine" else max_unavailable or max(1, len(rest))
    groups = [[key] for key in receivers if key in isolated]
    return groups + [rest[start : start + size] for start in range(0, len(rest), size)]


class Readiness:
    """The push for whose broadcast a server is ready, as it has reported."""

    def __init__(self) -> None:
        self._version = -1
        self._is_reported = asyncio.Event()

    def record(self, message: object) -> None:
        """Handles a message of the server that is not a reply."""
        if isinstance(message, ReadyToReceive):
            self._version = message.version
            self._is_reported.set()

    async def wait(self, version: int) -> None:
        """Waits until the server is ready for the push of this version. No timeout."""
        while self._version != version:
            self._is_reported.clear()
            await self._is_reported.wait()


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """One server and the link to its weight socket."""

    entry: ServerEntry
    link: Link
    readiness: Readiness
    waits: PendingWaits = field(default_factory=PendingWaits)

    @classmethod
    def connected(
        cls, entry: ServerEntry, keyring: Keyring | None, waits: PendingWaits | None = None
    ) -> Receiver:
        """Connects to a server; `waits` shows each request until the server replies.

        Raises WeightSyncError if it has no valid key (any more), or a malformed address.

        In a job with keys the other end must have a key with the name of the entry's key. So weights go only
        to a process that the buffer knows, whatever address its hello stated.
        """
        curve = None
        if keyring is not None:
            if (key := _key_of(entry, keyring)) is None:
                raise WeightSyncError(f"the key of {entry.name} is revoked or has expired")
            curve = CurveClient(keyring, role=KeyRole.ROLLOUT, name=key.name)
        readiness = Readiness()
        try:
            link = Link(entry.weights_address, handler=readiness.record, curve=curve)
        except ConfigError as error:
            raise WeightSyncError(str(error)) from None
        return cls(entry=entry, link=link, readiness=readiness, waits=waits or PendingWaits())

    @property
    def id(self) -> ReceiverId:
        """(name, incarnation)."""
        return receiver_id(self.entry)

    async def request(self, request: Any, expected: type[R], *, timeout_s: float) -> R | WeightsFailed:
        """Sends a request and returns the reply.

        A timeout, a refusal or a reply of another type than `expected` becomes WeightsFailed.
        """
        try:
            with self.waits(f"weights: {self.entry.name} to {_wanted(request)}"):
                reply = await self.link.call(request, timeout_s=timeout_s)
        except ArealError as error:
            return WeightsFailed(version=-1, reason=str(error))
        if not isinstance(reply, (expected, WeightsFailed)):
            reason = f"replied {type(reply).__name__} to {type(request).__name__}"
            return WeightsFailed(version=-1, reason=reason)
        return reply


def _wanted(request: Any) -> str:
    """The action that a request asks of a server, for the name of a wait."""
    match request:
        case PushWeights():
            return f"activate version {request.version}"
        case FormGroup():
            return "join the weight group"
        case DissolveGroup():
            return "leave the weight group"
        case ScoreTokens():
            return "score tokens"
    return "reply"


@dataclass(frozen=True, kw_only=True)
class _Backoff:
    entry: ServerEntry
    """The server's directory entry when it failed."""
    delay_s: float
    until_s: float


class ReceiverBackoff:
    """Decides which servers get no push for now. Pure: times are seconds on any one monotonic clock.

    eligible -> record_failure() -> backing off -> delay over, or directory entry changed -> eligible
    """

    def __init__(self, *, first_s: float = 5.0, max_s: float = 300.0) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._backoffs: dict[ReceiverId, _Backoff] = {}

    def is_eligible(self, entry: ServerEntry, *, now_s: float) -> bool:
        """True if a push may go to this server."""
        if not entry.weights_address or entry.state in ("starting", "draining"):
            return False
        backoff = self._backoffs.get(receiver_id(entry))
        if backoff is None or now_s >= backoff.until_s:
            return True
        return (backoff.entry.state, backoff.entry.weights_version) != (entry.state, entry.weights_version)

    def record_failure(self, entry: ServerEntry, *, now_s: float) -> None:
        """Starts a back-off, twice as long as the server's last one."""
        last = self._backoffs.get(receiver_id(entry))
        delay_s = min(self._max_s, 2 * last.delay_s) if last else self._first_s
        self._backoffs[receiver_id(entry)] = _Backoff(entry=entry, delay_s=delay_s, until_s=now_s + delay_s)

    def record_success(self, receiver: ReceiverId) -> None:
        """Ends the back-off of a server that activated new weights; its next back-off is short again."""
        self._backoffs.pop(receiver, None)

    def keep_only(self, receivers: Iterable[ReceiverId]) -> None:
        """Drops the history of every server that is not among `receivers`."""
        kept = set(receivers)
        self._backoffs = {key: backoff for key, backoff in self._backoffs.items() if key in kept}
