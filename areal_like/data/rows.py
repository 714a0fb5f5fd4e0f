"""Opens the rows of a source: a sequence in mapped memory, with a fingerprint and the place of each row.

A row is decoded when it is asked for (about 10 us for a kilobyte), so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from areal_like.data.cache import Entry, entry_of, open_entry
from areal_like.data.sources import sources_of
from areal_like.errors import ConfigError

T = TypeVar("T")
_ENTRIES = "cached"


def open_rows(source: str | Sequence[Any] | Mapping[str, Any], *, split: str = "train", key: str) -> Rows:
    """The rows of JSON lines, parquet, several files, a pattern, or a hub data set (`sources.py`).

    The first call for a file copies its rows into the cache, about 100,000 in a second; later ones take
    milliseconds. `split`: of a hub data set that names none. `key`: the setting's name, for errors. Raises
    ConfigError for a missing file, a row that is no JSON object (with file and line), or no rows.
    """
    if isinstance(source, Mapping) and _ENTRIES in source:
        return Rows([open_entry(str(name), key=key) for name in source[_ENTRIES]])
    rows = Rows([entry_of(one, key=key) for one in sources_of(source, split=split, key=key)])
    if not len(rows):
        raise ConfigError(f"{key}={source}: there are no rows")
    return rows


class Rows:
    """A sequence of rows, each a dict. Equal in every process that opens the same content."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        """The rows of the entries, one after the other."""
        self._entries = list(entries)
        self._starts = [0, *accumulate(len(entry.table) for entry in self._entries)]
        contents = [entry.content for entry in self._entries]
        self.fingerprint: str = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
        """16 hex digits over the content of all rows; not over names and times of files."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = json.loads(self.text(index))
        assert isinstance(row, dict)
        return row

    def text(self, index: int) -> bytes:
        """A row as JSON in UTF-8. Raises IndexError."""
        text = self._cell("row", index)
        assert isinstance(text, bytes)
        return text

    def place(self, index: int) -> str:
        """Where a row stands: `train.jsonl:17`, with the line (of parquet the row), counted from 1."""
        return f"{self._entries[self._entry(index)].label}:{self._cell('number', index)}"

    def read(self, index: int, reader: Callable[[dict[str, Any]], T]) -> T:
        """`reader` of a row. A ConfigError that it raises gets the row's place."""
        try:
            return reader(self[index])
        except ConfigError as error:
            raise ConfigError(f"{self.place(index)}: {error}") from error

    @property
    def cached(self) -> dict[str, list[str]]:
        """A source with which another process of this machine opens these rows, whatever becomes of the
        files."""
        return {_ENTRIES: [entry.name for entry in self._entries]}

    def _entry(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return bisect_right(self._starts, index) - 1

    def _cell(self, column: str, index: int) -> Any:
        number = self._entry(index)
        return self._entries[number].table[column][index - self._starts[number]].as_py()
