"""Rollout server <-> buffer: credit and samples to the buffer, leases and acknowledgements to the server.

The server keeps each sample until `SampleAcks` names it, and sends it again after a reconnect; the buffer
deduplicates by (ticket, sample index).

The buffer keeps a journal of each session that an external agent has claimed, so that another server can
continue it. The server writes an entry (`AppendSession`) before a client gets a response, and may repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from areal_like.failures import FailureKind
from areal_like.spans.recorder import unix_now
from areal_like.wire.records import Record

BATCH_BYTES = 1 << 18
"""Bytes of records and their routes in one message: enough to make the overhead of a message small, and far
below the limit of a socket."""
_BATCH_HEADER_BYTES = 60_000
"""Header of one message of leases or acknowledgements, a little below the codec's MAX_HEADER_BYTES."""

_Item = TypeVar("_Item")


class Purpose(StrEnum):
    """Uses of a ticket's samples."""

    TRAIN = "train"
    """They are trained on."""
    EVAL = "eval"
    """Evaluation on the held-out prompts of a set; the samples are recorded and not trained on."""


class ServerState(StrEnum):
    """State of a rollout server, as it reports it to the buffer.

    STARTING -> SERVING <-> QUARANTINED; back to STARTING when the engine is lost; any -> DRAINING
    """

    STARTING = "starting"
    """The engine is not ready yet: no leases."""
    SERVING = "serving"
    """The server takes leases."""
    DRAINING = "draining"
    """The server is leaving: no new leases."""
    QUARANTINED = "quarantined"
    """No leases until the next push: a push failed, so the weights may be corrupt; a restarted engine has the
    run's first weights, which are too old; or an engine has the base of a run that starts from an adapter."""


@dataclass(frozen=True, kw_only=True)
class ServerHeartbeat:
    """Server -> buffer, every `daemon.heartbeat_s` and at once when credit or version changes.

    Reply: `HeartbeatAck`. It renews the leases in `leases`, and no others of this server.
    """

    max_header_bytes: ClassVar[int] = 256 << 10
    """9 bytes for each lease: 28,000 leases."""

    state: ServerState
    free_samples: int
    """Credit: samples that the server can take now in addition to those it holds (absolute, not a
    difference). If negative, that many have to end before it takes another."""
    holding_samples: int
    """Unfinished samples of received leases at the time when `free_samples` was computed."""
    weights_version: int
    """Version of the weights that would sample a request submitted now."""
    leases: list[int]
    """Lease ids that the server is working on."""
    stats: dict[str, float] = field(default_factory=dict)
    """`running`, `waiting`, `tokens_per_s`, ... as gauges; `tokens_generated`, `busy_s`, `idle_s`,
    `reward_s`, ... as totals."""
    waits: dict[str, float] = field(default_factory=dict)
    """The server's waits and their seconds: at most `MAX_WAITS`, the longest ones."""
    sent_s: float = field(default_factory=unix_now)
    """Unix time of the server."""


@dataclass(frozen=True, kw_only=True)
class HeartbeatAck:
    """Buffer -> server or rank, the reply to a heartbeat."""

    step: int
    """Optimizer steps completed."""
    newest_version: int
    """Newest allocated weights version."""
    trouble: str = ""
    """Why the buffer cannot write now (a full disk). Until it can, it grants no leases and delays replies.
    Empty: it can write."""
    progress: float = 0.0
    """To a rank: a count that changes whenever a rollout server reports progress."""
    log_level: str = ""
    """The level that an operator has set for all daemons; empty: the peer's own setting."""
    echo_s: float = 0.0
    """`sent_s` of the heartbeat."""
    unix_s: float = 0.0
    """The first shard's time, by which peers estimate the offset of their clocks; 0 from other shards."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to generate the missing samples of one ticket."""

    lease_id: int
    ticket_id: int
    prompt_index: int
    """Index into the task's train or eval split, by `purpose`."""
    purpose: Purpose
    sample_indices: list[int]
    """The samples of the group that are still missing."""
    greedy_indices: list[int] = field(default_factory=list)
    """The indices in `sample_indices` to sample at temperature 0. Empty in an eval lease, whose set states
    how all samples are sampled."""
    seed: int
    """Sampling seed of the ticket; sample i uses seed + i if the engine supports seeds."""
    eval_set: str = ""
    """Name of the set in `eval.sets` (`eval` without any) of an eval lease; empty for training."""
    sessions: list[int] = field(default_factory=list)
    """The indices in `sample_indices` of samples whose session another server has begun: the buffer has its
    journal (`ReadSession`)."""

    def __post_init__(self) -> None:
        """Raises ValueError for an eval lease without a set, or a set in another lease."""
        if bool(self.eval_set) is not (self.purpose is Purpose.EVAL):
            raise ValueError(f"a {self.purpose} lease of the set {self.eval_set!r}")


