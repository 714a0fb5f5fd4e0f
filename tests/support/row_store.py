"""A store that keeps the durable store's rows in an SQLite database in memory, and that can be copied."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from areal_like.wire.records import Record, RecordLocation
from buffer.storage import sql
from buffer.storage.base import Recovered, first_of
from buffer.storage.changes import Changes, RowRecorder
from buffer.tickets import SampleSummary, State, Ticket


class Closing(sqlite3.Connection):
    """Closes itself at its end, in whichever thread; from Python 3.13 on others warn."""

    def __del__(self) -> None:
        self.close()


class RowStore(RowRecorder):
    """`copy()` returns the store that the next buffer would find after a SIGKILL."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, factory=Closing
        )
        self.records: dict[int, dict[int, Record]] = {}
        self.evaluated: set[int] = set()
        """Tickets whose records are on disk only, as in the real store."""
        sql.migrate(self.connection, path=Path(":memory:"))

    def copy(self) -> Self:
        """The rows and records as they are now."""
        self._flush()
        other = type(self)()
        self.connection.backup(other.connection)
        other.records = {ticket_id: dict(samples) for ticket_id, samples in self.records.items()}
        other.evaluated = set(self.evaluated)
        return other

    def recover(self, *, ignoring: Collection[int] = ()) -> Recovered:
        recovered = sql.read_all(self.connection)
        self._continue_from(recovered, first_returned=sql.first_returned(self.connection))
        return recovered

    def put_ticket(self, ticket: Ticket) -> None:
        super().put_ticket(ticket)
        if ticket.state is State.EVALUATED:
            self.evaluated.add(ticket.ticket_id)
        elif ticket.state is State.DROPPED:
            self.records.pop(ticket.ticket_id, None)

    def put_sample(self, sample: SampleSummary, record: Record) -> None:
        super().put_sample(sample, record)
        self.records.setdefault(record.ticket_id, {})[record.sample_index] = record

    def entries_of(self, ticket_id: int, sample_index: int, *, first: int, max_bytes: int) -> list[bytes]:
        self._flush()
        rows = sql.read_entries(self.connection, ticket_id, sample_index, first=first)
        return first_of(list(rows), max_bytes=max_bytes)

    def release(self, ticket: Ticket) -> None:
        super().release(ticket)
        self.records.pop(ticket.ticket_id, None)

    def records_of(self, ticket: Ticket) -> list[Record]:
        return [self.records[ticket_id][index] for ticket_id, index in ticket.record_keys]

    def when_durable(self, then: Callable[[], None]) -> None:
        self._flush()
        then()

    @property
    def num_bytes(self) -> int:
        return sum(
            len(record.data)
            for ticket_id, samples in self.records.items()
            for record in samples.values()
            if ticket_id not in self.evaluated
        )

    @property
    def write_blocked_reason(self) -> str:
        return ""

    def close(self) -> None:
        self.connection.close()

    def _flush(self) -> None:
        changes, self.changes = self.changes, Changes()
        nowhere = RecordLocation(segment=0, offset=0, num_bytes=0, crc32=0)
        sql.apply(self.connection, changes, [nowhere] * len(changes.samples))
