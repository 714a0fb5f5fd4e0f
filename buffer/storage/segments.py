"""Segments: files to which one thread appends trajectories, in batches that can be undone.

    write(samples) -> (the transaction with their rows commits) -> keep()   the batch is kept
    write(samples) -> cut()                                                 disk full: the batch is removed

A row may refer to bytes only if they are at least as durable as the row: with `sync`, `write` returns when
the bytes and the directory entry of a new file are on disk. If a batch is interrupted, its bytes are at the
end of a segment and no row refers to them; the next start removes them.

The routes of a sample are in the same file right after its record, and part of the same write. So what
happens to the record (an interrupted batch, a full disk, the deletion of the file) happens to them too, and
no row names them.
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

    def write(self, samples: Sequence[Sequence[bytes]]) -> list[RecordLocation]:
        """Appends samples: each a record, and the block of its routes if it has some.

        Returns the positions of the records; a block begins where its record ends. Call `cut` after an
        OSError.
        """
        locations: list[RecordLocation] = []
        for parts in self._by_segment(samples, locations):
            for start in range(0, len(parts), _MAX_BUFFERS):
                self._write_all(parts[start : start + _MAX_BUFFERS])
            if self._sync and parts:
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

    def _by_segment(
        self, samples: Sequence[Sequence[bytes]], locations: list[RecordLocation]
    ) -> Iterator[list[bytes]]:
        """The samples of one segment after another, as bytes. The caller writes each list before it takes
        the next."""
        here: list[bytes] = []
        for parts in samples:
            record, num_bytes = parts[0], sum(map(len, parts))
            if self.offset > 0 and self.offset + num_bytes > self._segment_bytes:
                yield here
                here = []
                self._open(self.segment + 1)
                self.offset = 0
            locations.append(RecordLocation(self.segment, self.offset, len(record), crc32_of(record)))
            here += parts
            self.offset += num_bytes
        yield here

    def _open(self, segment: int) -> None:
        path = segment_path(self._directory, segment)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file >= 0:
            os.close(self._file)
        self._file, self.segment = file, segment
        if self._sync:
            sync_directory(path.parent)

    def _write_all(self, parts: list[bytes]) -> None:
        num_written = os.writev(self._file, parts)
        # A disk that becomes full accepts some of the bytes and refuses the rest.
        if num_written < sum(map(len, parts)):
            rest = memoryview(b"".join(parts))[num_written:]
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
