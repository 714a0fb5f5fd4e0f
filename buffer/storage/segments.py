"""The files that trajectories are appended to: written by one thread, in batches, each of which may be taken back.

    write(records) -> (the ledger's row commits) -> keep()     a batch that stays
    write(records) -> cut()                                    the disk was full: as if nothing had happened

A row may name bytes only when they are as safe as the row: with `sync` they are on the disk before `write` returns, and so is the name of a
new file. What an interrupted batch left behind the last named byte is cut at the next start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from areal_like.wire.records import Place, count_whole_records, crc32_of, segment_path

_MAX_BUFFERS = 1024
"""Of one writev (IOV_MAX)."""


class SegmentWriter:
    """Appends to the newest segment and begins another when it is full."""

    def __init__(self, directory: Path, *, segment: int, offset: int, segment_bytes: int, sync: bool) -> None:
        """Goes on at `offset` of a segment that may or may not exist."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._sync = sync
        self._file = -1
        self.segment = segment
        self.offset = offset
        self._kept = (segment, offset)
        self._open(segment)
        os.ftruncate(self._file, offset)

    def write(self, records: Sequence[bytes]) -> list[Place]:
        """Appends the records. After an OSError call `cut`."""
        places: list[Place] = []
        for segment_records in self._divided(records, places):
            for start in range(0, len(segment_records), _MAX_BUFFERS):
                self._write_all(segment_records[start : start + _MAX_BUFFERS])
            if self._sync and segment_records:
                os.fdatasync(self._file)
        return places

    def keep(self) -> None:
        """The ledger names what was written: it stays."""
        self._kept = (self.segment, self.offset)

    def cut(self) -> None:
        """Takes back what was written since the last `keep`."""
        segment, offset = self._kept
        for newer in range(segment + 1, self.segment + 1):
            segment_path(self._directory, newer).unlink(missing_ok=True)
        self._open(segment)
        os.ftruncate(self._file, offset)
        self.offset = offset

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _divided(self, records: Sequence[bytes], places: list[Place]) -> Iterator[list[bytes]]:
        """Records of one segment after another; the caller writes each list before it asks for the next."""
        here: list[bytes] = []
        for record in records:
            if self.offset > 0 and self.offset + len(record) > self._segment_bytes:
                yield here
                here = []
                self._open(self.segment + 1)
                self.offset = 0
            places.append(Place(self.segment, self.offset, len(record), crc32_of(record)))
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
        if num_written < sum(
            map(len, records)
        ):  # a disk that fills up takes a part first and refuses the rest
            rest = memoryview(b"".join(records))[num_written:]
            while rest:
                rest = rest[os.write(self._file, rest) :]


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def unnamed_tail(directory: Path, *, segment: int, offset: int) -> tuple[int, int]:
    """(whole records, torn bytes) behind the last byte of a segment that a row names."""
    try:
        with segment_path(directory, segment).open("rb") as file:
            file.seek(offset)
            tail = file.read()
    except FileNotFoundError:
        return 0, 0
    num_records, num_bytes = count_whole_records(tail)
    return num_records, len(tail) - num_bytes
