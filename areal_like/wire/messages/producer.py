"""Rollout server <-> buffer: credit out, leases in, samples out, acknowledgements in.

The server keeps each sample until `SampleAcks` names it and sends it again after a reconnect; the buffer deduplicates by (ticket, sample).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.wire.records import Record

BATCH_BYTES = 1 << 18
"""Of records in a message: far above what one costs, far below what a socket lets through."""


class Purpose(StrEnum):
    """What a ticket's samples are for."""

    TRAIN = "train"
    """Enters the replay buffer."""
    EVAL = "eval"
    """Greedy, held-out; its reward is recorded, its tokens are not trained on."""


class ServerState(StrEnum):
    """What a rollout server is doing."""

    STARTING = "starting"
    """Its engine is not ready yet: no leases."""
    SERVING = "serving"
    """Takes leases."""
    DRAINING = "draining"
    """Leaving: no new leases."""
    QUARANTINED = "quarantined"
    """Its weights are in doubt: no leases until the next push."""


@dataclass(frozen=True, kw_only=True)
class ServerHeartbeat:
    """Server -> buffer, every `daemon.heartbeat_s` and at once when credit or version changes. Answered by `HeartbeatAck`.

    Renews every lease it names; a lease of this server that it does not name is not renewed.
    """

    state: ServerState
    free_samples: int
    """Credit: samples the server can take now beyond those it holds (absolute, not a difference)."""
    holding_samples: int
    """Samples of received leases not yet finished, as the server saw it when it computed `free_samples`."""
    weights_version: int
    """Version that a request starting now would be sampled with."""
    leases: list[int]
    """Lease ids that the server is working on."""
    stats: dict[str, float] = field(default_factory=dict)
    """Gauges: `running`, `waiting`, `tokens_generated`, `busy_s`, `idle_s`, `tokens_per_s`, `reward_s`, ... cumulative where named so."""


@dataclass(frozen=True, kw_only=True)
class HeartbeatAck:
    """Buffer -> server or rank."""

    step: int
    """Optimizer steps completed."""
    newest_version: int
    """Newest allocated weights version."""
    trouble: str = ""
    """Why the buffer cannot write now (a full disk): there are no leases, and answers wait until it can. Empty: it can."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to generate the missing samples of one ticket."""

    lease_id: int
    ticket_id: int
    prompt_index: int
    """Index into the task's train or eval split."""
    purpose: Purpose
    sample_indices: list[int]
    """The samples of the group that are still missing."""
    greedy_indices: list[int] = field(default_factory=list)
    """Those of `sample_indices` that are taken at temperature 0. All of an eval lease are, without being named here."""
    seed: int
    """Sampling seed of the ticket; sample i uses seed + i where the engine honours it."""


@dataclass(frozen=True, kw_only=True)
class Leases:
    """Buffer -> server."""

    leases: list[Lease]


@dataclass(frozen=True, kw_only=True)
class SampleDone:
    """One finished sample; the record says which. Travels in `Samples`."""

    lease_id: int
    record: Record

    @property
    def ticket_id(self) -> int:
        """The lease's ticket."""
        return self.record.ticket_id

    @property
    def sample_index(self) -> int:
        """Which sample of the ticket."""
        return self.record.sample_index


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Server -> buffer: samples that were finished at about the same time. A message for each would cost more than looking at it."""

    samples: list[SampleDone]

    @classmethod
    def batches(cls, samples: Iterable[SampleDone], *, max_bytes: int = BATCH_BYTES) -> Iterator[Samples]:
        """Messages with records of `max_bytes` at most, or a single larger one: no backlog makes one too long for a socket."""
        batch: list[SampleDone] = []
        num_bytes = 0
        for sample in samples:
            if batch and num_bytes + len(sample.record.data) > max_bytes:
                yield cls(samples=batch)
                batch, num_bytes = [], 0
            batch.append(sample)
            num_bytes += len(sample.record.data)
        if batch:
            yield cls(samples=batch)


@dataclass(frozen=True, kw_only=True)
class SampleAck:
    """What became of samples of one lease: they are durable, or refused for good. Either way the server forgets them."""

    lease_id: int
    sample_indices: list[int]
    refused: str = ""
    """Empty: accepted (also when it was a duplicate). Else why not: `superseded`, `finished`, `unknown ticket`, `unknown version`,
    `abandoned`, `invalid`."""


@dataclass(frozen=True, kw_only=True)
class SampleAcks:
    """Buffer -> server: samples that became durable together. A message for each would cost more than making them so."""

    acks: list[SampleAck]


@dataclass(frozen=True, kw_only=True)
class SampleFailed:
    """Server -> buffer: the sample cannot be made here (reward raised or hung, engine refused). Answered in `SampleAcks`."""

    lease_id: int
    ticket_id: int
    sample_index: int
    error: str


@dataclass(frozen=True, kw_only=True)
class ReturnLeases:
    """Server -> buffer: give these back (draining, engine lost); their missing samples are leased again."""

    leases: list[int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class AbortLeases:
    """Buffer -> server: stop generating for these; nothing more is expected of them."""

    leases: list[int]
    reason: str


MESSAGES = (
    ServerHeartbeat,
    HeartbeatAck,
    Leases,
    Samples,
    SampleAcks,
    SampleFailed,
    ReturnLeases,
    AbortLeases,
)
