"""The one thread that waits for the disk: takes batches in order, makes each durable, and says so.

    batch -> records into a segment (fsync) -> rows into SQLite (fsync) -> done(batch) in the event loop

One batch is one transaction: what piles up in the loop while the disk is busy becomes the next one (group commit). A row never names bytes
that are less durable than itself, hence the order. When there is no space a batch is taken back whole and tried again until there is, so a
full disk costs time and nothing else; what frees space may use what `buffer.min_free_bytes` keeps. Any other error ends the writer: after a
failed fsync nobody knows what the disk holds (the kernel drops the pages), so going on could only acknowledge what is not there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from areal_like.wire.records import Place, segment_path
from buffer.storage import sql as schema
from buffer.storage.changes import Changes
from buffer.storage.segments import SegmentWriter
from buffer.storage.sql import SegmentRow

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_HANGS_AFTER_S = 5.0
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SQLITE_WAITS = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"})
"""What SQLite makes of the three above: nothing was written, and it may succeed later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One transaction."""

    changes: Changes
    callbacks: list[Callable[[], None]]
    """To be called, in order, when it is durable."""
    gone_segments: list[int]
    """Files that no durable row needs any more."""


class _NoSpaceError(Exception):
    """The batch was not written, and may be later."""


class Writer:
    """RUNNING -> close() -> CLOSED | error -> FAILED. Owns the segment files and, while it runs, the connection."""

    def __init__(
        self,
        directory: Path,
        connection: sqlite3.Connection,
        segments: SegmentWriter,
        *,
        retain: bool,
        min_free_bytes: int,
        loop: asyncio.AbstractEventLoop,
        on_done: Callable[[Batch, list[Place]], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """`on_done` and `on_error` are called in `loop`."""
        self._directory = directory
        self._connection = connection
        self._segments = segments
        self._retain = retain
        self._min_free_bytes = min_free_bytes
        self._loop = loop
        self._on_done = on_done
        self._on_error = on_error
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._refused_because = ""
        """Why the batch at hand cannot be written now."""
        self._writing_since_s: float | None = None
        self.is_pressed = False
        """Set by the owner while something waits that will free space: the batch at hand may use what is kept free."""
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    @property
    def health(self) -> str:
        """Why the batch at hand is not written; empty while all is well. From any thread."""
        since_s = self._writing_since_s
        if self._refused_because or since_s is None:
            return self._refused_because
        seconds = time.monotonic() - since_s
        return (
            f"disk hangs: a write in {self._directory} has taken {seconds:.0f} s"
            if seconds > _HANGS_AFTER_S
            else ""
        )

    def submit(self, batch: Batch) -> None:
        """Queues a batch."""
        self._batches.put(batch)

    def close(self) -> None:
        """Writes what was submitted, if there is space for it, and ends the thread."""
        self._closing.set()
        self._batches.put(None)
        self._thread.join()
        self._segments.close()

    def _run(self) -> None:
        try:
            while (batch := self._batches.get()) is not None:
                places = self._write_when_there_is_space(batch)
                if places is None:
                    return
                self._tell(self._on_done, batch, places)
        except (
            Exception
        ) as error:  # the outermost frame of a thread: whoever waits for acknowledgements has to hear of it
            log.exception("the ledger cannot be written")
            self._tell(self._on_error, error)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _write_when_there_is_space(self, batch: Batch) -> list[Place] | None:
        """Where the records are; None: closed before there was space."""
        records = [record.data for _, record in batch.changes.samples]
        while True:
            self._writing_since_s = time.monotonic()
            try:
                places = self._write(batch, records)
            except _NoSpaceError as full:
                if not self._refused_because:
                    log.error("%s", full)
                self._refused_because = str(full)
                if self._closing.wait(_RETRY_S):
                    return None
            else:
                if self._refused_because:
                    log.warning("the ledger is being written again")
                self._refused_because = ""
                return places
            finally:
                self._writing_since_s = None

    def _write(self, batch: Batch, records: list[bytes]) -> list[Place]:
        if records and not (self.is_pressed or batch.changes.released or batch.gone_segments):
            self._check_free(sum(map(len, records)))
        first = self._segments.segment
        try:
            places = self._segments.write(records)
            sizes = {place.segment: place.offset + place.num_bytes for place in places}
            rows = [
                SegmentRow(segment, sizes.get(segment, 0), self._retain)
                for segment in range(first, self._segments.segment + 1)
            ]
            grown = [row for row in rows if row.num_bytes]
            schema.apply(
                self._connection, batch.changes, places, segments=grown, gone_segments=batch.gone_segments
            )
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._segments.cut()
            raise _NoSpaceError(f"disk full: {error.strerror} in {self._directory}") from None
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname == "SQLITE_BUSY":
                reason = (
                    f"locked: another program holds {self._directory}/ledger.sqlite3 (an open sqlite3 shell?)"
                )
            elif error.sqlite_errorname in _SQLITE_WAITS:
                reason = f"disk full: {error} in {self._directory}"
            else:
                raise
            self._segments.cut()
            raise _NoSpaceError(reason) from None
        self._segments.keep()
        for segment in batch.gone_segments:
            segment_path(self._directory, segment).unlink(missing_ok=True)
        return places

    def _check_free(self, num_bytes: int) -> None:
        disk = os.statvfs(self._directory)
        num_free = disk.f_bavail * disk.f_frsize
        if num_free < self._min_free_bytes + num_bytes:
            raise _NoSpaceError(
                f"disk full: {num_free >> 20} MiB are free in {self._directory}, "
                f"of which buffer.min_free_bytes keeps {self._min_free_bytes >> 20} MiB"
            )
