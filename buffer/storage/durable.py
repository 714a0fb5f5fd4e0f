"""The durable store: SQLite for rows, append-only segment files for records, one thread for the disk.

    put_*, when_durable ---> Changes ---> Batch ---> Writer ---> callbacks, in order
                                      |
                                      at the end of the loop's turn, when the writer is idle

A batch is handed to the writer in a separate callback of the event loop, never inside a `put_*`, so that the
writes of one ledger operation are in one transaction. The event loop waits for the disk only to read back a
group that is no longer in memory.

Records are in segment files and not in SQLite blobs because that is faster. Measured with 12.4 kB per
trajectory and 128 trajectories per batch, in thousands of trajectories per second:

                         SQLite blobs                   segments
    with fsync           8.7 to 9.9 (1 per batch)       15.7 to 19.2 (2 per batch)
    without fsync        9.4 to 10.9                    54 to 55

SQLite writes a blob twice, to the WAL and, at a checkpoint, to the database file. Left out: compression, and
a second thread that would overlap the fsync of a segment with the fsync of the preceding batch's rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from areal_like.config import BufferConfig, Config
from areal_like.errors import ConfigError, StoreCorruptError, UserError
from areal_like.ledger_place import network_warning, recorded_shards, wanted_place
from areal_like.paths import RunPaths
from areal_like.shards import WHOLE, Shard
from areal_like.wire.records import Record, RecordLocation, read_record, segment_path
from buffer.storage import sql
from buffer.storage.base import Recovered, SegmentRow, Store, first_of
from buffer.storage.changes import Changes, RowRecorder
from buffer.storage.memory import MemoryStore, MemoryWithLedger
from buffer.storage.record_cache import RecordCache
from buffer.storage.segments import SegmentWriter, sync_directory, unreferenced_tail
from buffer.storage.writer import Batch, Writer
from buffer.tickets import SampleSummary, State, Ticket

log = logging.getLogger(__name__)

_MAX_LISTED = 10
"""Maximum number of damaged records listed in an error message."""


def open_store(config: Config, *, on_error: Callable[[Exception], None], shard: Shard = WHOLE) -> Store:
    """Opens the store that `buffer.durability` selects, in the directory that `buffer.ledger_dir` selects."""
    if config.buffer.durability == "none":
        ledger = RunPaths.of(config).ledger_of(shard)
        has_ledger = (ledger / "ledger.sqlite3").is_file()
        return MemoryWithLedger(ledger) if has_ledger else MemoryStore()
    if warning := network_warning(config):
        log.warning("%s", warning)
    return DurableStore(open_place(config, shard=shard), config.buffer, on_error=on_error)


class DurableStore(RowRecorder):
    """A `Store` on disk. Construct it in the event loop that uses it.

    OPEN -> recover() -> WRITING -> close() -> CLOSED
    """

    def __init__(
        self, directory: Path, settings: BufferConfig, *, on_error: Callable[[Exception], None]
    ) -> None:
        """Raises UserError if another process uses the directory.

        `on_error` is called in the loop for an error that no retry can fix, after which nothing becomes
        durable, and for one that a callback of `when_durable` raises.
        """
        super().__init__()
        self._directory = directory
        self._settings = settings
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        (directory / "segments").mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory)
        try:
            self._connection = sql.connect(
                directory / "ledger.sqlite3",
                synchronous="FULL" if settings.durability == "power_loss" else "NORMAL",
            )
        except (UserError, StoreCorruptError):
            os.close(self._lock)
            raise
        self._cache = RecordCache(max_bytes=settings.cache_bytes)
        self._locations: dict[int, dict[int, RecordLocation]] = {}
        """Positions on disk, by ticket and sample index, of durable records that may still be fetched."""
        self._num_needed: Counter[int] = Counter()
        """Number of records in `_locations`, by segment."""
        self._retained: frozenset[int] = frozenset()
        self._gone_segments: list[int] = []
        self._callbacks: list[Callable[[], None]] = []
        self._in_flight: Batch | None = None
        self._hand_over_is_due = False
        self._writer: Writer | None = None
        self._reader: sqlite3.Connection | None = None
        """Reads journals; None before the first one."""

    def recover(self, *, ignoring: Collection[int] = ()) -> Recovered:
        assert self._writer is None, "recover was called twice"
        recovered = sql.read_all(self._connection)
        self._continue_from(recovered, first_returned=sql.first_returned(self._connection))
        self._locations = sql.read_locations(self._connection)
        self._num_needed = Counter(
            location.segment for locations in self._locations.values() for location in locations.values()
        )
        segments = sql.read_segments(self._connection)
        self._retained = frozenset(row.segment for row in segments if row.retained)
        last = segments[-1] if segments else SegmentRow(segment=0, num_bytes=0, retained=False)
        self._verify(segments, _placed_parts(recovered, ignoring=ignoring), ignoring=ignoring)
        num_whole, num_torn_bytes = unreferenced_tail(
            self._directory, segment=last.segment, offset=last.num_bytes
        )
        if num_whole or num_torn_bytes:
            log.warning(
                "removed %d unacknowledged trajectories and %d bytes of an incomplete one",
                num_whole,
                num_torn_bytes,
            )
        self._remove_files_without_row({row.segment for row in segments})
        self._gone_segments = [row.segment for row in segments[:-1] if not self._is_needed(row.segment)]
        writer = SegmentWriter(
            self._directory,
            segment=last.segment,
            offset=last.num_bytes,
            segment_bytes=self._settings.segment_bytes,
            sync=self._settings.durability == "power_loss",
        )
        for directory in (self._directory, self._directory.parent):
            sync_directory(directory)
        self._writer = Writer(
            self._directory,
            self._connection,
            writer,
            retain=self._settings.retain_trajectories,
            min_free_bytes=self._settings.min_free_bytes,
            loop=self._loop,
            on_done=self._done,
            on_error=self._on_error,
        )
        return recovered

    def put_sample(self, sample: SampleSummary, record: Record) -> None:
        self._cache.add(record)
        super().put_sample(sample, record)

    def entries_of(self, ticket_id: int, sample_index: int, *, first: int, max_bytes: int) -> list[bytes]:
        # Not the writer's connection, which another thread uses.
        if self._reader is None:
            file = (self._directory / "ledger.sqlite3").absolute().as_uri()
            self._reader = sqlite3.connect(f"{file}?mode=ro", uri=True, isolation_level=None)
        rows = sql.read_entries(self._reader, ticket_id, sample_index, first=first)
        with contextlib.closing(rows):
            return first_of(rows, max_bytes=max_bytes)

    def records_of(self, ticket: Ticket) -> list[Record]:
        records = []
        for ticket_id, index in ticket.record_keys:
            record = self._cache.get(ticket_id, index)
            if record is None:
                record = read_record(
                    self._directory,
                    self._locations[ticket_id][index],
                    ticket_id=ticket_id,
                    sample_index=index,
                )
            records.append(record)
            self._cache.mark_served(ticket_id)
        return records

    def routes_reader(self, records: Sequence[Record]) -> Callable[[], list[Record]]:
        places = [
            self._locations[record.ticket_id][record.sample_index] if record.lacks_routes else None
            for record in records
        ]

        def read() -> list[Record]:
            return [
                record
                if place is None
                else read_record(
                    self._directory,
                    place,
                    ticket_id=record.ticket_id,
                    sample_index=record.sample_index,
                    with_routes=True,
                )
                for record, place in zip(records, places, strict=True)
            ]

        return read

    def when_durable(self, then: Callable[[], None]) -> None:
        if self.changes:
            self._callbacks.append(then)
        elif self._in_flight is not None:
            self._in_flight.callbacks.append(then)
        else:
            then()

    @property
    def num_bytes(self) -> int:
        """Bytes of records in memory: all that are not durable yet, with their routes, and at most
        `cache_bytes` of others."""
        return self._cache.num_bytes

    @property
    def write_blocked_reason(self) -> str:
        return self._writer.blocked_reason if self._writer else ""

    def close(self) -> None:
        if self._writer is not None:
            self._hand_over(even_while_busy=True)
            self._writer.close()
        if self._reader is not None:
            self._reader.close()
        self._connection.close()
        os.close(self._lock)

    def _changed(self) -> None:
        if self._writer is not None and self.changes.released:
            self._writer.frees_space = True
        if not self._hand_over_is_due:
            self._hand_over_is_due = True
            self._loop.call_soon(self._hand_over)

    def _hand_over(self, *, even_while_busy: bool = False) -> None:
        self._hand_over_is_due = False
        assert self._writer is not None, "recover has to be called before the first write"
        if not (self.changes or self._gone_segments) or (self._in_flight is not None and not even_while_busy):
            return
        self._writer.frees_space = False
        self._in_flight = Batch(
            changes=self.changes, callbacks=self._callbacks, gone_segments=self._gone_segments
        )
        self.changes, self._callbacks, self._gone_segments = Changes(), [], []
        self._writer.submit(self._in_flight)

    def _done(self, batch: Batch, locations: list[RecordLocation]) -> None:
        """A batch is durable. Called in the event loop."""
        self._in_flight = None
        for (_, record), location in zip(batch.changes.samples, locations, strict=True):
            self._locations.setdefault(record.ticket_id, {})[record.sample_index] = location
            self._num_needed[location.segment] += 1
            self._cache.unpin(record.ticket_id, record.sample_index)
        for ticket_id in batch.changes.evaluated:
            self._cache.remove(ticket_id)
        for ticket_id in batch.changes.released:
            self._cache.remove(ticket_id)
            for location in self._locations.pop(ticket_id, {}).values():
                self._num_needed[location.segment] -= 1
        self._collect_segments()
        self._hand_over()
        for callback in batch.callbacks:
            try:
                callback()
            except Exception as error:  # the loop would only log it, and the other callbacks would be lost
                self._on_error(error)

    def _collect_segments(self) -> None:
        """Queues files that no durable row refers to, for deletion with the next batch.

        The rows that released their records are durable by then, so a crash in between loses nothing.
        """
        newest = max(self._num_needed, default=0)
        gone = [segment for segment in self._num_needed if segment < newest and not self._is_needed(segment)]
        for segment in gone:
            del self._num_needed[segment]
        self._gone_segments += gone

    def _is_needed(self, segment: int) -> bool:
        return (
            self._num_needed[segment] > 0 or segment in self._retained or self._settings.retain_trajectories
        )

    def _verify(
        self,
        segments: Sequence[SegmentRow],
        placed: Mapping[tuple[int, int], int],
        *,
        ignoring: Collection[int],
    ) -> None:
        """Checks that every record that is needed is on disk; in the last segment and in a file that is
        shorter than its row says, also its checksum and its routes.

        Older segments were complete when the last one was started. Their checksums are verified only when
        records are read, because a buffer must not take minutes to start. Raises StoreCorruptError.
        """
        whole = {row.segment: row.num_bytes for row in segments[:-1]}
        """Bytes that were written to each older segment, routes included."""
        sizes: dict[int, int] = {}
        damaged = []
        for ticket_id, locations in self._locations.items():
            for index, location in locations.items() if ticket_id not in ignoring else ():
                position = placed.get((ticket_id, index), ticket_id)
                if not position:
                    continue
                segment = location.segment
                if segment not in sizes:
                    path = segment_path(self._directory, segment)
                    sizes[segment] = path.stat().st_size if path.exists() else -1
                try:
                    if segment not in whole or sizes[segment] < whole[segment]:
                        read_record(
                            self._directory,
                            location,
                            ticket_id=ticket_id,
                            sample_index=index,
                            with_routes=True,
                        )
                except StoreCorruptError as error:
                    of = f" (a part of position {position}: drop that)" if position != ticket_id else ""
                    damaged.append(f"{error}{of}")
        if damaged:
            more = f"; and {len(damaged) - _MAX_LISTED} more" if len(damaged) > _MAX_LISTED else ""
            raise StoreCorruptError("; ".join(damaged[:_MAX_LISTED]) + more)

    def _remove_files_without_row(self, segments: Collection[int]) -> None:
        """Deletes files without a row, whose first batch or whose deletion was interrupted."""
        for path in (self._directory / "segments").glob("*.seg"):
            if path.stem.isdecimal() and int(path.stem) not in segments:
                path.unlink()


def _placed_parts(recovered: Recovered, *, ignoring: Collection[int]) -> dict[tuple[int, int], int]:
    """(ticket id, sample index) of samples of closed groups -> ticket of the position that needs the sample.

    0 if none does: the sample was given up, or its position was dropped or is to be ignored.
    """
    needed = {ticket.ticket_id for ticket in (*recovered.tickets, *recovered.trained)} - set(ignoring)
    closed = [ticket for ticket in recovered.tickets if ticket.state is State.CLOSED]
    found: dict[tuple[int, int], int] = {}
    for group in (*closed, *recovered.split):
        found |= dict.fromkeys(((group.ticket_id, index) for index in group.failed), 0)
        for index, position in group.placed.items():
            found[group.ticket_id, index] = position if position in needed else 0
    return found


def _lock(directory: Path) -> int:
    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise UserError(
            f"{directory} is in use by another buffer (pid {holder}): "
            "stop that one, or give this run another name"
        ) from None
    except OSError as error:
        os.close(file)
        raise UserError(
            f"the file system of {directory} has no locks ({error.strerror}): "
            "set buffer.ledger_dir to a directory on a local disk"
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def open_place(config: Config, *, shard: Shard = WHOLE) -> Path:
    """The directory of the shard's ledger; makes the link to it if `buffer.ledger_dir` needs one.

        <runs_dir>/<name>/ledger                                     without `buffer.ledger_dir`
        <runs_dir>/<name>/ledger -> <ledger_dir>/<name>/ledger       with it

    Every reader finds the ledger through the link and needs no setting. A link whose directory is missing is
    an error: a buffer that was started on another machine must not begin a second, empty ledger.

    Raises ConfigError if the run's ledger is elsewhere, or the run has another number of shards.
    """
    count = recorded_shards(RunPaths.of(config))
    if count is not None and count != shard.count:  # before it begins a second, empty ledger
        raise ConfigError(
            f"buffer.num_shards={shard.count}: the ledgers of this run are of {count}, and the number of "
            f"shards cannot change during a run: set buffer.num_shards={count}"
        )
    path, target = RunPaths.of(config).ledger_of(shard), wanted_place(config, shard)
    if path.is_symlink() and not path.is_dir():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which this machine does not have: start the buffer on "
            "the machine that has it, or copy it from there. To give up the groups in it, remove the link: "
            "the run then continues from its newest checkpoint with a new ledger"
        )
    if target == path or (path.is_symlink() and path.resolve() == target.resolve()):
        return path
    if path.is_symlink() or _holds_files(path):
        raise ConfigError(
            f"buffer.ledger_dir={config.buffer.ledger_dir}, but the ledger of this run is in "
            f"{path.resolve()}: give the same buffer.ledger_dir as before, or move that directory to "
            f"{target} and make {path} a link to it"
        )
    if _holds_files(target):
        raise ConfigError(
            f"{target} holds the ledger of another run: choose another buffer.ledger_dir or name=..., or "
            f"remove it. If it is this run's, make {path} a link to it"
        )
    _make_link(path, target)
    return path


def _holds_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _make_link(path: Path, target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rmdir()
        path.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise ConfigError(
            f"the ledger cannot be in {target} with a link in {path.parent}: {error.strerror}; "
            "choose another buffer.ledger_dir"
        ) from None
    for directory in (target.parent, path.parent):
        sync_directory(directory)
