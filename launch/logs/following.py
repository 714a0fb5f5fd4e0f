"""Follows the logs of a run as they grow, across rotations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from launch.logs.files import MAX_LINE_BYTES, Entry, LineParser, LogFiles

_MAX_LINES = 10_000
"""Most lines of one file in one poll, to bound memory; the next poll reads the rest."""


class Follower:
    """Reads what is appended to the newest file of each source.

    open -> grows -> renamed (the rest of it is read first) -> the new file of its name is opened
                  -> shorter than before (truncated) -> read from its beginning
    """

    def __init__(self, sources: Callable[[], Sequence[LogFiles]], *, starts: dict[Path, int]) -> None:
        """`sources`: called at each poll, because daemons may join. `starts`: bytes shown, by file."""
        self._sources = sources
        self._open: dict[Path, _OpenFile] = {}
        self._starts = starts

    def poll(self) -> list[Entry]:
        """The new entries, in the order of their times."""
        found: list[Entry] = []
        for source in self._sources():
            path = source.files[-1]
            file = self._open.get(path)
            if file is None:
                with contextlib.suppress(OSError):
                    self._open[path] = file = _OpenFile(source, path, start=self._starts.pop(path, 0))
            if file is not None:
                found += file.read()
        return sorted(found)

    def close(self) -> None:
        """Closes the files."""
        for file in self._open.values():
            file.close()


class _OpenFile:
    def __init__(self, source: LogFiles, path: Path, *, start: int) -> None:
        self._source, self._path = source, path
        self._file: BinaryIO = path.open("rb")
        self._file.seek(start)
        self._rest = b""
        """The beginning of a line that is still incomplete."""
        self._parser = LineParser(source, unix_s=os.fstat(self._file.fileno()).st_mtime)

    def read(self) -> list[Entry]:
        entries = self._read_on()
        with contextlib.suppress(OSError):
            mine, now = os.fstat(self._file.fileno()), self._path.stat()
            if (mine.st_ino, mine.st_dev) != (now.st_ino, now.st_dev):
                entries += self._read_on()
                new = self._path.open("rb")
                self._file.close()
                self._file, self._rest = new, b""
                entries += self._read_on()
            elif now.st_size < self._file.tell():
                self._file.seek(0)
                self._rest = b""
                entries += self._read_on()
        return entries

    def _read_on(self) -> list[Entry]:
        entries = []
        for _ in range(_MAX_LINES):
            line = self._rest + self._file.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                self._rest = line
                break
            self._rest = b""
            if (entry := self._parser.entry(line)) is not None:
                entries.append(entry)
        return entries

    def close(self) -> None:
        self._file.close()
