"""Reads the training data of a finished or stopped run from its ledger: the same groups, in the same order.

It reads the tables and segment files directly (docs/reference/ledger.md), because the trainer does not import
the buffer's code. The ledgers of several shards are merged into one stream: the groups of a step ordered by
position, then by shard.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from areal_like.errors import ConfigError
from areal_like.ledger_place import open_ledger
from areal_like.paths import RunPaths
from areal_like.wire.messages.consumer import Group
from areal_like.wire.records import RecordLocation, read_record


class SampleRow(NamedTuple):
    """The ledger's row of a sample."""

    num_sampled: int
    oldest_step: int
    """Step that starts with the oldest weights that sampled one of its tokens."""
    reward: float


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
            raise ConfigError(
                f"{self.num_gone} trajectories that {self._root} was trained on were not kept: "
                "only a run with buffer.retain_trajectories=true can be replayed"
            )
        self._places = self._read_places()
        """(step, position in the merged order) -> (shard, ticket_id, prompt_index)."""

    def learning_rates(self) -> list[tuple[int, float]]:
        """(first step, `trainer.lr`) of each value that the run had, in the order in which it was set.

        A later value replaces earlier ones from its step on. Empty for a run of an earlier release.
        """
        first = self._ledgers[0]
        tables = first.execute("SELECT count(*) FROM sqlite_master WHERE name = 'settings'").fetchone()
        if not tables[0]:
            return []
        rows = first.execute("SELECT step, value FROM settings WHERE key = 'trainer.lr' ORDER BY id")
        return [(step, float(value)) for step, value in rows]

    def steps_of_versions(self) -> dict[int, int]:
        """Version of weights -> step that starts with them."""
        return dict(self._ledgers[0].execute("SELECT version, step FROM versions"))

    def num_groups(self) -> Counter[int]:
        """Step -> number of its groups."""
        return Counter(step for step, _ in self._places)

    def sample_rows(self, step: int, position: int) -> tuple[int, list[SampleRow]]:
        """(prompt index, rows of the samples) of one group, without the trajectories."""
        shard, ticket_id, prompt_index = self._places[step, position]
        rows = self._ledgers[shard].execute(
            "SELECT num_sampled, oldest_step, reward FROM samples WHERE ticket_id = ? ORDER BY sample_index",
            (ticket_id,),
        )
        return prompt_index, [SampleRow(*row) for row in rows]

    def close(self) -> None:
        """Closes the ledgers."""
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
        for position in positions:
            shard, ticket_id, prompt_index = self._places[step, position]
            rows = self._ledgers[shard].execute(
                "SELECT sample_index, oldest_step, segment, offset, num_bytes, crc32 FROM samples "
                "WHERE ticket_id = ? ORDER BY 1",
                (ticket_id,),
            )
            records, version_steps = [], []
            for sample_index, oldest_step, *place in rows:
                directory = self._directories[shard]
                records.append(
                    read_record(
                        directory, RecordLocation(*place), ticket_id=ticket_id, sample_index=sample_index
                    )
                )
                version_steps.append(oldest_step)
            yield Group(
                step=step,
                position=position,
                ticket_id=ticket_id,
                prompt_index=prompt_index,
                records=records,
                version_steps=version_steps,
            )

    def _read_places(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        rows = []
        for shard, ledger in enumerate(self._ledgers):
            tickets = ledger.execute(
                "SELECT step, position, ticket_id, prompt_index FROM tickets "
                "WHERE state IN ('batched', 'trained')"
            )
            rows += [
                (step, position, shard, ticket_id, prompt_index)
                for step, position, ticket_id, prompt_index in tickets
            ]
        places: dict[tuple[int, int], tuple[int, int, int]] = {}
        taken: Counter[int] = Counter()
        for step, _, shard, ticket_id, prompt_index in sorted(rows):
            places[step, taken[step]] = (shard, ticket_id, prompt_index)
            taken[step] += 1
        return places


def _num_gone(ledger: sqlite3.Connection) -> int:
    (num_gone,) = ledger.execute(
        "SELECT count(*) FROM tickets CROSS JOIN samples USING (ticket_id) "
        "WHERE state IN ('batched', 'trained') "
        "AND segment NOT IN (SELECT segment FROM segments WHERE retained = 1)"
    ).fetchone()
    return int(num_gone)
