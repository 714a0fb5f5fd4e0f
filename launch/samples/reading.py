"""Finds samples in the ledgers of a run, which may still be running, and reads their records.

The rows have step, position and reward, so that the worst samples of a step are found without reading a
record.
"""

from __future__ import annotations

import bisect
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError, StoreCorruptError
from areal_like.ledger_place import reading_ledger
from areal_like.paths import RunPaths
from areal_like.wire.records import Record, RecordLocation, read_record
from launch.offline_verbs import offline_verb

_EVAL_SET = "iif(eval_set = '', 'eval', eval_set)"
"""The first releases had one set, without a name."""
_OF_SAMPLE = """
    t.ticket_id, t.prompt_index, t.purpose, t.num_samples, t.num_greedy, t.eval_id, t.eval_set,
    s.sample_index, s.failure, s.reward, s.num_sampled, s.oldest_version, s.newest_version,
    s.segment, s.offset, s.num_bytes, s.crc32"""
# Each of the two parts can use an index of the columns that a condition names.
_RECORDED = f"""(
    SELECT {_OF_SAMPLE}, t.state, t.reason, t.step AS train_step, t.position, NULL AS recorded_in
    FROM tickets AS t CROSS JOIN samples AS s USING (ticket_id)
    WHERE (t.ticket_id, s.sample_index) NOT IN (SELECT ticket_id, sample_index FROM parts)
    UNION ALL
    SELECT {_OF_SAMPLE}, place.state, place.reason, place.step, place.position, place.ticket_id
    FROM parts AS p CROSS JOIN tickets AS place ON place.ticket_id = p.position_id
         CROSS JOIN tickets AS t ON t.ticket_id = p.ticket_id
         CROSS JOIN samples AS s ON s.ticket_id = p.ticket_id AND s.sample_index = p.sample_index)"""
"""All samples with the columns of their tickets, and where each is recorded."""
_ROWS = f"""
    SELECT ticket_id AS ticket, sample_index AS sample, prompt_index, state, purpose, reward, num_sampled,
           oldest_version, newest_version, failure, recorded_in, coalesce(reason, '') AS reason,
           iif(purpose = 'eval', {_EVAL_SET}, '') AS eval_set,
           iif(purpose = 'eval', eval_id, train_step) AS step,
           sample_index >= num_samples - num_greedy AS is_greedy, coalesce(position, -1) AS position,
           segment, offset, num_bytes, crc32
    FROM {_RECORDED} WHERE """


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample as in the ledger's rows, with the columns of its ticket."""

    ticket: int
    sample: int
    prompt_index: int
    eval_set: str
    """Empty for a sample of training."""
    step: int | None
    """The optimizer step in which it is trained on; in an evaluation, the step of the weights."""
    state: str
    reason: str
    """Why its ticket was dropped; empty if it was not."""
    is_greedy: bool
    reward: float
    num_sampled: int
    oldest_version: int
    newest_version: int
    failure: str
    """Why it failed and counts with reward 0; empty if it did not."""
    recorded_in: int | None = None
    """Ticket of the position of parts in which it is recorded, if its group was closed; `step` and `state`
    are those of the position."""


