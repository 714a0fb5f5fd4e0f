"""The writer's thread: takes batches in order, makes each one durable, and reports it to the event loop.

    batch -> records and routes into a segment (fsync) -> rows into SQLite (fsync) -> on_done(batch)

A batch is one transaction. Writes that accumulate in the loop while the disk is busy become the next batch
(group commit). Records are written before rows, because a row must never refer to bytes that are less durable
than the row itself. If there is no space, a batch is undone and retried until it fits, so a full disk only
delays the run; batches that free space may use the reserve of `buffer.min_free_bytes`. Any other error ends
the writer: after a failed fsync the content of the disk is unknown (the kernel drops the pages), and the
writer might acknowledge lost data if it continued.
"""

from __future__ import annotations

import asyncio
import contextlib
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

from areal_like.runtime.threads import NamedThread
from areal_like.spans.recorder import record
from areal_like.wire.records import Record, RecordLocation, segment_path
from buffer.storage import sql
from buffer.storage.base import Blocked, SegmentRow
from buffer.storage.changes import Changes
from buffer.storage.segments import SegmentWriter

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_HANGS_AFTER_S = 5.0
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SQLITE_NO_SPACE = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"})
"""SQLite's names for the errors in _NO_SPACE: nothing was written, and a retry may succeed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One transaction."""

    changes: Changes
    callbacks: list[Callable[[], None]]
    """Called in order when the batch is durable."""
    gone_segments: list[int]
    """Files to delete: no durable row refers to them any more."""


class _NoSpaceError(Exception):
    """The batch was not written; a retry may succeed."""


