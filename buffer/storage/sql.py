"""The ledger's tables in SQLite: schema, migrations, writes, and the reads with which a buffer starts.

docs/reference/ledger.md explains the tables for operators who open the file with sqlite3.

`PRAGMA user_version` is the number of migrations applied to a file. Each migration is a script that takes the
tables from one version to the next. A new file goes through all of them, so that new and old files have the
same schema. A file with more migrations than this program has is refused.

The cost of writing a row does not depend on the number of rows: ids grow, so every insert is at the end of
its B-tree, and the index over tickets with records contains no others. The reads use that index, and only
count the tickets that have ended.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from areal_like.errors import StoreCorruptError, UserError
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import RecordLocation
from buffer.prompts.order import Prompt
from buffer.storage.base import (
    EvaluationRow,
    LeaseRow,
    OperationRow,
    Recovered,
    RollbackRow,
    SegmentRow,
    SettingRow,
    VersionRow,
)
from buffer.storage.changes import Changes, Row
from buffer.tickets import Drop, Journal, SampleSummary, State, Ticket

_T = TypeVar("_T")
_MAX_ROWS = 256
"""Rows in one statement: at most 15 values each, of the 32,766 that SQLite accepts."""
_OF_SAMPLE = (
    "lease_id",
    "oldest_step",
    "sum_token_steps",
    "oldest_version",
    "newest_version",
    "num_sampled",
    "reward",
)
"""Columns of the table `samples` that are fields of `SampleSummary`."""

_VERSION_1 = """
CREATE TABLE tickets (
    ticket_id INTEGER PRIMARY KEY, purpose TEXT NOT NULL, prompt_index INTEGER NOT NULL,
    num_samples INTEGER NOT NULL,
    parent INTEGER NOT NULL, num_reissues INTEGER NOT NULL, eval_id INTEGER NOT NULL,
    max_staleness INTEGER NOT NULL,
    state TEXT NOT NULL, reason TEXT, step INTEGER, position INTEGER,
    num_greedy INTEGER NOT NULL, released INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX tickets_with_arrays ON tickets (ticket_id) WHERE released = 0;
CREATE INDEX tickets_by_place ON tickets (step, position) WHERE step IS NOT NULL;
CREATE TABLE samples (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, lease_id INTEGER NOT NULL,
    oldest_step INTEGER NOT NULL, sum_token_steps INTEGER NOT NULL, oldest_version INTEGER NOT NULL,
    newest_version INTEGER NOT NULL,
    num_sampled INTEGER NOT NULL, reward REAL NOT NULL,
    segment INTEGER NOT NULL, offset INTEGER NOT NULL, num_bytes INTEGER NOT NULL, crc32 INTEGER NOT NULL,
    PRIMARY KEY (ticket_id, sample_index)
) WITHOUT ROWID;
CREATE TABLE failures (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, num_failures INTEGER NOT NULL,
    PRIMARY KEY (ticket_id, sample_index)
) WITHOUT ROWID;
CREATE TABLE leases (
    lease_id INTEGER PRIMARY KEY, ticket_id INTEGER NOT NULL, server TEXT NOT NULL,
    server_incarnation INTEGER NOT NULL,
    weights_step INTEGER NOT NULL, outstanding TEXT NOT NULL
);
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, parent INTEGER NOT NULL,
    trainer_incarnation INTEGER NOT NULL
);
CREATE TABLE marks (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE returned_prompts (
    place INTEGER PRIMARY KEY, prompt_index INTEGER NOT NULL, parent INTEGER NOT NULL,
    num_reissues INTEGER NOT NULL
);
CREATE TABLE attempts (step INTEGER PRIMARY KEY, num_starts INTEGER NOT NULL);
CREATE TABLE rollbacks (
    id INTEGER PRIMARY KEY, trainer_incarnation INTEGER NOT NULL, from_step INTEGER NOT NULL,
    to_step INTEGER NOT NULL,
    num_tickets INTEGER NOT NULL, num_tokens INTEGER NOT NULL, unix_s REAL NOT NULL
);
CREATE TABLE segments (segment INTEGER PRIMARY KEY, num_bytes INTEGER NOT NULL, retained INTEGER NOT NULL);
CREATE TABLE statistics (name TEXT PRIMARY KEY, value NUMERIC NOT NULL) WITHOUT ROWID;
"""
_VERSION_2 = """
CREATE TABLE operations (
    id INTEGER PRIMARY KEY, unix_s REAL NOT NULL, verb TEXT NOT NULL, subject TEXT NOT NULL,
    detail TEXT NOT NULL
);
"""
_VERSION_3 = """
ALTER TABLE tickets ADD COLUMN eval_set TEXT NOT NULL DEFAULT '';
ALTER TABLE samples ADD COLUMN truncated INTEGER NOT NULL DEFAULT 0;
ALTER TABLE samples ADD COLUMN failure TEXT NOT NULL DEFAULT '';
ALTER TABLE failures ADD COLUMN given_up INTEGER NOT NULL DEFAULT 0;
CREATE TABLE evaluations (
    first_ticket INTEGER PRIMARY KEY, eval_id INTEGER NOT NULL, eval_set TEXT NOT NULL,
    num_prompts INTEGER NOT NULL, num_samples INTEGER NOT NULL, min_version INTEGER NOT NULL,
    state TEXT NOT NULL
);
CREATE INDEX evaluations_with_records ON evaluations (first_ticket) WHERE state IN ('running', 'done');
"""
_VERSION_4 = """
CREATE TABLE settings (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    origin TEXT NOT NULL, unix_s REAL NOT NULL
);
"""
_VERSION_5 = """
ALTER TABLE tickets ADD COLUMN begin_step INTEGER NOT NULL DEFAULT -1;
ALTER TABLE tickets ADD COLUMN close_step INTEGER NOT NULL DEFAULT -1;
ALTER TABLE tickets ADD COLUMN early TEXT NOT NULL DEFAULT '[]';
ALTER TABLE samples ADD COLUMN token_steps TEXT NOT NULL DEFAULT '[]';
CREATE TABLE parts (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, position_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    PRIMARY KEY (ticket_id, sample_index)
) WITHOUT ROWID;
"""
_VERSION_6 = """
CREATE TABLE session_entries (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, number INTEGER NOT NULL,
    session TEXT NOT NULL, oldest_step INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (ticket_id, sample_index, number)
);
"""
MIGRATIONS: tuple[str, ...] = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4, _VERSION_5, _VERSION_6)
"""Script i takes a file from version i to i + 1. Never edit a released script: append another one."""


def connect(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """Opens the ledger's file in WAL mode and migrates it to this program's version.

    Raises UserError for a newer file, StoreCorruptError for a file that is not a ledger.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        migrate(connection, path=path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreCorruptError(f"{path} cannot be opened as a ledger: {error}") from None
    except UserError:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection, *, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Takes the tables to the newest version, each step in a transaction.

    Raises UserError if they are newer.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise UserError(
            f"{path} has schema version {version}, this program supports up to {len(migrations)}: "
            "run the release that wrote it, or a newer one, or start a run with another name"
        )
    for number, script in enumerate(migrations[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def apply(
    connection: sqlite3.Connection,
    changes: Changes,
    locations: Iterable[RecordLocation],
    *,
    segments: Sequence[SegmentRow] = (),
    gone_segments: Sequence[int] = (),
) -> None:
    """Writes everything in one transaction, or raises sqlite3.Error and writes nothing.

    `locations`: positions on disk of the records of `changes.samples`. `segments`: files that grew.
    `gone_segments`: files that will be deleted after this.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        _write(connection, changes, locations)
        connection.executemany(
            "INSERT INTO segments VALUES (?,?,?) ON CONFLICT (segment) DO UPDATE SET "
            "num_bytes = excluded.num_bytes, retained = max(retained, excluded.retained)",
            [dataclasses.astuple(row) for row in segments],
        )
        connection.executemany(
            "DELETE FROM segments WHERE segment = ?", [(segment,) for segment in gone_segments]
        )
        connection.execute("COMMIT")
    except sqlite3.Error:
        # After some errors SQLite has rolled back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _write(connection: sqlite3.Connection, changes: Changes, locations: Iterable[RecordLocation]) -> None:
    _insert(
        connection,
        "INSERT INTO tickets VALUES",
        # The column `released` comes before those that a migration has added.
        [(*row[:13], 0, *row[13:]) for row in changes.tickets.values()],
        "ON CONFLICT (ticket_id) DO UPDATE SET max_staleness = excluded.max_staleness, "
        "state = excluded.state, "
        "reason = excluded.reason, step = excluded.step, position = excluded.position, "
        "begin_step = excluded.begin_step, close_step = excluded.close_step, early = excluded.early",
    )
    _insert(connection, "INSERT INTO parts VALUES", changes.parts)
    _insert(connection, "INSERT INTO samples VALUES", _sample_rows(changes, locations))
    _each(connection, "UPDATE tickets SET released = 1 WHERE ticket_id IN", changes.released)
    _insert(
        connection,
        "INSERT OR REPLACE INTO failures VALUES",
        [(*key, *counted) for key, counted in changes.failures.items()],
    )
    for kind, (statement, key) in _EVENTS.items():
        rows = [(*key, *dataclasses.astuple(row)) for row in changes.rows if type(row) is kind]
        _insert(connection, statement, rows)
    connection.executemany(
        "DELETE FROM session_entries WHERE ticket_id = ? AND sample_index = ?", list(changes.forgotten)
    )
    _insert(
        connection,
        "INSERT INTO session_entries VALUES",
        [row for entries in changes.entries.values() for row in entries],
    )
    _replace(connection, "leases", "lease_id", changes.leases)
    _replace(connection, "returned_prompts", "place", changes.returned)
    attempts = {step: (step, num) if num else None for step, num in changes.attempts.items()}
    _replace(connection, "attempts", "step", attempts)
    # On disk the table of scalars is called `marks`, and the table of counters `statistics`.
    _insert(connection, "INSERT OR REPLACE INTO marks VALUES", list(changes.scalars.items()))
    _insert(connection, "INSERT OR REPLACE INTO statistics VALUES", list(changes.counters.items()))


_EVENTS: dict[type, tuple[str, Row]] = {
    EvaluationRow: ("INSERT OR REPLACE INTO evaluations VALUES", ()),
    VersionRow: ("INSERT INTO versions VALUES", ()),
    RollbackRow: ("INSERT INTO rollbacks VALUES", (None,)),
    OperationRow: ("INSERT INTO operations VALUES", (None,)),
    SettingRow: ("INSERT INTO settings VALUES", (None,)),
}
"""Kind of row -> statement, and the columns before those of the row: None for a key that SQLite chooses."""


def _replace(connection: sqlite3.Connection, table: str, key: str, rows: Mapping[int, Row | None]) -> None:
    """Writes the rows, and deletes those that are None. `key`: the column of the rows' keys."""
    _insert(connection, f"INSERT OR REPLACE INTO {table} VALUES", [row for row in rows.values() if row])
    _each(
        connection, f"DELETE FROM {table} WHERE {key} IN", [number for number, row in rows.items() if not row]
    )


def _insert(connection: sqlite3.Connection, statement: str, rows: Sequence[Row], ending: str = "") -> None:
    """Inserts many rows with one statement.

    sqlite3 releases the GIL at every execution of a statement, and a busy event loop is slow to release it
    again.
    """
    for chunk in _chunks(rows):
        placeholders = _placeholders(len(chunk), len(chunk[0]))
        connection.execute(f"{statement} {placeholders} {ending}", [value for row in chunk for value in row])


@functools.cache
def _placeholders(num_rows: int, num_columns: int) -> str:
    """`(?,?),(?,?),...`. The strings are long but few, because numbers of rows are powers of two."""
    return ",".join([f"({','.join('?' * num_columns)})"] * num_rows)


def _each(connection: sqlite3.Connection, statement: str, keys: Sequence[int]) -> None:
    for chunk in _chunks(keys):
        connection.execute(f"{statement} ({','.join('?' * len(chunk))})", chunk)


def _chunks(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Splits into chunks whose sizes are powers of two, so that all statements fit in SQLite's cache."""
    start = 0
    while start < len(rows):
        size = min(_MAX_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start : start + size]
        start += size


def _sample_rows(changes: Changes, locations: Iterable[RecordLocation]) -> list[Row]:
    return [
        (
            record.ticket_id,
            record.sample_index,
            *[getattr(sample, name) for name in _OF_SAMPLE],
            location.segment,
            location.offset,
            location.num_bytes,
            location.crc32,
            int(sample.is_truncated),
            sample.failure,
            json.dumps(sample.token_steps, separators=(",", ":")),
        )
        for (sample, record), location in zip(changes.samples, locations, strict=True)
    ]


def read_all(connection: sqlite3.Connection) -> Recovered:
    """All live rows; ended tickets are counted."""
    query = connection.execute
    tickets = {
        row[0]: Ticket(
            ticket_id=row[0],
            purpose=Purpose(row[1]),
            prompt_index=row[2],
            num_samples=row[3],
            parent=row[4],
            num_reissues=row[5],
            eval_id=row[6],
            max_staleness=row[7],
            state=State(row[8]),
            drop=Drop(row[9]) if row[9] else None,
            step=-1 if row[10] is None else row[10],
            position=-1 if row[11] is None else row[11],
            num_greedy=row[12],
            eval_set=row[14],
            begin_step=row[15],
            close_step=row[16],
            early=tuple(json.loads(row[17])),
            unleased=set(range(row[3])),
        )
        for row in query("SELECT * FROM tickets WHERE released = 0 ORDER BY ticket_id")
    }
    for ticket_id, sample_index, truncated, failure, token_steps, *columns in query(
        f"SELECT samples.ticket_id, sample_index, truncated, failure, token_steps, {', '.join(_OF_SAMPLE)} "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        sample = SampleSummary(
            **dict(zip(_OF_SAMPLE, columns, strict=True)),
            token_steps=tuple((step, count) for step, count in json.loads(token_steps)),
            is_truncated=bool(truncated),
            failure=failure,
        )
        tickets[ticket_id].add_sample(sample_index, sample)
        tickets[ticket_id].unleased.discard(sample_index)
    for ticket_id, sample_index, count, given_up in query(
        "SELECT failures.* FROM tickets CROSS JOIN failures USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].num_failures[sample_index] = count
        if given_up:
            tickets[ticket_id].failed.add(sample_index)
            tickets[ticket_id].unleased.discard(sample_index)
    for ticket_id, sample_index, session, oldest_step, num_entries, num_bytes in query(
        "SELECT ticket_id, sample_index, min(session), min(oldest_step), count(*), sum(length(data)) "
        "FROM session_entries GROUP BY 1, 2"
    ):
        tickets[ticket_id].journals[sample_index] = Journal(
            session=session, oldest_step=oldest_step, num_entries=num_entries, num_bytes=num_bytes
        )
    _read_parts(connection, tickets)
    trained = [ticket for ticket in tickets.values() if ticket.state is State.TRAINED]
    return Recovered(
        tickets=[ticket for ticket in tickets.values() if not ticket.state.is_terminal],
        trained=sorted(trained, key=lambda ticket: (ticket.step, ticket.position)),
        evaluated=[ticket for ticket in tickets.values() if ticket.state is State.EVALUATED],
        split=[ticket for ticket in tickets.values() if ticket.state is State.SPLIT],
        evaluations=_read(
            connection, EvaluationRow, "evaluations WHERE state IN ('running', 'done') ORDER BY first_ticket"
        ),
        leases=[
            LeaseRow(
                lease_id=row[0],
                ticket_id=row[1],
                server=row[2],
                server_incarnation=row[3],
                weights_step=row[4],
                outstanding=frozenset(json.loads(row[5])),
            )
            for row in query("SELECT * FROM leases ORDER BY lease_id")
        ],
        versions=_read(connection, VersionRow, "versions ORDER BY version"),
        # The table of scalars is called `marks` on disk.
        scalars=dict(query("SELECT * FROM marks")),
        returned=[
            Prompt(index=row[0], parent=row[1], num_reissues=row[2])
            for row in query("SELECT prompt_index, parent, num_reissues FROM returned_prompts ORDER BY place")
        ],
        attempts=dict(query("SELECT * FROM attempts")),
        rollbacks=_read(connection, RollbackRow, "rollbacks ORDER BY id"),
        settings=_read(connection, SettingRow, "settings ORDER BY id"),
        counters=dict(query("SELECT * FROM statistics")),
        ended={
            (Purpose(purpose), State(state), Drop(reason) if reason else None): count
            for purpose, state, reason, count in query(
                "SELECT purpose, state, reason, count(*) FROM tickets GROUP BY 1, 2, 3"
            )
            if State(state).is_terminal
        },
        num_issued=query("SELECT coalesce(max(ticket_id), 0) FROM tickets").fetchone()[0],
    )


def _read_parts(connection: sqlite3.Connection, tickets: dict[int, Ticket]) -> None:
    """Reads which samples of closed groups are in which positions, and gives the positions their samples.

    The rows of a group are needed for longer than those of its positions, so the groups lead to all of them.
    """
    slots: dict[int, dict[int, tuple[int, int]]] = {}
    for ticket_id, sample_index, position_id, slot in connection.execute(
        "SELECT parts.* FROM tickets CROSS JOIN parts USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].placed[sample_index] = position_id
        slots.setdefault(position_id, {})[slot] = (ticket_id, sample_index)
    for position_id, parts in slots.items():
        if (position := tickets.get(position_id)) is not None:
            position.set_parts(
                [(tickets[ticket_id], index) for _, (ticket_id, index) in sorted(parts.items())]
            )


def read_entries(
    connection: sqlite3.Connection, ticket_id: int, sample_index: int, *, first: int
) -> Generator[bytes, None, None]:
    """The entries of a journal from number `first` on."""
    for (data,) in connection.execute(
        "SELECT data FROM session_entries WHERE ticket_id = ? AND sample_index = ? AND number >= ? "
        "ORDER BY number",
        (ticket_id, sample_index, first),
    ):
        yield data


def first_returned(connection: sqlite3.Connection) -> int:
    """Key of the row of `returned_prompts` whose prompt is issued next."""
    return int(connection.execute("SELECT coalesce(min(place), 0) FROM returned_prompts").fetchone()[0])


def read_locations(connection: sqlite3.Connection) -> dict[int, dict[int, RecordLocation]]:
    """Ticket id -> sample index -> position on disk, for every ticket that may still be fetched."""
    locations: dict[int, dict[int, RecordLocation]] = {}
    for ticket_id, sample_index, *location in connection.execute(
        "SELECT samples.ticket_id, sample_index, segment, offset, num_bytes, crc32 "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        locations.setdefault(ticket_id, {})[sample_index] = RecordLocation(*location)
    return locations


def read_segments(connection: sqlite3.Connection) -> list[SegmentRow]:
    """All files of trajectories, oldest first; the last one is the one to append to."""
    return _read(connection, SegmentRow, "segments ORDER BY segment")


def _read(connection: sqlite3.Connection, kind: type[_T], rest: str) -> list[_T]:
    """An object for each row. `kind`: a dataclass whose fields have the names of the columns; `rest`: what
    follows FROM."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    rows = connection.execute(f"SELECT {', '.join(names)} FROM {rest}")
    return [kind(**dict(zip(names, row, strict=True))) for row in rows]
