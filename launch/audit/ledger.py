"""Audits one ledger by itself: its tables in one transaction, then its segment files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import StoreCorruptError
from areal_like.ledger_place import reading_ledger
from areal_like.selection import failures_of
from areal_like.shards import Shard
from areal_like.trajectory import NOT_SAMPLED
from areal_like.wire.records import Record, RecordLocation, read_record
from launch.audit.invariants import LEDGER_INVARIANTS
from launch.audit.result import Audit, Check

_Row = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LedgerAudit:
    """The result of one ledger's checks, and the data that checks across ledgers need."""

    directory: Path
    shard: Shard
    """The shard as recorded in the ledger's table `marks`."""
    result: Audit
    committed_step: int
    """-1: none."""
    steps: list[_Row]
    """(step, number of groups, last position, largest staleness bound) of every step with groups,
    ascending."""
    versions: dict[int, int]
    """Version -> step of its weights."""
    settings: list[tuple[int, str, str]]
    """(first step, key, value) of each setting that may change during the run, in the order of the
    changes."""

    def setting_at(self, key: str, step: int) -> str | None:
        """The value of a setting at a step; None if it is not recorded."""
        values = (value for first, name, value in reversed(self.settings) if name == key and first <= step)
        return next(values, None)

    @property
    def first_step(self) -> int:
        """The first step whose groups are still in the ledger."""
        return self.steps[0][0] if self.steps else self.committed_step + 1


def audit_ledger(directory: Path) -> LedgerAudit:
    """Audits the ledger in `directory`, which may be in use. Raises StoreCorruptError."""
    with reading_ledger(directory) as connection:
        connection.execute("BEGIN")
        query = connection.execute
        checks = [
            Check(
                text=invariant.text,
                num_checked=query(invariant.count).fetchone()[0],
                offenders=[row[0] for row in query(invariant.violations)],
            )
            for invariant in LEDGER_INVARIANTS
        ]
        tickets = dict(query("SELECT state, count(*) FROM tickets GROUP BY 1 ORDER BY 1"))
        drops = dict(
            query("SELECT reason, count(*) FROM tickets WHERE state = 'dropped' GROUP BY 1 ORDER BY 1")
        )
        marks = dict(query("SELECT name, value FROM marks"))
        counters = dict(query("SELECT name, value FROM statistics"))
        steps = query(
            "SELECT step, count(*), max(position), max(max_staleness) FROM tickets "
            "WHERE state IN ('batched', 'trained') GROUP BY step ORDER BY step"
        ).fetchall()
        versions = dict(query("SELECT version, step FROM versions"))
        settings = query("SELECT step, key, value FROM settings ORDER BY id").fetchall()
        (num_bytes,) = query("SELECT coalesce(sum(num_bytes), 0) FROM segments").fetchone()
        num_rollbacks, num_tokens = query(
            "SELECT count(*), coalesce(sum(num_tokens), 0) FROM rollbacks"
        ).fetchone()
        samples = query(
            "SELECT ticket_id, sample_index, segment, offset, num_bytes, crc32, "
            "oldest_version, newest_version, num_sampled, reward, token_steps "
            "FROM tickets CROSS JOIN samples USING (ticket_id) "
            "WHERE released = 0 AND state IN ('ready', 'closed', 'batched', 'trained', 'evaluated', 'split')"
        ).fetchall()
        connection.execute("COMMIT")
    committed_step = marks.get("committed_step", -1)
    facts = {
        "committed_steps": committed_step + 1,
        "versions": len(versions),
        "rollbacks": num_rollbacks,
        "tokens_rolled_back": num_tokens,
        "trajectory_bytes": num_bytes,
    }
    return LedgerAudit(
        directory=directory,
        shard=Shard(marks.get("shard", 0), marks.get("num_shards", 1)),
        result=Audit(
            run=str(directory),
            checks=[*checks, *_trajectories_on_disk(directory, samples, versions)],
            tickets={"issued": sum(tickets.values())} | tickets,
            drops=drops,
            failures={
                f"{kind} {outcome}": count
                for kind, outcomes in failures_of(counters).items()
                for outcome, count in outcomes.items()
            },
            facts=facts,
        ),
        committed_step=committed_step,
        steps=steps,
        versions=versions,
        settings=settings,
    )


def _trajectories_on_disk(
    directory: Path, samples: list[tuple[Any, ...]], versions: dict[int, int]
) -> tuple[Check, Check]:
    """Reads and checks every record that may still be trained on or is kept for an evaluation.

    A record is read only if it has the row's length and checksum, its segments cover its tokens, its turns
    end at sampled tokens, and its routes are on disk as it names them. `versions`: step of each version's
    weights.
    """
    unread: dict[int, str] = {}
    wrong: dict[int, str] = {}
    for ticket_id, sample_index, segment, offset, num_bytes, crc32, *row, token_steps in samples:
        try:
            record = read_record(
                directory,
                RecordLocation(segment, offset, num_bytes, crc32),
                ticket_id=ticket_id,
                sample_index=sample_index,
                with_routes=True,
            )
        except StoreCorruptError as error:
            unread.setdefault(ticket_id, str(error))
            continue
        found = _row_of(record)
        if token_steps != "[]":  # all tokens are of one step, or an earlier release recorded the sample
            row, found = [*row, token_steps], [*found, _token_steps_of(record, versions)]
        if found != row:
            text = f"sample {sample_index} of ticket {ticket_id}: {row} in its row, {found} in its trajectory"
            wrong.setdefault(ticket_id, text)
    if unread:
        # A running buffer may have deleted records since the transaction, if they are no longer needed.
        with reading_ledger(directory) as connection:
            gone = connection.execute("SELECT ticket_id FROM tickets WHERE released = 1 OR state = 'dropped'")
            for (ticket_id,) in gone:
                unread.pop(ticket_id, None)
    return (
        Check(
            text="every trajectory that may be trained on is on disk as it was written",
            num_checked=len(samples),
            offenders=list(unread.values()),
        ),
        Check(
            text="versions, tokens and reward of a sample are those of its trajectory",
            num_checked=len(samples),
            offenders=list(wrong.values()),
        ),
    )


def _token_steps_of(record: Record, versions: dict[int, int]) -> str:
    """`token_steps` from a record: the number of its tokens by the step of their weights, ascending."""
    by_step: Counter[int] = Counter()
    for version, length in record.runs:
        if version != NOT_SAMPLED:
            by_step[versions.get(version, 0)] += length
    return json.dumps(sorted(by_step.items()), separators=(",", ":"))


def _row_of(record: Record) -> list[Any]:
    """oldest_version, newest_version, num_sampled and reward, over all segments of a record."""
    versions = [version for version, _ in record.runs if version != NOT_SAMPLED]
    return [
        min(versions, default=NOT_SAMPLED),
        max(versions, default=NOT_SAMPLED),
        record.num_sampled,
        record.reward,
    ]
