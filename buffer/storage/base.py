"""The interface by which the ledger writes its rows and the trajectories (records), and reads them back.

Every `put_*` contains the complete new value of a row, so a repeated write changes nothing, and of several
writes the last one counts. Writes keep their order. The writes of one callback of the event loop (one ledger
operation) survive together or not at all. No write raises: if the disk cannot store it,
`write_blocked_reason` is set and acknowledgements wait. `recover` returns all rows from which the ledger is
rebuilt.

A record is kept from `put_sample` until no trainer can need it any more. The records of a dropped ticket are
deleted after its row is written as dropped. Those of a trained ticket are deleted after `release`, which the
ledger calls when every checkpoint that a trainer could resume from contains the ticket's step. Those of an
evaluated ticket are deleted after `release`, too, which follows `eval.keep` newer evaluations of its set.

Left out: expiry times of leases (a restarted buffer sets new ones).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import Record
from buffer.prompts.order import Prompt
from buffer.tickets import Drop, Journal, LeaseRecord, SampleSummary, State, Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionRow:
    """One allocated weight version."""

    version: int
    step: int
    """The optimizer step that starts from these weights: the number of steps completed before."""
    parent: int
    """The version allocated before it."""
    trainer_incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRow:
    """One live lease. Its expiry time is not stored: a restarted buffer gives it a new one."""

    lease_id: int
    ticket_id: int
    server: str
    server_incarnation: int
    weights_step: int
    outstanding: frozenset[int]
    """Sample indices as last written. An index that has a sample row is no longer outstanding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackRow:
    """Training that was undone: a trainer resumed at an earlier step than the last complete one."""

    trainer_incarnation: int
    """Incarnation of the trainer that resumed."""
    from_step: int
    """Steps that were complete before."""
    to_step: int
    """Steps that the resumed checkpoint contains."""
    num_tickets: int
    """Tickets trained on in the steps between."""
    num_tokens: int
    """Sampled tokens of these tickets."""
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationRow:
    """An operator's action on the run. It is written for people and never read back."""

    unix_s: float
    verb: str
    """The command, e.g. `unfence`."""
    subject: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRow:
    """A value of a setting that may change during the run, or an action that an operator requested."""

    step: int
    """The first optimizer step with this value; for an action, the step after which it is done."""
    key: str
    value: str
    origin: str
    """`start`: a trainer started with it; `operator`: changed during the run."""
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One evaluation of one set. Its tickets were issued together, in the order of their prompts."""

    first_ticket: int
    """Id of the ticket of prompt 0."""
    eval_id: int
    """The trainer's id: completed optimizer steps."""
    eval_set: str
    num_prompts: int
    num_samples: int
    """Samples of each prompt."""
    min_version: int
    state: str
    """`running`, `done`, `released` (done, and its samples are no longer needed), or `cancelled`."""


EventRow = EvaluationRow | VersionRow | RollbackRow | OperationRow | SettingRow
"""Rows that are written as they are, in the order in which they were made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRow:
    """One file of trajectories."""

    segment: int
    num_bytes: int
    """Rows refer to bytes up to here; bytes after it were never acknowledged."""
    retained: bool
    """True if the file is never deleted (written with `buffer.retain_trajectories`)."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Everything that earlier processes wrote. Empty for a new run."""

    tickets: list[Ticket] = field(default_factory=list)
    """Live tickets by id, with samples and failures. Every index without a sample is in `unleased`; `leases`
    is empty."""
    trained: list[Ticket] = field(default_factory=list)
    """TRAINED tickets whose records are not released yet, by (step, position)."""
    evaluated: list[Ticket] = field(default_factory=list)
    """EVALUATED tickets whose records are not released yet, by id."""
    split: list[Ticket] = field(default_factory=list)
    """SPLIT tickets some of whose records are not released yet, by id."""
    evaluations: list[EvaluationRow] = field(default_factory=list)
    """The running evaluations, and the finished ones whose samples are kept, in the order of their
    requests."""
    leases: list[LeaseRow] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    """Versions in order of allocation."""
    scalars: dict[str, int] = field(default_factory=dict)
    returned: list[Prompt] = field(default_factory=list)
    """Prompts given back and not issued again, in the order in which they were given back."""
    attempts: dict[int, int] = field(default_factory=dict)
    """Step -> number of trainers that began it."""
    rollbacks: list[RollbackRow] = field(default_factory=list)
    settings: list[SettingRow] = field(default_factory=list)
    """Settings in the order in which they were changed."""
    counters: dict[str, float] = field(default_factory=dict)
    ended: dict[tuple[Purpose, State, Drop | None], int] = field(default_factory=dict)
    """Number of tickets by purpose, terminal state and drop reason, including those in `trained`, `evaluated`
    and `split`. Their rows are counted, not read."""
    num_issued: int = 0
    """The largest ticket id."""