class Writer:
    """RUNNING -> close() -> CLOSED | error -> FAILED.

    Owns the segment files and, while it runs, the connection.
    """

    def __init__(
        self,
        directory: Path,
        connection: sqlite3.Connection,
        segments: SegmentWriter,
        *,
        retain: bool,
        min_free_bytes: int,
        loop: asyncio.AbstractEventLoop,
        on_done: Callable[[Batch, list[RecordLocation]], None],
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
        self._refused_reason = ""
        """Why the current batch cannot be written now; empty if it can."""
        self._writing_since_s: float | None = None
        self.frees_space = False
        """Set by the owner while a batch that frees space waits: the current batch may then use the
        reserve."""
        self._thread = NamedThread(self._run, name="ledger-writer")
        self._thread.start()

    @property
    def blocked_reason(self) -> str:
        """Why the current batch is not written; empty if writes succeed. May be called from any thread."""
        since_s = self._writing_since_s
        if self._refused_reason or since_s is None:
            return self._refused_reason
        seconds = time.monotonic() - since_s
        return (
            f"{Blocked.HANGS}: a write in {self._directory} has taken {seconds:.0f} s"
            if seconds > _HANGS_AFTER_S
            else ""
        )

    def submit(self, batch: Batch) -> None:
        self._batches.put(batch)

    def close(self) -> None:
        """Writes the submitted batches, as far as there is space, and ends the thread."""
        self._closing.set()
        self._batches.put(None)
        self._thread.join()
        self._segments.close()

    def _run(self) -> None:
        try:
            while (batch := self._batches.get()) is not None:
                locations = self._write_when_there_is_space(batch)
                if locations is None:
                    return
                self._call_in_loop(self._on_done, batch, locations)
                del batch  # it holds records and routes, and the next one may be long in coming
        # The outermost frame of the thread: if an error were not reported, acknowledgements would never come.
        except Exception as error:
            log.exception("the ledger cannot be written")
            self._call_in_loop(self._on_error, error)

    def _call_in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _write_when_there_is_space(self, batch: Batch) -> list[RecordLocation] | None:
        """Positions of the records on disk; None if the writer was closed before there was space."""
        samples = [_parts(record) for _, record in batch.changes.samples]
        while True:
            self._writing_since_s = time.monotonic()
            try:
                locations = self._write(batch, samples)
            except _NoSpaceError as full:
                if not self._refused_reason:
                    log.error("%s", full)
                self._refused_reason = str(full)
                if self._closing.wait(_RETRY_S):
                    return None
            else:
                if self._refused_reason:
                    log.warning("the ledger can be written again")
                self._refused_reason = ""
                return locations
            finally:
                self._writing_since_s = None

    def _write(self, batch: Batch, samples: list[list[bytes]]) -> list[RecordLocation]:
        sizes = [sum(map(len, parts)) for parts in samples]
        num_bytes = sum(sizes) + batch.changes.num_entry_bytes
        if num_bytes and not (self.frees_space or batch.changes.released or batch.gone_segments):
            self._check_free(num_bytes)
        first = self._segments.segment
        try:
            locations = self._segments.write(samples)
            ends = {
                location.segment: location.offset + size
                for location, size in zip(locations, sizes, strict=True)
            }
            rows = [
                SegmentRow(segment=segment, num_bytes=ends.get(segment, 0), retained=self._retain)
                for segment in range(first, self._segments.segment + 1)
            ]
            grown = [row for row in rows if row.num_bytes]
            sql.apply(
                self._connection, batch.changes, locations, segments=grown, gone_segments=batch.gone_segments
            )
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._segments.cut()
            raise _NoSpaceError(f"{Blocked.FULL}: {error.strerror} in {self._directory}") from None
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname == "SQLITE_BUSY":
                database = self._directory / "ledger.sqlite3"
                holder = lock_holder(database) or "an open sqlite3 shell?"
                reason = f"{Blocked.LOCKED}: another program holds {database}: {holder}"
            elif error.sqlite_errorname in _SQLITE_NO_SPACE:
                reason = f"{Blocked.FULL}: {error} in {self._directory}"
            else:
                raise
            self._segments.cut()
            raise _NoSpaceError(reason) from None
        self._segments.keep()
        if self._writing_since_s is not None:
            record("ledger", "write", start_s=self._writing_since_s, records=len(samples))
        for segment in batch.gone_segments:
            segment_path(self._directory, segment).unlink(missing_ok=True)
        return locations

    def _check_free(self, num_bytes: int) -> None:
        disk = os.statvfs(self._directory)
        num_free = disk.f_bavail * disk.f_frsize
        if num_free < self._min_free_bytes + num_bytes:
            raise _NoSpaceError(
                f"{Blocked.FULL}: {num_free >> 20} MiB are free in {self._directory}, "
                f"of which buffer.min_free_bytes keeps {self._min_free_bytes >> 20} MiB"
            )


def _parts(record: Record) -> list[bytes]:
    """What is written of a sample."""
    return [record.data] if record.routes is None else [record.data, record.routes.to_bytes()]


_WRITE_LOCK = "120"


def lock_holder(database: Path, *, locks: str | None = None) -> str:
    """The program that holds the ledger's write lock: `pid 4711 (sqlite3)`; empty if the system does not
    report it.

    In WAL mode that lock is a lock of byte 120 of the file `ledger.sqlite3-shm`, and Linux lists all locks
    with their processes in /proc/locks. SQLite itself only says that the database is locked.
    `locks`: the text of /proc/locks, if it is not to be read.
    """
    try:
        inode = database.with_name(f"{database.name}-shm").stat().st_ino
        lines = (Path("/proc/locks").read_text() if locks is None else locks).splitlines()
    except OSError:
        return ""
    for line in lines:
        # 2: POSIX  ADVISORY  WRITE 30841 fe:00:2335239 120 120; `->` marks those who wait for the one above.
        fields = line.split()
        if len(fields) != 8 or fields[1] != "POSIX" or fields[3] != "WRITE" or fields[6] != _WRITE_LOCK:
            continue
        pid = int(fields[4])
        if fields[5].rpartition(":")[2] == str(inode) and pid not in (0, os.getpid()):
            return f"pid {pid}{_name_of(pid)}"
    return ""


def _name_of(pid: int) -> str:
    try:
        return f" ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return ""
