"""Where records and ledger rows are kept: the interface that the ledger writes through, and the store that survives nothing.

Every `put_*` states a fact as it is from now on, so that facts may be written again and the last one counts. Writes are ordered, and what
one call from the event loop wrote (one ledger operation) survives together or not at all. They never fail from the ledger's
view: a disk that cannot take them makes `health` say so, and acknowledgements wait. The rows name every fact that is needed to rebuild the
ledger: `recover` gives them back.

Records live from `put_sample` until nobody can ask for them any more: a dropped ticket's go with its row, a trained one's with `release`,
when every checkpoint that a trainer could resume from contains its step.

Left out: eval samples (their reward is a sum in an `EvalRound`), and expiry times (leases get a new one when a buffer comes back).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import Record
from buffer.prompts.order import Prompt
from buffer.tickets import Drop, LeaseRecord, Sample, State, Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRow:
    """One allocated weights version."""

    version: int
    step: int
    """Optimizer step that these weights are the start of."""
    parent: int
    """The version allocated before it."""
    trainer_incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRow:
    """One live lease."""

    lease_id: int
    ticket_id: int
    server: str
    server_incarnation: int
    weights_step: int
    outstanding: frozenset[int]
    """Sample indices as last written; those that have a sample by now are not outstanding any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRow:
    """Work that was trained on and then undone: a trainer came back at an earlier step than the ledger had heard of."""

    trainer_incarnation: int
    """Of the trainer that came back."""
    from_step: int
    """Steps that were complete."""
    to_step: int
    """Steps that its checkpoint contains."""
    num_tickets: int
    """Tickets trained on in the steps between."""
    num_tokens: int
    """Sampled tokens in them."""
    unix_s: float


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Everything that an earlier life wrote. Empty for a new run."""

    tickets: list[Ticket] = field(default_factory=list)
    """Live ones by id, with samples and failures; `unleased` is all that has no sample, `leases` is empty (see `leases`)."""
    trained: list[Ticket] = field(default_factory=list)
    """TRAINED ones whose records are not released yet, by (step, position)."""
    leases: list[LeaseRow] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    """In order of allocation."""
    marks: dict[str, int] = field(default_factory=dict)
    returned: list[Prompt] = field(default_factory=list)
    """Prompts given back and not issued again, first come first."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Step -> how often a trainer began it."""
    rollbacks: list[RollbackRow] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)
    ended: dict[tuple[Purpose, State, Drop | None], int] = field(default_factory=dict)
    """How many tickets are in each terminal state (those of `trained` too): their rows are not read."""
    num_issued: int = 0
    """The largest ticket id."""


class Store(Protocol):
    """See the module. Used from one event loop."""

    def put_ticket(self, ticket: Ticket) -> None:
        """The ticket was issued or changed its state, reason, bound, step or position. Ended but not TRAINED, it releases its records."""

    def put_sample(self, sample: Sample, record: Record) -> None:
        """A sample was accepted: the one that the record says. Its lease need not be written for it."""

    def put_failure(self, ticket: Ticket, sample_index: int) -> None:
        """A sample failed; `ticket.num_failures` says how often by now."""

    def put_lease(self, lease: LeaseRecord, *, server_incarnation: int) -> None:
        """A lease was granted, or a sample left it other than by arriving."""

    def end_lease(self, lease_id: int) -> None:
        """A lease is finished or lost."""

    def put_version(self, row: VersionRow) -> None:
        """A version was allocated."""

    def put_mark(self, name: str, value: int) -> None:
        """A scalar of the ledger changed: `trainer_step`, `committed_step`, `trainer_incarnation`, `cursor`, `max_staleness`, ..."""

    def push_returned(self, prompt: Prompt) -> None:
        """A prompt was given back: it is now the last to be issued again."""

    def pop_returned(self) -> None:
        """The first of the prompts given back was issued."""

    def put_attempt(self, step: int, num_starts: int) -> None:
        """A trainer began `step`, for the `num_starts`th time; 0: it is done."""

    def put_rollback(self, row: RollbackRow) -> None:
        """Trained work was undone."""

    def put_statistics(self, values: Mapping[str, float]) -> None:
        """Counters as they are now; others stay."""

    def release(self, ticket: Ticket) -> None:
        """Nobody will ask for this trained ticket's records any more."""

    def group(self, ticket: Ticket) -> list[Record]:
        """All records of a complete ticket, in sample order. Raises StoreCorruptError when they are not what was written."""

    def when_durable(self, then: Callable[[], None]) -> None:
        """Calls `then` in the event loop once everything written so far survives what the store promises to survive. Calls keep order."""

    def recover(self, *, ignoring: Collection[int] = ()) -> Recovered:
        """What earlier lives wrote. Once, before anything is written.

        Raises StoreCorruptError when trajectories of live tickets are damaged, but for tickets that are to be `ignoring`.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes of records held in memory."""

    @property
    def health(self) -> str:
        """Why nothing more can be made durable now (`disk full: ...`); empty when all is well. Nothing new should be admitted meanwhile."""

    def close(self) -> None:
        """Writes what is pending as far as the disk takes it, and lets go of the files."""


class MemoryStore:
    """Survives nothing, acknowledges at once, keeps records only. Its size is bounded by the tickets in flight, however long the run."""

    def __init__(self) -> None:
        self._records: dict[int, dict[int, Record]] = {}
        self._num_bytes = 0

    def put_ticket(self, ticket: Ticket) -> None:
        """Releases the records of a ticket that ended untrained."""
        if ticket.state.is_terminal and ticket.state is not State.TRAINED:
            self.release(ticket)

    def put_sample(self, sample: Sample, record: Record) -> None:
        """Keeps the record."""
        self._records.setdefault(record.ticket_id, {})[record.sample_index] = record
        self._num_bytes += len(record.data)

    def put_failure(self, ticket: Ticket, sample_index: int) -> None:
        """Not kept."""

    def put_lease(self, lease: LeaseRecord, *, server_incarnation: int) -> None:
        """Not kept."""

    def end_lease(self, lease_id: int) -> None:
        """Not kept."""

    def put_version(self, row: VersionRow) -> None:
        """Not kept."""

    def put_mark(self, name: str, value: int) -> None:
        """Not kept."""

    def push_returned(self, prompt: Prompt) -> None:
        """Not kept."""

    def pop_returned(self) -> None:
        """Not kept."""

    def put_attempt(self, step: int, num_starts: int) -> None:
        """Not kept."""

    def put_rollback(self, row: RollbackRow) -> None:
        """Not kept."""

    def put_statistics(self, values: Mapping[str, float]) -> None:
        """Not kept."""

    def release(self, ticket: Ticket) -> None:
        """Forgets the records."""
        for record in self._records.pop(ticket.ticket_id, {}).values():
            self._num_bytes -= len(record.data)

    def group(self, ticket: Ticket) -> list[Record]:
        """All records of a complete ticket, in sample order."""
        records = self._records[ticket.ticket_id]
        return [records[index] for index in range(ticket.num_samples)]

    def when_durable(self, then: Callable[[], None]) -> None:
        """At once: there is nothing to wait for."""
        then()

    def recover(self, *, ignoring: Collection[int] = ()) -> Recovered:
        """Nothing."""
        return Recovered()

    @property
    def num_bytes(self) -> int:
        """Bytes of records held."""
        return self._num_bytes

    @property
    def health(self) -> str:
        """Always well."""
        return ""

    def close(self) -> None:
        """There is nothing to let go of."""