@dataclass(frozen=True, kw_only=True)
class LocatedRow(Row):
    """A row with the place of its record."""

    purpose: str
    directory: Path
    """The ledger's directory."""
    order: tuple[int, ...]
    """Position of its group in the step (over all shards), ticket, sample."""
    location: RecordLocation


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples to find: of a ticket, else of a set, else of a step."""

    ticket: int | None = None
    set_name: str | None = None
    step: int | None = None
    """None: the newest."""


class RunLedgers:
    """The ledgers of a run."""

    def __init__(self, root: Path) -> None:
        """Raises ConfigError for a run without a ledger."""
        self._root = root
        self._directories = RunPaths(root).ledgers
        if not self._directories:
            if (verb := offline_verb(RunPaths(root))) is not None:
                raise ConfigError(f"{root} is a run of `areal-like {verb.verb}`, which generates no samples")
            raise ConfigError(
                f"{root} has no ledger: with buffer.durability=none a run keeps no samples"
                if (root / "metrics.jsonl").exists()
                else f"{root} has no ledger yet: no sample has been recorded"
            )

    def find(self, selection: Selection) -> list[LocatedRow]:
        """The rows of the wanted samples, in the order of the step. Raises ConfigError if there are none."""
        if selection.ticket is not None:
            rows = self._query("ticket_id = ? OR recorded_in = ?", [selection.ticket] * 2)
            return rows or self._nothing(f"ticket {selection.ticket} has no samples")
        if selection.set_name is not None:
            return self._find_evaluated(selection.set_name, selection.step)
        where = "purpose = 'train' AND state IN ('batched', 'trained')"
        step = self._newest_step() if selection.step is None else selection.step
        if step is None:
            return self._nothing("no group is recorded in a step yet")
        rows = self._query(f"train_step = ? AND {where}", [step])
        return rows or self._nothing(f"step {step} has no samples, {self._range('step', where)}")

    def version_steps(self) -> dict[int, int]:
        """Version -> step of its weights."""
        (directory, *_) = self._directories  # all shards know all versions
        return {0: 0} | dict(self._execute(directory, "SELECT version, step FROM versions", []))

    def read(self, row: LocatedRow) -> Record | str:
        """The record of a sample, or the reason why there is none: it was deleted.

        Raises StoreCorruptError for a record that should be there.
        """
        for is_last in (False, True):
            try:
                return read_record(row.directory, row.location, ticket_id=row.ticket, sample_index=row.sample)
            except StoreCorruptError:
                # A running buffer deletes files after the rows that need them are marked.
                if self._is_released(row):
                    return (
                        "its tokens are deleted, because no checkpoint needs them: set "
                        "buffer.retain_trajectories=true to keep those of every step"
                        if row.purpose == "train"
                        else "its tokens are deleted: eval.keep evaluations of a set are kept, and all with "
                        "buffer.retain_trajectories=true"
                    )
                if is_last:
                    raise
        raise AssertionError("the loop returns or raises")

    def _find_evaluated(self, set_name: str, step: int | None) -> list[LocatedRow]:
        """The rows of one evaluation of the set. If a step was evaluated more than once, prefers one that was
        not cancelled, then the latest."""
        where = "purpose = 'eval' AND state = 'evaluated'"
        steps_of: dict[str, set[int]] = {}
        for directory in self._directories:
            query = f"SELECT DISTINCT {_EVAL_SET}, eval_id FROM tickets WHERE {where}"
            for name, eval_id in self._execute(directory, query, []):
                steps_of.setdefault(name, set()).add(eval_id)
        if set_name not in steps_of:
            known = f"evaluated are {', '.join(sorted(steps_of))}" if steps_of else "nothing is evaluated yet"
            return self._nothing(f"the set {set_name} has no samples: {known}")
        rounds = self._rounds(set_name)
        last_of = {eval_id: rank for _, eval_id, rank in sorted(rounds, key=lambda one: one[2])}
        newest = max(steps_of[set_name], key=lambda eval_id: (last_of.get(eval_id, (False, -1)), eval_id))
        wanted = newest if step is None else step
        rows = self._query(f"{where} AND eval_id = ?", [wanted])
        rows = [row for row in rows if row.eval_set == set_name]
        if not rows:
            has = self._range("eval_id", where)
            return self._nothing(f"the set {set_name} has no samples of step {wanted}, {has}")
        firsts = [first for first, _, _ in rounds]
        ranks = [(False, -1), *(rank for _, _, rank in rounds)]
        rank_of = {row.ticket: ranks[bisect.bisect(firsts, row.ticket)] for row in rows}
        best = max(rank_of.values())
        return [row for row in rows if rank_of[row.ticket] == best]

    def _rounds(self, set_name: str) -> list[tuple[int, int, tuple[bool, int]]]:
        """(first ticket, step, rank) of the set's evaluations by first ticket; a larger rank is preferred.

        Empty for a ledger of an earlier release. All are in one shard.
        """
        query = "SELECT first_ticket, eval_id, state FROM evaluations WHERE eval_set = ? ORDER BY 1"
        for directory in self._directories:
            if found := self._execute(directory, query, [set_name]):
                return [(first, step, (state != "cancelled", first)) for first, step, state in found]
        return []

    def _newest_step(self) -> int | None:
        """The newest step that the trainer has completed; else the newest step with a group."""
        newest = "SELECT max(step) FROM tickets WHERE step IS NOT NULL AND state IN ('batched', 'trained')"
        completed = "coalesce((SELECT value FROM marks WHERE name = 'trainer_step'), 0)"
        for query in (f"{newest} AND step < {completed}", newest):
            steps: list[int] = [step for (step,) in self._all(query) if step is not None]
            if steps:
                return max(steps)
        return None

    def _query(self, where: str, values: Sequence[Any]) -> list[LocatedRow]:
        rows = [
            _row(directory, shard, dict(row))
            for shard, directory in enumerate(self._directories)
            for row in self._execute(directory, _ROWS + where, values)
        ]
        return sorted(rows, key=lambda row: row.order)

    def _range(self, column: str, where: str) -> str:
        """The range of steps with samples, for a message."""
        found = self._all(f"SELECT min({column}), max({column}) FROM tickets WHERE {where}")
        ends = [end for row in found for end in row if end is not None]
        return f"the run has steps {min(ends)} to {max(ends)}" if ends else "the run has none yet"

    def _is_released(self, row: LocatedRow) -> bool:
        ((is_gone,),) = self._execute(
            row.directory,
            "SELECT released = 1 OR state = 'dropped' "
            "OR (SELECT count(*) FROM segments WHERE segment = ?) = 0 FROM tickets WHERE ticket_id = ?",
            [row.location.segment, row.ticket],
        )
        return bool(is_gone)

    def _all(self, query: str) -> list[Any]:
        """The rows of all ledgers."""
        return [row for directory in self._directories for row in self._execute(directory, query, [])]

    def _execute(self, directory: Path, query: str, values: Sequence[Any]) -> list[Any]:
        with reading_ledger(directory) as ledger:
            ledger.row_factory = sqlite3.Row
            return ledger.execute(query, values).fetchall()

    def _nothing(self, text: str) -> list[LocatedRow]:
        raise ConfigError(f"{self._root}: {text}")


def _row(directory: Path, shard: int, columns: dict[str, Any]) -> LocatedRow:
    location = RecordLocation(*(columns.pop(name) for name in ("segment", "offset", "num_bytes", "crc32")))
    order = (columns.pop("position"), shard, columns["ticket"], columns["sample"])
    columns["is_greedy"] = bool(columns["is_greedy"])
    return LocatedRow(directory=directory, order=order, location=location, **columns)
