"""Reads the training data of a finished or stopped run from its ledger: the same groups, in the same order.

It reads the tables and segment files directly (docs/reference/ledger.md), because the trainer does not import
the buffer's code. The ledgers of several shards are merged into one stream: the groups of a step ordered by
position, then by shard. A position of parts of closed groups is read as the buffer served it, with what the
baselines of its samples need.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from areal_like.errors import ConfigError, StoreCorruptError
from areal_like.ledger_place import open_ledger
from areal_like.paths import RunPaths
from areal_like.wire.messages.consumer import ClosedGroup, EarlyMember, Group
from areal_like.wire.records import RecordLocation, read_record, sampled_versions

_Key = tuple[int, int]
"""(ticket id, sample index)"""


class SampleRow(NamedTuple):
    """The ledger's row of a sample."""

    num_sampled: int
    oldest_step: int
    """Step that starts with the oldest weights that sampled one of its tokens."""
    reward: float


class _Position(NamedTuple):
    """A row of `tickets` that is recorded at a position."""

    shard: int
    ticket_id: int
    prompt_index: int
    max_staleness: int
    begin_step: int


class Recording:
    """The recorded steps of the run in `root`.

    Raises ConfigError if there are none, or if trajectories were not kept.
    """

    def __init__(self, root: Path, *, needs_records: bool = True) -> None:
        """`needs_records`: False also opens a run without kept trajectories, whose rows alone can be read."""
        self._root = root
        self._directories = RunPaths(root).ledgers
        if not self._directories:
            raise ConfigError(
                f"{root} has no ledger: with buffer.durability=none nothing of a run can be replayed"
            )
        self._ledgers = [open_ledger(directory) for directory in self._directories]
        self.num_gone = sum(map(_num_gone, self._ledgers))
        """Number of trajectories that were trained on and not kept."""
        if self.num_gone and needs_records:
            self.close()
            raise ConfigError(
                f"{self.num_gone} trajectories that {self._root} was trained on were not kept: "
                "only a run with buffer.retain_trajectories=true can be replayed"
            )
        self._parts = [_read_parts(ledger) for ledger in self._ledgers]
        """For each shard: ticket id of a position of parts -> its samples."""
        self._positions = self._read_positions()
        """By (step, position in the merged order)."""
        self._steps = {0: 0} | self.steps_of_versions()

    def learning_rates(self) -> list[tuple[int, float]]:
        """(first step, `trainer.lr`) of each value that the run had, in the order in which it was set.

        A later value replaces earlier ones from its step on. Empty for a run of an earlier release.
        """
        query = "SELECT step, value FROM settings WHERE key = 'trainer.lr' ORDER BY id"
        rows = self._ledgers[0].execute(query)
        return [(step, float(value)) for step, value in rows]

    def steps_of_versions(self) -> dict[int, int]:
        """Version of weights -> step that starts with them."""
        return dict(self._ledgers[0].execute("SELECT version, step FROM versions"))

    def num_groups(self) -> Counter[int]:
        """Step -> number of its groups."""
        return Counter(step for step, _ in self._positions)

    def sample_rows(self, step: int, position: int) -> tuple[list[int], list[SampleRow]]:
        """(prompt index of each sample, its row) of one position, without the trajectories."""
        found = self._positions[step, position]
        rows = self._samples(found, "num_sampled, oldest_step, reward")
        closed = dict(self._closed_groups(found))
        prompts = [closed[key].prompt_index if closed else found.prompt_index for (key, _), *_ in rows]
        return prompts, [SampleRow(*row) for _, *row in rows]

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()

    def num_whole_steps(self, *, groups_per_step: int) -> int:
        """Number of steps, from step 0 on, that have all their groups.

        Raises ConfigError if there is none, or if the ledger does not begin at step 0.
        """
        counts = self.num_groups()
        first = min(counts, default=0)
        if first > 0:
            raise ConfigError(
                f"the ledger in {self._root} begins at step {first}: "
                "the data of the steps before it are not recorded"
            )
        num_whole = next((step for step in range(len(counts) + 1) if counts[step] < groups_per_step), 0)
        if not num_whole:
            raise ConfigError(f"{self._root} has not recorded a complete step of {groups_per_step} groups")
        return num_whole

    def groups(self, step: int, positions: range) -> Iterator[Group]:
        """The groups of a step at these positions, as the buffer served them."""
        for index in positions:
            found = self._positions[step, index]
            rows = self._samples(found, "oldest_step, segment, offset, num_bytes, crc32")
            records = [
                read_record(
                    self._directories[found.shard],
                    RecordLocation(*place),
                    ticket_id=ticket_id,
                    sample_index=sample_index,
                    with_routes=True,
                )
                for (ticket_id, sample_index), _, *place in rows
            ]
            versions = sampled_versions(records)
            if missing := [version for version in versions if version not in self._steps]:
                raise StoreCorruptError(
                    f"{self._root}: its ledger does not have version {missing[0]} of the weights, which "
                    f"sampled tokens of ticket {found.ticket_id}"
                )
            yield Group(
                step=step,
                position=index,
                ticket_id=found.ticket_id,
                prompt_index=found.prompt_index,
                records=records,
                version_steps=[oldest_step for _, oldest_step, *_ in rows],
                max_staleness=found.max_staleness,
                versions=versions,
                steps=[self._steps[version] for version in versions],
                begin_step=found.begin_step,
                closed=[group for _, group in self._closed_groups(found)],
            )

    def _samples(self, position: _Position, columns: str) -> list[tuple[Any, ...]]:
        """((ticket id, sample index), these columns) of each sample, in the order in which it is served."""
        ledger, parts = self._ledgers[position.shard], self._parts[position.shard].get(position.ticket_id)
        if parts is None:
            rows = ledger.execute(
                f"SELECT sample_index, {columns} FROM samples WHERE ticket_id = ? ORDER BY 1",
                (position.ticket_id,),
            )
            return [((position.ticket_id, sample_index), *row) for sample_index, *row in rows]
        query = f"SELECT {columns} FROM samples WHERE ticket_id = ? AND sample_index = ?"
        return [(key, *ledger.execute(query, key).fetchone()) for key in parts]

    def _closed_groups(self, position: _Position) -> list[tuple[int, ClosedGroup]]:
        """The closed groups of a position's parts, by ticket id; empty for a whole group."""
        ledger, parts = self._ledgers[position.shard], self._parts[position.shard].get(position.ticket_id, [])
        groups = []
        for ticket_id in sorted({ticket_id for ticket_id, _ in parts}):
            prompt_index, begin_step, early = ledger.execute(
                "SELECT prompt_index, begin_step, early FROM tickets WHERE ticket_id = ?", (ticket_id,)
            ).fetchone()
            samples = ledger.execute(
                "SELECT sample_index, reward, num_sampled, truncated FROM samples WHERE ticket_id = ? "
                "ORDER BY 1",
                (ticket_id,),
            )
            members = [
                EarlyMember(
                    sample_index=index, reward=reward, num_sampled=num_sampled, is_truncated=bool(truncated)
                )
                for index, reward, num_sampled, truncated in samples
                if index in json.loads(early)
            ]
            group = ClosedGroup(
                ticket_id=ticket_id, prompt_index=prompt_index, begin_step=begin_step, early=members
            )
            groups.append((ticket_id, group))
        return groups

    def _read_positions(self) -> dict[tuple[int, int], _Position]:
        rows = []
        for shard, ledger in enumerate(self._ledgers):
            tickets = ledger.execute(
                "SELECT step, position, ticket_id, prompt_index, max_staleness, begin_step FROM tickets "
                "WHERE state IN ('batched', 'trained')"
            )
            rows += [(step, place, shard, _Position(shard, *row)) for step, place, *row in tickets]
        positions: dict[tuple[int, int], _Position] = {}
        taken: Counter[int] = Counter()
        for step, _, _, found in sorted(rows):
            positions[step, taken[step]] = found
            taken[step] += 1
        return positions


def _read_parts(ledger: sqlite3.Connection) -> dict[int, list[_Key]]:
    parts: dict[int, list[_Key]] = {}
    for position_id, *key in ledger.execute(
        "SELECT position_id, ticket_id, sample_index FROM parts ORDER BY position_id, slot"
    ):
        parts.setdefault(position_id, []).append((key[0], key[1]))
    return parts


def _num_gone(ledger: sqlite3.Connection) -> int:
    recorded = (
        "SELECT segment FROM tickets CROSS JOIN samples USING (ticket_id) "
        "WHERE state IN ('batched', 'trained') "
        "UNION ALL SELECT segment FROM parts CROSS JOIN tickets ON tickets.ticket_id = position_id "
        "CROSS JOIN samples ON samples.ticket_id = parts.ticket_id "
        "AND samples.sample_index = parts.sample_index WHERE state IN ('batched', 'trained')"
    )
    (num_gone,) = ledger.execute(
        f"SELECT count(*) FROM ({recorded}) "
        "WHERE segment NOT IN (SELECT segment FROM segments WHERE retained = 1)"
    ).fetchone()
    return int(num_gone)