class Blocked(StrEnum):
    """Why a store currently cannot write: `write_blocked_reason` begins with this value and a colon."""

    FULL = "disk full"
    """There is not enough space."""
    LOCKED = "locked"
    """Another program holds the ledger's lock."""
    HANGS = "disk hangs"
    """A write has not returned."""


def first_of(entries: Iterable[bytes], *, max_bytes: int) -> list[bytes]:
    """The first entries of a journal, about `max_bytes` of them, at least one if there is one."""
    found: list[bytes] = []
    num_bytes = 0
    for data in entries:
        if found and num_bytes + len(data) > max_bytes:
            break
        found.append(data)
        num_bytes += len(data)
    return found


class Store(ABC):
    """Rows and records of one ledger. Used from one event loop.

    A subclass keeps the records, and writes the rows (`RowRecorder`) or not (`MemoryStore`).
    """

    @abstractmethod
    def put_ticket(self, ticket: Ticket) -> None:
        """The ticket was issued, or its state, drop reason, bound, step, position, begin or closing changed.

        If it was dropped, its records are released.
        """

    @abstractmethod
    def put_parts(self, position: Ticket) -> None:
        """The samples in `position.parts` have entered a position; they never enter another one."""

    @abstractmethod
    def put_sample(self, sample: SampleSummary, record: Record) -> None:
        """A sample was accepted, with its routes if it has some. The row of its lease need not be written
        again."""

    @abstractmethod
    def put_failure(self, ticket: Ticket, sample_index: int) -> None:
        """A sample failed; `ticket.num_failures` and `ticket.failed` have the new state."""

    @abstractmethod
    def put_entry(self, ticket_id: int, sample_index: int, *, journal: Journal, data: bytes) -> None:
        """The next entry of a session's journal; `journal.num_entries` does not count it yet."""

    @abstractmethod
    def forget_journal(self, ticket_id: int, sample_index: int) -> None:
        """The journal of a sample's session is not needed any more."""

    @abstractmethod
    def entries_of(self, ticket_id: int, sample_index: int, *, first: int, max_bytes: int) -> list[bytes]:
        """The durable entries of a journal from number `first` on: about `max_bytes`, at least one if there
        is one."""

    @abstractmethod
    def put_lease(self, lease: LeaseRecord, *, server_incarnation: int) -> None:
        """A lease was granted, or a sample that was not accepted was removed from it."""

    @abstractmethod
    def end_lease(self, lease_id: int) -> None:
        """A lease is finished or lost."""

    @abstractmethod
    def put_row(self, row: EventRow) -> None:
        """An evaluation was requested or changed its state, a version was allocated, trained steps were
        undone, an operator did something, or a setting has another value from a step on."""

    @abstractmethod
    def put_scalar(self, name: str, value: int) -> None:
        """A named number of the ledger changed: `trainer_step`, `committed_step`, `cursor`, ..."""

    @abstractmethod
    def push_returned(self, prompt: Prompt) -> None:
        """A prompt was given back: it is now the last in the queue of returned prompts."""

    @abstractmethod
    def pop_returned(self) -> None:
        """The first prompt in the queue of returned prompts was issued again."""

    @abstractmethod
    def put_attempt(self, step: int, num_starts: int) -> None:
        """`num_starts` trainers have begun `step`; 0: the step is complete, or its data changed."""

    @abstractmethod
    def put_counters(self, values: Mapping[str, float]) -> None:
        """New values of some counters; the others stay."""

    @abstractmethod
    def release(self, ticket: Ticket) -> None:
        """The records of this ticket (trained, evaluated or split) are no longer needed. A position of parts
        has none of its own."""

    @abstractmethod
    def records_of(self, ticket: Ticket) -> list[Record]:
        """All records of a complete ticket, in the order of `Ticket.record_keys`; those with routes on disk
        lack them (`routes_reader`).

        Raises StoreCorruptError if they are damaged.
        """

    def routes_reader(self, records: Sequence[Record]) -> Callable[[], list[Record]]:
        """A function that returns these records (of `records_of`) with their routes.

        It may run in any thread, as the routes of a group can have a hundred MB. It raises StoreCorruptError
        if they are damaged, or were released meanwhile.
        """
        return lambda: list(records)

    def when_durable(self, then: Callable[[], None]) -> None:
        """Calls `then` in the event loop once everything written so far is as durable as the store promises:
        at once if there is no disk to wait for.

        Calls keep their order.
        """
        then()

    def recover(self, *, ignoring: Collection[int] = ()) -> Recovered:
        """Everything that earlier processes wrote. Call it once, before the first write.

        Raises StoreCorruptError if trajectories of live tickets are damaged, except tickets in `ignoring`.
        """
        return Recovered()

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of records and routes held in memory."""

    @property
    def write_blocked_reason(self) -> str:
        """Why nothing can be made durable now (`disk full: ...`); empty if writes succeed.

        Admit nothing new while it is set.
        """
        return ""

    @abstractmethod
    def close(self) -> None:
        """Writes pending rows and records, as far as the disk has space, and closes the files."""