@dataclass(frozen=True, kw_only=True)
class Leases:
    """Buffer -> server: new leases."""

    leases: list[Lease]

    @classmethod
    def batches(cls, leases: Iterable[Lease]) -> Iterator[Leases]:
        """Messages whose headers peers accept."""
        for batch in _batches(
            leases,
            max_bytes=_BATCH_HEADER_BYTES,
            size_of=lambda lease: (
                190 + 5 * (len(lease.sample_indices) + len(lease.greedy_indices) + len(lease.sessions))
            ),
        ):
            yield cls(leases=batch)


@dataclass(frozen=True, kw_only=True)
class SampleDone:
    """One finished sample, a part of `Samples`."""

    lease_id: int
    record: Record
    failure: str = ""
    """Empty, or the `FailureKind` of a failure that is trained on with reward 0 (policy `zero`)."""

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown kind of failure."""
        if self.failure:
            FailureKind(self.failure)

    @property
    def ticket_id(self) -> int:
        return self.record.ticket_id

    @property
    def sample_index(self) -> int:
        return self.record.sample_index


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Server -> buffer: samples that finished at about the same time.

    They are batched because a message costs more than handling a sample.
    """

    samples: list[SampleDone]

    @classmethod
    def batches(cls, samples: Iterable[SampleDone], *, max_bytes: int = BATCH_BYTES) -> Iterator[Samples]:
        """Messages with at most `max_bytes` of records and routes each; a larger sample gets its own message.

        So a backlog does not produce a message longer than a socket accepts.
        """
        for batch in _batches(
            samples, max_bytes=max_bytes, size_of=lambda sample: max(256, sample.record.num_bytes)
        ):
            yield cls(samples=batch)


@dataclass(frozen=True, kw_only=True)
class SampleAck:
    """Outcome of samples of one lease: durable, or refused. The server deletes them in both cases."""

    lease_id: int
    sample_indices: list[int]
    refused: str = ""
    """Empty: accepted (also a duplicate). Else the reason: `superseded`, `finished`, `unknown ticket`,
    `unknown version`, `abandoned`, `invalid`."""


@dataclass(frozen=True, kw_only=True)
class SampleAcks:
    """Buffer -> server: outcomes of samples that were written together.

    They are batched because a message costs more than an acknowledgement.
    """

    acks: list[SampleAck]

    @classmethod
    def batches(cls, acks: Iterable[SampleAck]) -> Iterator[SampleAcks]:
        """Messages whose headers peers accept."""
        for batch in _batches(
            acks, max_bytes=_BATCH_HEADER_BYTES, size_of=lambda ack: 80 + 5 * len(ack.sample_indices)
        ):
            yield cls(acks=batch)


@dataclass(frozen=True, kw_only=True)
class SampleFailed:
    """Server -> buffer: a sample failed, and is not trained on with reward 0.

    Acknowledged in `SampleAcks`.
    """

    lease_id: int
    ticket_id: int
    sample_index: int
    kind: FailureKind
    num_tokens: int
    """Tokens that were sampled for it and are lost."""
    error: str

    def __post_init__(self) -> None:
        """Raises ValueError for a negative number of tokens."""
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens={self.num_tokens}")


