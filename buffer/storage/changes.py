"""What the ledger wrote since the last hand-over, as rows: taken from mutable tickets at once, folded so that the last state counts.

A `Changes` is one transaction. It is filled in the event loop and then belongs to whoever applies it (`schema.apply`), so that no row
ever changes under a writer. Pure: no file, no thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.wire.records import Record
from buffer.prompts.order import Prompt
from buffer.storage.base import Recovered, RollbackRow, VersionRow
from buffer.tickets import LeaseRecord, Sample, State, Ticket

Row = tuple[Any, ...]


@dataclass(kw_only=True, slots=True)
class Changes:
    """Rows by key; None: the row goes."""

    tickets: dict[int, Row] = field(default_factory=dict)
    samples: list[tuple[Sample, Record]] = field(default_factory=list)
    """Accepted samples: the row is made of both when it is known where the record is."""
    failures: dict[tuple[int, int], int] = field(default_factory=dict)
    leases: dict[int, Row | None] = field(default_factory=dict)
    versions: list[VersionRow] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    returned: dict[int, Row | None] = field(default_factory=dict)
    """By place in the queue of prompts given back."""
    attempts: dict[int, int] = field(default_factory=dict)
    rollbacks: list[RollbackRow] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)
    released: list[int] = field(default_factory=list)
    """Tickets whose records nobody will ask for any more."""

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


class RowRecorder:
    """The writing half of `Store`, into `changes`. Subclasses say what becomes of them."""

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
        """See Store."""
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
        )
        if ticket.state.is_terminal and ticket.state is not State.TRAINED:
            self.changes.released.append(ticket.ticket_id)
        self._changed()

    def put_sample(self, sample: Sample, record: Record) -> None:
        """See Store."""
        self.changes.samples.append((sample, record))
        self._changed()

    def put_failure(self, ticket: Ticket, sample_index: int) -> None:
        """See Store."""
        self.changes.failures[ticket.ticket_id, sample_index] = ticket.num_failures[sample_index]
        self._changed()

    def put_lease(self, lease: LeaseRecord, *, server_incarnation: int) -> None:
        """See Store."""
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
        """See Store."""
        self.changes.leases[lease_id] = None
        self._changed()

    def put_version(self, row: VersionRow) -> None:
        """See Store."""
        self.changes.versions.append(row)
        self._changed()

    def put_mark(self, name: str, value: int) -> None:
        """See Store."""
        self.changes.marks[name] = value
        self._changed()

    def push_returned(self, prompt: Prompt) -> None:
        """See Store."""
        self.changes.returned[self._next_returned] = (
            self._next_returned,
            prompt.index,
            prompt.parent,
            prompt.num_reissues,
        )
        self._next_returned += 1
        self._changed()

    def pop_returned(self) -> None:
        """See Store."""
        assert self._first_returned < self._next_returned, "no prompt was given back"
        self.changes.returned[self._first_returned] = None
        self._first_returned += 1
        self._changed()

    def put_attempt(self, step: int, num_starts: int) -> None:
        """See Store."""
        self.changes.attempts[step] = num_starts
        self._changed()

    def put_rollback(self, row: RollbackRow) -> None:
        """See Store."""
        self.changes.rollbacks.append(row)
        self._changed()

    def put_statistics(self, values: Mapping[str, float]) -> None:
        """See Store."""
        self.changes.statistics |= values
        self._changed()

    def release(self, ticket: Ticket) -> None:
        """See Store."""
        self.changes.released.append(ticket.ticket_id)
        self._changed()
