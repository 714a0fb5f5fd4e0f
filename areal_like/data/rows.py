"""Opens the rows of a source: a memory-mapped sequence with a fingerprint and the location of each row.

A row is decoded when it is read (about 10 us for a kilobyte), so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from areal_like.data.cache import CachedRows, Numbers, entry_of, open_entry, open_selection, store_selection
from areal_like.data.sources import sources_of
from areal_like.errors import ConfigError

T = TypeVar("T")
_ENTRIES, _SELECTION = "cached", "selection"


def open_rows(source: str | Sequence[Any] | Mapping[str, Any], *, split: str = "train", key: str) -> Rows:
    """The rows of JSON lines, parquet, several files, a pattern, or a hub data set (`sources.py`).

    The first call for a file copies its rows into the cache, about 100,000 in a second; later ones take
    milliseconds. `split`: of a hub data set that names none. `key`: the setting's name, for errors. Raises
    ConfigError for a missing file, a row that is not a JSON object (with file and line), or no rows.
    """
    if isinstance(source, Mapping) and _ENTRIES in source:
        entries = [open_entry(str(name), key=key) for name in source[_ENTRIES]]
        name = source.get(_SELECTION)
        return Rows(entries, None if name is None else open_selection(str(name), key=key))
    rows = Rows([entry_of(one, key=key) for one in sources_of(source, split=split, key=key)])
    if not len(rows):
        raise ConfigError(f"{key}={source}: there are no rows")
    return rows


class Rows:
    """A sequence of rows, each a dict. Equal in every process that opens the same content."""

    def __init__(self, entries: Sequence[CachedRows], selection: Numbers | None = None) -> None:
        """The rows of the entries, one after the other; with `selection`, only those rows, in its order."""
        self._selection = selection
        self._entries = list(entries)
        self._starts = [0, *accumulate(len(entry.table) for entry in self._entries)]
        contents = [entry.content for entry in self._entries]
        self.fingerprint: str = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
        """16 hex digits: a hash of the content of all rows and the selection, but not of file names and
        times."""
        if selection is not None:
            digest = hashlib.sha256(self.fingerprint.encode() + np.ascontiguousarray(selection).tobytes())
            self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._starts[-1] if self._selection is None else len(self._selection)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = json.loads(self.text(index))
        assert isinstance(row, dict)
        return row

    def text(self, index: int) -> bytes:
        """A row as JSON in UTF-8. Raises IndexError."""
        entry, row = self._at(index)
        text = entry.table["row"][row].as_py()
        assert isinstance(text, bytes)
        return text

    def place(self, index: int) -> str:
        """The location of a row, `train.jsonl:17`: the line (in parquet the row), counted from 1."""
        entry, row = self._at(index)
        return f"{entry.label}:{entry.table['number'][row].as_py()}"

    def read(self, index: int, reader: Callable[[dict[str, Any]], T]) -> T:
        """Applies `reader` to a row. A ConfigError that it raises gets the row's location."""
        try:
            return reader(self[index])
        except ConfigError as error:
            raise ConfigError(f"{self.place(index)}: {error}") from error

    def only(self, numbers: Numbers) -> Rows:
        """The rows with these numbers, in this order; this object itself if these are all rows."""
        if len(numbers) == len(self) and bool(np.all(numbers == np.arange(len(self)))):
            return self
        return Rows(self._entries, numbers if self._selection is None else self._selection[numbers])

    @property
    def cached(self) -> dict[str, Any]:
        """A source with which another process of this machine opens these rows, even if the files change."""
        source: dict[str, Any] = {_ENTRIES: [entry.name for entry in self._entries]}
        return source if self._selection is None else source | {_SELECTION: store_selection(self._selection)}

    def _at(self, index: int) -> tuple[CachedRows, int]:
        """The entry that has a row, and the row's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index if self._selection is None else int(self._selection[index])
        number = bisect_right(self._starts, row) - 1
        return self._entries[number], row - self._starts[number]
