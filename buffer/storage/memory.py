"""The store of `buffer.durability=none`: records in memory and no rows. Nothing survives the process."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from areal_like.errors import StoreCorruptError, UserError
from areal_like.wire.records import Record
from buffer.settings import DURABILITY
from buffer.storage import sql
from buffer.storage.base import EventRow, SettingRow, Store, first_of
from buffer.tickets import Journal, SampleSummary, State, Ticket

log = logging.getLogger(__name__)


class MemoryStore(Store):
    """A `Store` that acknowledges at once.

    Its size depends on the number of tickets in flight and not on the length of the run.
    """

    def __init__(self) -> None:
        self._records: dict[int, dict[int, Record]] = {}
        self._num_bytes = 0
        self._journals: dict[tuple[int, int], list[bytes]] = {}

    def put_entry(self, ticket_id: int, sample_index: int, *, journal: Journal, data: bytes) -> None:
        self._journals.setdefault((ticket_id, sample_index), []).append(data)

    def forget_journal(self, ticket_id: int, sample_index: int) -> None:
        self._journals.pop((ticket_id, sample_index), None)

    def entries_of(self, ticket_id: int, sample_index: int, *, first: int, max_bytes: int) -> list[bytes]:
        entries = self._journals.get((ticket_id, sample_index), [])[first:]
        return first_of(entries, max_bytes=max_bytes)

    def put_ticket(self, ticket: Ticket) -> None:
        """Releases the records of a ticket that ended untrained: those of an evaluation could not be read
        either."""
        if ticket.state.is_terminal and ticket.state not in (State.TRAINED, State.SPLIT):
            self.release(ticket)

    def put_sample(self, sample: SampleSummary, record: Record) -> None:
        self._records.setdefault(record.ticket_id, {})[record.sample_index] = record
        self._num_bytes += record.num_bytes

    def release(self, ticket: Ticket) -> None:
        for record in self._records.pop(ticket.ticket_id, {}).values():
            self._num_bytes -= record.num_bytes

    def records_of(self, ticket: Ticket) -> list[Record]:
        return [self._records[ticket_id][index] for ticket_id, index in ticket.record_keys]

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def close(self) -> None:
        pass

    def _not_kept(self, *row: Any, **fields: Any) -> None:
        """Ignores a row."""

    put_parts = put_failure = put_lease = end_lease = put_row = put_scalar = _not_kept
    push_returned = pop_returned = put_attempt = put_counters = _not_kept


class MemoryWithLedger(MemoryStore):
    """The store of a run that continues with `buffer.durability=none` although it has a ledger on disk.

    The steps of such a buffer are not in any ledger. The ledger on disk gets one row with the first of these
    steps, so that the audit does not look for them there, and `areal-like samples` and the report can mention
    it.
    """

    def __init__(self, ledger: Path) -> None:
        """`ledger`: the directory of a ledger that no buffer has open."""
        super().__init__()
        self._file = ledger / "ledger.sqlite3"

    def put_row(self, row: EventRow) -> None:
        if not isinstance(row, SettingRow) or row.key != DURABILITY:
            return
        try:
            with closing(sql.connect(self._file, synchronous="NORMAL")) as connection:
                connection.execute(
                    "INSERT INTO settings VALUES (?, ?, ?, ?, ?, ?)",
                    (None, row.step, row.key, row.value, row.origin, row.unix_s),
                )
        except (sqlite3.Error, StoreCorruptError, UserError) as error:
            log.warning("%s has no row about the steps that are not in it: %s", self._file, error)
