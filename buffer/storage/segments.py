"""Segments: files to which one thread appends trajectories, in batches that can be undone.

    write(records) -> (the transaction with their rows commits) -> keep()   the batch is kept
    write(records) -> cut()                                                 disk full: the batch is removed

A row may refer to bytes only if they are at least as durable as the row: with `sync`, `write` returns when
the bytes and the directory entry of a new file are on disk. If a batch is interrupted, its bytes are at the
end of a segment and no row refers to them; the next start removes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from areal_like.wire.records import RecordLocation, count_whole_records, crc32_of, segment_path

_MAX_BUFFERS = 1024
"""Limit of one writev (IOV_MAX)."""


class SegmentWriter:
    """Appends records to the newest segment and begins another one when it is full."""

    def __init__(self, directory: Path, *, segment: int, offset: int, segment_bytes: int, sync: bool) -> None:
        """Continues at `offset` of a segment, which is created if it does not exist."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._sync = sync
        self._file = -1
        self.segment = segment
        self.offset = offset
        self._kept = (segment, offset)
        self._open(segment)
        os.ftruncate(self._file, offset)

    def write(self, records: Sequence[bytes]) -> list[RecordLocation]:
        """Appends the records and returns their positions. Call `cut` after an OSError."""
        locations: list[RecordLocation] = []
        for segment_records in self._by_segment(records, locations):
            for start in range(0, len(segment_records), _MAX_BUFFERS):
                self._write_all(segment_records[start : start + _MAX_BUFFERS])
            if self._sync and segment_records:
                os.fdatasync(self._file)
        return locations

    def keep(self) -> None:
        """The transaction with the rows has committed: `cut` will no longer remove the written records."""
        self._kept = (self.segment, self.offset)

    def cut(self) -> None:
        """Removes everything written since the last `keep`."""
        segment, offset = self._kept
        for newer in range(segment + 1, self.segment + 1):
            segment_path(self._directory, newer).unlink(missing_ok=True)
        self._open(segment)
        os.ftruncate(self._file, offset)
        self.offset = offset

    def close(self) -> None:
        os.close(self._file)

    def _by_segment(self, records: Sequence[bytes], locations: list[RecordLocation]) -> Iterator[list[bytes]]:
        """The records of one segment after another. The caller writes each list before it takes the next."""
        here: list[bytes] = []
        for record in records:
            if self.offset > 0 and self.offset + len(record) > self._segment_bytes:
                yield here
                here = []
                self._open(self.segment + 1)
                self.offset = 0
            locations.append(RecordLocation(self.segment, self.offset, len(record), crc32_of(record)))
            here.append(record)
            self.offset += len(record)
        yield here

    def _open(self, segment: int) -> None:
        path = segment_path(self._directory, segment)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file >= 0:
            os.close(self._file)
        self._file, self.segment = file, segment
        if self._sync:
            sync_directory(path.parent)

    def _write_all(self, records: list[bytes]) -> None:
        num_written = os.writev(self._file, records)
        # A disk that becomes full accepts some of the bytes and refuses the rest.
        if num_written < sum(map(len, records)):
            rest = memoryview(b"".join(records))[num_written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]


def sync_directory(directory: Path) -> None:
    """Makes the names of the files in a directory durable (fsync)."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def unreferenced_tail(directory: Path, *, segment: int, offset: int) -> tuple[int, int]:
    """(complete records, bytes of an incomplete record) after the last byte that a row refers to."""
    try:
        with segment_path(directory, segment).open("rb") as file:
            file.seek(offset)
            tail = file.read()
    except FileNotFoundError:
        return 0, 0
    num_records, num_bytes = count_whole_records(tail)
    return num_records, len(tail) - num_bytes
