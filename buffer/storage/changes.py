"""Collects the rows that the ledger wrote since the last batch, to be written as one transaction.

Tickets and leases are mutable, so their rows are built at the time of the write; later writes of the same row
replace earlier ones. The event loop fills a `Changes` object and then passes it to the writer's thread, which
calls `sql.apply`; the event loop does not change it after that. Pure: no file, no thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.wire.records import Record
from buffer.prompts.order import Prompt
from buffer.storage.base import EventRow, Recovered, Store
from buffer.tickets import Journal, LeaseRecord, SampleSummary, State, Ticket

Row = tuple[Any, ...]


@dataclass(kw_only=True, slots=True)
class Changes:
    """Rows by key; None: the row is deleted."""

    tickets: dict[int, Row] = field(default_factory=dict)
    parts: list[Row] = field(default_factory=list)
    """Samples of closed groups that entered a position: (ticket id, sample index, position, slot)."""
    samples: list[tuple[SampleSummary, Record]] = field(default_factory=list)
    """Accepted samples. Their rows also contain the position of the record on disk, which the writer adds."""
    failures: dict[tuple[int, int], tuple[int, bool]] = field(default_factory=dict)
    """Number of failures, and whether the sample was given up, by (ticket id, sample index)."""
    forgotten: set[tuple[int, int]] = field(default_factory=set)
    """Journals to delete, by (ticket id, sample index), before `entries` are written."""
    entries: dict[tuple[int, int], list[Row]] = field(default_factory=dict)
    """New entries of journals, by (ticket id, sample index)."""
    leases: dict[int, Row | None] = field(default_factory=dict)
    rows: list[EventRow] = field(default_factory=list)
    scalars: dict[str, int] = field(default_factory=dict)
    returned: dict[int, Row | None] = field(default_factory=dict)
    """Prompts by index in the queue of prompts given back."""
    attempts: dict[int, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    evaluated: list[int] = field(default_factory=list)
    """Tickets whose records are kept but will not be fetched: they need no memory."""
    released: list[int] = field(default_factory=list)
    """Tickets whose records will no longer be fetched."""

    @property
    def num_entry_bytes(self) -> int:
        """Bytes of new entries of journals."""
        return sum(len(row[-1]) for entries in self.entries.values() for row in entries)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


class RowRecorder(Store):
    """A store whose `put_*` methods add their rows to `changes`. Subclasses write `changes` to a database."""

    def __init__(self) -> None:
        self.changes = Changes()
        self._first_returned = 0
        self._next_returned = 0

    def _changed(self) -> None:
        """Called after each write."""

    def _continue_from(self, recovered: Recovered, *, first_returned: int) -> None:
        self._first_returned = first_returned
        self._next_returned = first_returned + len(recovered.returned)

    def put_ticket(self, ticket: Ticket) -> None:
        self.changes.tickets[ticket.ticket_id] = (
            ticket.ticket_id,
            ticket.purpose.value,
            ticket.prompt_index,
            ticket.num_samples,
            ticket.parent,
            ticket.num_reissues,
            ticket.eval_id,
            ticket.max_staleness,
            ticket.state.value,
            ticket.drop.value if ticket.drop else None,
            ticket.step if ticket.step >= 0 else None,
            ticket.position if ticket.position >= 0 else None,
            ticket.num_greedy,
            ticket.eval_set,
            ticket.begin_step,
            ticket.close_step,
            f"[{','.join(map(str, ticket.early))}]",
        )
        if ticket.state is State.DROPPED:
            self.changes.released.append(ticket.ticket_id)
        elif ticket.state is State.EVALUATED:
            self.changes.evaluated.append(ticket.ticket_id)
        self._changed()

    def put_parts(self, position: Ticket) -> None:
        self.changes.parts += [
            (ticket_id, sample_index, position.ticket_id, slot)
            for slot, (ticket_id, sample_index) in enumerate(position.parts)
        ]
        self._changed()

    def put_sample(self, sample: SampleSummary, record: Record) -> None:
        self.changes.samples.append((sample, record))
        self._changed()

    def put_failure(self, ticket: Ticket, sample_index: int) -> None:
        self.changes.failures[ticket.ticket_id, sample_index] = (
            ticket.num_failures[sample_index],
            sample_index in ticket.failed,
        )
        self._changed()

    def put_entry(self, ticket_id: int, sample_index: int, *, journal: Journal, data: bytes) -> None:
        row = (ticket_id, sample_index, journal.num_entries, journal.session, journal.oldest_step, data)
        self.changes.entries.setdefault((ticket_id, sample_index), []).append(row)
        self._changed()

    def forget_journal(self, ticket_id: int, sample_index: int) -> None:
        self.changes.entries.pop((ticket_id, sample_index), None)
        self.changes.forgotten.add((ticket_id, sample_index))
        self._changed()

    def put_lease(self, lease: LeaseRecord, *, server_incarnation: int) -> None:
        outstanding = f"[{','.join(map(str, sorted(lease.outstanding)))}]"
        self.changes.leases[lease.lease_id] = (
            lease.lease_id,
            lease.ticket_id,
            lease.server,
            server_incarnation,
            lease.weights_step,
            outstanding,
        )
        self._changed()

    def end_lease(self, lease_id: int) -> None:
        self.changes.leases[lease_id] = None
        self._changed()

    def put_row(self, row: EventRow) -> None:
        self.changes.rows.append(row)
        self._changed()

    def put_scalar(self, name: str, value: int) -> None:
        self.changes.scalars[name] = value
        self._changed()

    def push_returned(self, prompt: Prompt) -> None:
        queue_index = self._next_returned
        self.changes.returned[queue_index] = (queue_index, prompt.index, prompt.parent, prompt.num_reissues)
        self._next_returned += 1
        self._changed()

    def pop_returned(self) -> None:
        assert self._first_returned < self._next_returned, "no prompt was given back"
        self.changes.returned[self._first_returned] = None
        self._first_returned += 1
        self._changed()

    def put_attempt(self, step: int, num_starts: int) -> None:
        self.changes.attempts[step] = num_starts
        self._changed()

    def put_counters(self, values: Mapping[str, float]) -> None:
        self.changes.counters |= values
        self._changed()

    def release(self, ticket: Ticket) -> None:
        self.changes.released.append(ticket.ticket_id)
        self._changed()