@dataclass(frozen=True, kw_only=True)
class ReturnLeases:
    """Server -> buffer: returns leases (draining, engine lost). Their missing samples are leased again."""

    max_header_bytes: ClassVar[int] = 256 << 10
    """9 bytes for each lease: 28,000 leases."""

    leases: list[int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class AbortLeases:
    """Buffer -> server: stop generating for these leases; their samples are no longer needed."""

    leases: list[int]
    reason: str

    @classmethod
    def batches(cls, leases: Iterable[int], *, reason: str) -> Iterator[AbortLeases]:
        """Messages whose headers peers accept."""
        for batch in _batches(leases, max_bytes=_BATCH_HEADER_BYTES - len(reason), size_of=lambda _: 9):
            yield cls(leases=batch, reason=reason)


@dataclass(frozen=True, kw_only=True)
class AppendSession:
    """Server -> buffer: the next entry of a session's journal. Reply: `SessionStored`, once it is durable.

    It is accepted only under the live lease of the sample, so a server that has lost the lease cannot add
    anything. An entry that is there already is confirmed again.
    """

    lease_id: int
    ticket_id: int
    sample_index: int
    session: str
    """Id of the session. Entry 0 with another id begins a new journal, which replaces the old one."""
    number: int
    """Position in the journal, from 0."""
    data: NDArray[np.uint8]
    """The entry, which only servers read."""

    def __post_init__(self) -> None:
        """Raises ValueError for a negative number, and for an empty entry, of which no limit counts bytes."""
        if self.number < 0 or not len(self.data):
            raise ValueError(f"number={self.number}, {len(self.data)} bytes")


@dataclass(frozen=True, kw_only=True)
class SessionStored:
    """Buffer -> server: the outcome of `AppendSession` or `ForgetSession`."""

    refused: str = ""
    """Empty: it is durable. `lease`: the server does not hold the sample (any more). `full`: a journal, or
    all together, would be too large; the buffer has forgotten this one. `gap`: an earlier entry is missing,
    and the buffer has forgotten the journal."""


@dataclass(frozen=True, kw_only=True)
class ForgetSession:
    """Server -> buffer: the session must not be continued. Reply: `SessionStored`."""

    lease_id: int
    ticket_id: int
    sample_index: int


@dataclass(frozen=True, kw_only=True)
class ReadSession:
    """Server -> buffer: requests the journal of a leased sample. Reply: `SessionEntries`."""

    lease_id: int
    ticket_id: int
    sample_index: int
    first: int
    """Number of the first entry."""

    def __post_init__(self) -> None:
        """Raises ValueError for a negative number."""
        if self.first < 0:
            raise ValueError(f"first={self.first}")


@dataclass(frozen=True, kw_only=True)
class SessionEntries:
    """Buffer -> server: a part of a journal."""

    session: str
    """Empty: there is no journal, or the server does not hold the sample (any more)."""
    num_entries: int
    """Entries of the whole journal."""
    entries: list[NDArray[np.uint8]]
    """Those from `ReadSession.first` on: about `BATCH_BYTES`, at least one if there is one."""


@dataclass(frozen=True, kw_only=True)
class FindSession:
    """Server -> buffer: where is a session that this server does not have? Reply: `SessionPlace`."""

    session: str


@dataclass(frozen=True, kw_only=True)
class SessionPlace:
    """Buffer -> server: where a session is."""

    is_over: bool = False
    """True if it cannot be continued anywhere: its sample is finished or not needed, or it has no journal."""
    server: str = ""
    """The server that has leased its sample; empty: it will be leased again."""
    url: str = ""
    """That server's `Hello.sessions_url`."""


def _batches(
    items: Iterable[_Item], *, max_bytes: int, size_of: Callable[[_Item], int]
) -> Iterator[list[_Item]]:
    """Lists of at most `max_bytes` each; a larger item is alone in its list."""
    batch: list[_Item] = []
    num_bytes = 0
    for item in items:
        size = size_of(item)
        if batch and num_bytes + size > max_bytes:
            yield batch
            batch, num_bytes = [], 0
        batch.append(item)
        num_bytes += size
    if batch:
        yield batch


TO_BUFFER = (
    ServerHeartbeat, Samples, SampleFailed, ReturnLeases, AppendSession, ForgetSession, ReadSession,
    FindSession,
)  # fmt: skip
"""The messages that servers send."""
TO_SERVER = (HeartbeatAck, Leases, SampleAcks, AbortLeases, SessionStored, SessionEntries, SessionPlace)
"""The messages that a buffer sends to servers."""
MESSAGES = (*TO_BUFFER, *TO_SERVER)
