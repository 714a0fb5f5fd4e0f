"""The store of a run that goes on with `buffer.durability=none` although it has a ledger on disk.

The steps of such a buffer are in no ledger. The ledger on disk gets one row that says from which step on, so
that the audit does not look for them there, and `areal-like samples` and the report can say so.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from areal_like.errors import StoreCorruptError, UserError
from buffer.settings import DURABILITY
from buffer.storage import sql
from buffer.storage.memory import MemoryStore
from buffer.storage.rows import SettingRow

log = logging.getLogger(__name__)


class MemoryBesideLedger(MemoryStore):
    """A `MemoryStore` that writes its `buffer.durability` into the ledger on disk."""

    def __init__(self, ledger: Path) -> None:
        """`ledger`: the directory of a ledger that no buffer has open."""
        super().__init__()
        self._file = ledger / "ledger.sqlite3"

    def put_setting(self, row: SettingRow) -> None:
        if row.key != DURABILITY:
            return
        try:
            with closing(sql.connect(self._file, synchronous="NORMAL")) as connection:
                connection.execute(
                    "INSERT INTO settings VALUES (?, ?, ?, ?, ?, ?)",
                    (None, row.step, row.key, row.value, row.origin, row.unix_s),
                )
        except (sqlite3.Error, StoreCorruptError, UserError) as error:
            log.warning("%s has no row about the steps that are not in it: %s", self._file, error)
