"""The ledger's tables: made, migrated, written and read here. docs/ledger.md explains them to whoever opens the file with sqlite3.

`PRAGMA user_version` counts the migrations that a file has gone through. Each is a script that takes the tables from one version to the
next; a new file goes through all of them, so that there is one way to a schema and not two. A file with more migrations than this program
knows is refused.

What a row costs does not depend on how many there are: ids grow, so every insert is at the right-hand end of its tree, and the index over
tickets with records holds only those. Ended tickets are counted at recovery, not read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from areal_like.errors import StoreCorruptError, UserError
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import Place
from buffer.prompts.order import Prompt
from buffer.storage.base import LeaseRow, Recovered, RollbackRow, VersionRow
from buffer.storage.changes import Changes, Row
from buffer.tickets import Drop, Sample, State, Ticket

_T = TypeVar("_T")
_MAX_ROWS = 256
"""In one statement: 13 values each, and SQLite takes 32,766."""

_VERSION_1 = """
CREATE TABLE tickets (
    ticket_id INTEGER PRIMARY KEY, purpose TEXT NOT NULL, prompt_index INTEGER NOT NULL, num_samples INTEGER NOT NULL,
    parent INTEGER NOT NULL, num_reissues INTEGER NOT NULL, eval_id INTEGER NOT NULL, max_staleness INTEGER NOT NULL,
    state TEXT NOT NULL, reason TEXT, step INTEGER, position INTEGER,
    num_greedy INTEGER NOT NULL, released INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX tickets_with_arrays ON tickets (ticket_id) WHERE released = 0;
CREATE INDEX tickets_by_place ON tickets (step, position) WHERE step IS NOT NULL;
CREATE TABLE samples (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, lease_id INTEGER NOT NULL,
    oldest_step INTEGER NOT NULL, sum_token_steps INTEGER NOT NULL, oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL,
    num_sampled INTEGER NOT NULL, reward REAL NOT NULL,
    segment INTEGER NOT NULL, offset INTEGER NOT NULL, num_bytes INTEGER NOT NULL, crc32 INTEGER NOT NULL,
    PRIMARY KEY (ticket_id, sample_index)
) WITHOUT ROWID;
CREATE TABLE failures (
    ticket_id INTEGER NOT NULL, sample_index INTEGER NOT NULL, num_failures INTEGER NOT NULL, PRIMARY KEY (ticket_id, sample_index)
) WITHOUT ROWID;
CREATE TABLE leases (
    lease_id INTEGER PRIMARY KEY, ticket_id INTEGER NOT NULL, server TEXT NOT NULL, server_incarnation INTEGER NOT NULL,
    weights_step INTEGER NOT NULL, outstanding TEXT NOT NULL
);
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, step INTEGER NOT NULL, parent INTEGER NOT NULL, trainer_incarnation INTEGER NOT NULL
);
CREATE TABLE marks (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE returned_prompts (
    place INTEGER PRIMARY KEY, prompt_index INTEGER NOT NULL, parent INTEGER NOT NULL, num_reissues INTEGER NOT NULL
);
CREATE TABLE attempts (step INTEGER PRIMARY KEY, num_starts INTEGER NOT NULL);
CREATE TABLE rollbacks (
    id INTEGER PRIMARY KEY, trainer_incarnation INTEGER NOT NULL, from_step INTEGER NOT NULL, to_step INTEGER NOT NULL,
    num_tickets INTEGER NOT NULL, num_tokens INTEGER NOT NULL, unix_s REAL NOT NULL
);
CREATE TABLE segments (segment INTEGER PRIMARY KEY, num_bytes INTEGER NOT NULL, retained INTEGER NOT NULL);
CREATE TABLE statistics (name TEXT PRIMARY KEY, value NUMERIC NOT NULL) WITHOUT ROWID;
"""
MIGRATIONS: tuple[str, ...] = (_VERSION_1,)
"""Script i takes a file from version i to i + 1. Never edited once released: a change is one more script."""


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One file of trajectories."""

    segment: int
    num_bytes: int
    """Up to here its bytes are named by rows; what lies behind was never acknowledged."""
    retained: bool
    """Kept for ever, whether its trajectories are needed or not."""


def connect(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """The ledger's file in WAL mode, at this program's version. Raises UserError for a newer file, StoreCorruptError for none of ours."""
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
    """Takes the tables forward to the newest version, each step in a transaction. Raises UserError when they are newer."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise UserError(
            f"{path} has schema version {version} and this program knows {len(migrations)}: "
            "run the release that wrote it, or a newer one, or begin a run of another name"
        )
    for number, script in enumerate(migrations[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def apply(
    connection: sqlite3.Connection,
    changes: Changes,
    places: Iterable[Place],
    *,
    segments: Sequence[SegmentRow] = (),
    gone_segments: Sequence[int] = (),
) -> None:
    """Writes all of it, or raises sqlite3.Error and writes nothing.

    `places`: where the records of `changes.samples` are. `segments`: files that grew; `gone_segments`: files that are about to go.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        _write(connection, changes, places)
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
        if connection.in_transaction:  # some errors have rolled back by themselves
            connection.execute("ROLLBACK")
        raise


def _write(connection: sqlite3.Connection, changes: Changes, places: Iterable[Place]) -> None:
    _insert(
        connection,
        "INSERT INTO tickets VALUES",
        [(*row, 0) for row in changes.tickets.values()],
        "ON CONFLICT (ticket_id) DO UPDATE SET max_staleness = excluded.max_staleness, state = excluded.state, "
        "reason = excluded.reason, step = excluded.step, position = excluded.position",
    )
    _insert(connection, "INSERT INTO samples VALUES", _sample_rows(changes, places))
    _each(connection, "UPDATE tickets SET released = 1 WHERE ticket_id IN", changes.released)
    _insert(
        connection,
        "INSERT OR REPLACE INTO failures VALUES",
        [(*key, count) for key, count in changes.failures.items()],
    )
    _insert(
        connection, "INSERT OR REPLACE INTO leases VALUES", [row for row in changes.leases.values() if row]
    )
    _each(
        connection,
        "DELETE FROM leases WHERE lease_id IN",
        [lease_id for lease_id, row in changes.leases.items() if not row],
    )
    _insert(
        connection,
        "INSERT INTO versions VALUES",
        [(row.version, row.step, row.parent, row.trainer_incarnation) for row in changes.versions],
    )
    _insert(connection, "INSERT OR REPLACE INTO marks VALUES", list(changes.marks.items()))
    _insert(
        connection,
        "INSERT OR REPLACE INTO returned_prompts VALUES",
        [row for row in changes.returned.values() if row],
    )
    _each(
        connection,
        "DELETE FROM returned_prompts WHERE place IN",
        [place for place, row in changes.returned.items() if not row],
    )
    _insert(
        connection,
        "INSERT OR REPLACE INTO attempts VALUES",
        [item for item in changes.attempts.items() if item[1]],
    )
    _each(
        connection,
        "DELETE FROM attempts WHERE step IN",
        [step for step, num_starts in changes.attempts.items() if not num_starts],
    )
    _insert(
        connection,
        "INSERT INTO rollbacks VALUES",
        [
            (
                None,
                row.trainer_incarnation,
                row.from_step,
                row.to_step,
                row.num_tickets,
                row.num_tokens,
                row.unix_s,
            )
            for row in changes.rollbacks
        ],
    )
    _insert(connection, "INSERT OR REPLACE INTO statistics VALUES", list(changes.statistics.items()))


def _insert(connection: sqlite3.Connection, statement: str, rows: Sequence[Row], ending: str = "") -> None:
    """Many rows in one statement: sqlite3 gives the interpreter away at every step, and a busy loop is slow to give it back."""
    for chunk in _chunks(rows):
        marks = _marks(len(chunk), len(chunk[0]))
        connection.execute(f"{statement} {marks} {ending}", [value for row in chunk for value in row])


@functools.cache
def _marks(num_rows: int, num_columns: int) -> str:
    """Long, and few: the numbers of rows are powers of two."""
    return ",".join([f"({','.join('?' * num_columns)})"] * num_rows)


def _each(connection: sqlite3.Connection, statement: str, keys: Sequence[int]) -> None:
    for chunk in _chunks(keys):
        connection.execute(f"{statement} ({','.join('?' * len(chunk))})", chunk)


def _chunks(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Of powers of two, so that there are few statements and all stay in the connection's cache."""
    start = 0
    while start < len(rows):
        size = min(_MAX_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start : start + size]
        start += size


def _sample_rows(changes: Changes, places: Iterable[Place]) -> list[tuple[int | float, ...]]:
    return [
        (
            record.ticket_id,
            record.sample_index,
            sample.lease_id,
            sample.oldest_step,
            sample.sum_token_steps,
            sample.oldest_version,
            sample.newest_version,
            sample.num_sampled,
            sample.reward,
            place.segment,
            place.offset,
            place.num_bytes,
            place.crc32,
        )
        for (sample, record), place in zip(changes.samples, places, strict=True)
    ]


def read(connection: sqlite3.Connection) -> Recovered:
    """Everything that was written, ended tickets as counts."""
    every = connection.execute
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
            unleased=set(range(row[3])),
        )
        for row in every("SELECT * FROM tickets WHERE released = 0 ORDER BY ticket_id")
    }
    for ticket_id, sample_index, *facts in every(
        "SELECT samples.ticket_id, sample_index, lease_id, oldest_step, sum_token_steps, oldest_version, newest_version, num_sampled, "
        "reward "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].samples[sample_index] = _sample(*facts)
        tickets[ticket_id].unleased.discard(sample_index)
    for ticket_id, sample_index, count in every(
        "SELECT failures.* FROM tickets CROSS JOIN failures USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].num_failures[sample_index] = count
    trained = [ticket for ticket in tickets.values() if ticket.state is State.TRAINED]
    return Recovered(
        tickets=[ticket for ticket in tickets.values() if not ticket.state.is_terminal],
        trained=sorted(trained, key=lambda ticket: (ticket.step, ticket.position)),
        leases=[
            LeaseRow(
                lease_id=row[0],
                ticket_id=row[1],
                server=row[2],
                server_incarnation=row[3],
                weights_step=row[4],
                outstanding=frozenset(json.loads(row[5])),
            )
            for row in every("SELECT * FROM leases ORDER BY lease_id")
        ],
        versions=[
            VersionRow(version=row[0], step=row[1], parent=row[2], trainer_incarnation=row[3])
            for row in every("SELECT * FROM versions ORDER BY version")
        ],
        marks=dict(every("SELECT * FROM marks")),
        returned=[
            Prompt(index=row[0], parent=row[1], num_reissues=row[2])
            for row in every("SELECT prompt_index, parent, num_reissues FROM returned_prompts ORDER BY place")
        ],
        attempts=dict(every("SELECT * FROM attempts")),
        rollbacks=[
            RollbackRow(
                trainer_incarnation=row[1],
                from_step=row[2],
                to_step=row[3],
                num_tickets=row[4],
                num_tokens=row[5],
                unix_s=row[6],
            )
            for row in every("SELECT * FROM rollbacks ORDER BY id")
        ],
        statistics=dict(every("SELECT * FROM statistics")),
        ended={
            (Purpose(purpose), State(state), Drop(reason) if reason else None): count
            for purpose, state, reason, count in every(
                "SELECT purpose, state, reason, count(*) FROM tickets GROUP BY 1, 2, 3"
            )
            if State(state).is_terminal
        },
        num_issued=every("SELECT coalesce(max(ticket_id), 0) FROM tickets").fetchone()[0],
    )


def first_returned(connection: sqlite3.Connection) -> int:
    """Place of the first of the prompts given back."""
    return int(connection.execute("SELECT coalesce(min(place), 0) FROM returned_prompts").fetchone()[0])


def read_places(connection: sqlite3.Connection) -> dict[int, dict[int, Place]]:
    """Ticket id -> sample index -> where its records are, of every ticket that may still be asked for."""
    places: dict[int, dict[int, Place]] = {}
    for ticket_id, sample_index, *place in connection.execute(
        "SELECT samples.ticket_id, sample_index, segment, offset, num_bytes, crc32 "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        places.setdefault(ticket_id, {})[sample_index] = Place(*place)
    return places


def read_segments(connection: sqlite3.Connection) -> list[SegmentRow]:
    """All files of trajectories, oldest first; the last one is being written."""
    return [
        SegmentRow(row[0], row[1], bool(row[2]))
        for row in connection.execute("SELECT * FROM segments ORDER BY segment")
    ]


def _sample(
    lease_id: int,
    oldest_step: int,
    sum_token_steps: int,
    oldest_version: int,
    newest_version: int,
    num_sampled: int,
    reward: float,
) -> Sample:
    return Sample(
        lease_id=lease_id,
        oldest_step=oldest_step,
        sum_token_steps=sum_token_steps,
        oldest_version=oldest_version,
        newest_version=newest_version,
        num_sampled=num_sampled,
        reward=reward,
    )
