"""`areal-like audit RUN`: proves the books of a run from what is on disk: its ledger, its segment files and its checkpoints.

Each check is a statement that must hold and a query for whatever contradicts it; an offender is named so that it can be found with the
sqlite3 shell. The audit takes nothing from the buffer's code but the tables' names (docs/ledger.md), so that an error there is not
repeated here, and it may look at a running job: everything is read in one transaction, and a file that went meanwhile is asked about once
more.

Left out: whether what was trained on was worth it. The books are about identity and order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError, StoreCorruptError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.shards import WHOLE, Shard, add_up, all_shards
from areal_like.wire.records import Place, read_record
from launch.local_job.rundir import checkpoints

_NUM_SHOWN = 10
"""Offenders of one check in the table; --json names all."""

_STATES = "('queued', 'leased', 'ready', 'batched', 'trained', 'evaluated', 'dropped')"
_COMMITTED = "coalesce((SELECT value FROM marks WHERE name = 'committed_step'), -1)"
_TRAINER_STEP = "coalesce((SELECT value FROM marks WHERE name = 'trainer_step'), 0)"
_NUM_SHARDS = "coalesce((SELECT value FROM marks WHERE name = 'num_shards'), 1)"
_SHARD = "coalesce((SELECT value FROM marks WHERE name = 'shard'), 0)"
_NUM_COUNTED = f"coalesce((SELECT value FROM marks WHERE name = 'num_steps_counted'), {_TRAINER_STEP})"
_IS_COUNTED = f"(state = 'trained' OR (state = 'batched' AND step < {_NUM_COUNTED}))"
_LAGS = (
    "SELECT 'trained_lag_' || (step - oldest_step) AS name, count(*) AS num FROM tickets CROSS JOIN samples USING (ticket_id) "
    f"WHERE {_IS_COUNTED} AND sample_index < num_samples - num_greedy GROUP BY 1"
)


@dataclass(frozen=True, kw_only=True)
class _Law:
    """One statement about the ledger, as queries."""

    text: str
    count: str
    """How many rows it is about."""
    against: str
    """What contradicts it: one text a row."""


_LAWS = (
    _Law(
        text="every ticket is in one state, and says what belongs to it",
        count="SELECT count(*) FROM tickets",
        against="SELECT printf('ticket %d: %s %s, reason %s, place %s:%s', ticket_id, purpose, state, reason, step, position) FROM tickets "
        f"WHERE state NOT IN {_STATES} OR purpose NOT IN ('train', 'eval') OR (state = 'dropped') != (reason IS NOT NULL) "
        "OR (state IN ('batched', 'trained') AND (step IS NULL OR position IS NULL)) "
        "OR (state IN ('queued', 'leased', 'ready', 'evaluated') AND step IS NOT NULL) "
        "OR (purpose = 'eval' AND state IN ('ready', 'batched', 'trained')) OR (purpose = 'train' AND state = 'evaluated')",
    ),
    _Law(
        text="no ticket is missing: they are numbered without a gap",
        count="SELECT count(*) FROM tickets",
        against="SELECT printf('%d tickets, numbered %d to %d', count(*), min(ticket_id), max(ticket_id)) FROM tickets HAVING count(*) > 0 "
        f"AND (min(ticket_id) != {_NUM_SHARDS} + {_SHARD} OR max(ticket_id) != count(*) * {_NUM_SHARDS} + {_SHARD})",
    ),
    _Law(
        text="a shard has its own tickets, leases and prompts, and nobody else's",
        count="SELECT count(*) FROM tickets",
        against="SELECT printf('ticket %d: prompt %d', ticket_id, prompt_index) FROM tickets "
        f"WHERE ticket_id % {_NUM_SHARDS} != {_SHARD} OR (purpose = 'train' AND prompt_index % {_NUM_SHARDS} != {_SHARD}) "
        f"UNION ALL SELECT printf('lease %d', lease_id) FROM leases WHERE lease_id % {_NUM_SHARDS} != {_SHARD}",
    ),
    _Law(
        text="no place of a step is taken twice",
        count="SELECT count(*) FROM tickets WHERE state IN ('batched', 'trained')",
        against="SELECT printf('step %d, position %d: tickets %s', step, position, group_concat(ticket_id)) FROM tickets "
        "WHERE state IN ('batched', 'trained') GROUP BY step, position HAVING count(*) > 1",
    ),
    _Law(
        text="trained is what was committed, and nothing else",
        count="SELECT count(*) FROM tickets WHERE state = 'trained'",
        against=f"SELECT printf('ticket %d: %s in step %d, committed up to %d', ticket_id, state, step, {_COMMITTED}) FROM tickets "
        f"WHERE (state = 'trained' AND step > {_COMMITTED}) OR (state = 'batched' AND step <= {_COMMITTED})",
    ),
    _Law(
        text="no step is committed that was not completed",
        count="SELECT count(*) FROM marks",
        against=f"SELECT printf('step %d is committed, %d are complete', {_COMMITTED}, {_TRAINER_STEP}) "
        f"WHERE {_COMMITTED} >= {_TRAINER_STEP} AND {_COMMITTED} >= 0",
    ),
    _Law(
        text="a group that was finished has all of its samples, and no group has others",
        count="SELECT count(*) FROM samples",
        against="SELECT printf('ticket %d: %s with %d of %d samples', ticket_id, state, count(sample_index), num_samples) FROM tickets "
        "LEFT JOIN samples USING (ticket_id) GROUP BY ticket_id HAVING (state IN ('ready', 'batched', 'trained') AND "
        "count(sample_index) != num_samples) OR min(sample_index) < 0 OR max(sample_index) >= num_samples "
        "UNION ALL SELECT printf('sample %d of ticket %d: there is no such ticket', sample_index, ticket_id) FROM samples "
        "WHERE ticket_id NOT IN (SELECT ticket_id FROM tickets)",
    ),
    _Law(
        text="no bytes on disk belong to two samples",
        count="SELECT count(*) FROM samples",
        against="SELECT printf('segment %d at %d: tickets %s', segment, offset, group_concat(ticket_id)) FROM samples "
        "GROUP BY segment, offset HAVING count(*) > 1",
    ),
    _Law(
        text="nothing was trained beyond its ticket's bound on staleness",
        count="SELECT count(*) FROM tickets CROSS JOIN samples USING (ticket_id) WHERE state IN ('batched', 'trained')",
        against="SELECT printf('ticket %d, sample %d: step %d, weights of step %d, bound %d', ticket_id, sample_index, step, oldest_step, "
        "max_staleness) FROM tickets CROSS JOIN samples USING (ticket_id) "
        "WHERE state IN ('batched', 'trained') AND NOT step - oldest_step BETWEEN 0 AND max_staleness",
    ),
    _Law(
        text="versions grow, each from one before it",
        count="SELECT count(*) FROM versions",
        against="SELECT printf('version %d: parent %d, incarnation %d', version, parent, trainer_incarnation) FROM (SELECT *, "
        "lag(trainer_incarnation) OVER (ORDER BY version) AS before, row_number() OVER (ORDER BY version) AS place FROM versions) "
        "WHERE parent >= version OR trainer_incarnation < before OR (place > 1 AND parent NOT IN (SELECT version FROM versions))",
    ),
    _Law(
        text="every sample was made by weights that were given out",
        count="SELECT count(*) FROM samples",
        against="SELECT printf('ticket %d, sample %d: versions %d to %d, weights of step %d', ticket_id, sample_index, oldest_version, "
        "newest_version, oldest_step) FROM samples LEFT JOIN versions ON version = oldest_version "
        "WHERE (oldest_version != 0 AND version IS NULL) OR newest_version < oldest_version "
        "OR (newest_version != 0 AND newest_version NOT IN (SELECT version FROM versions)) "
        "OR (oldest_version = newest_version AND oldest_step != coalesce(versions.step, 0))",
    ),
    _Law(
        text="leases are of tickets that are being made, and these have one",
        count="SELECT count(*) FROM leases",
        against="SELECT printf('lease %d of ticket %d, which is %s', lease_id, ticket_id, coalesce(state, 'unknown')) FROM leases "
        "LEFT JOIN tickets USING (ticket_id) WHERE state IS NOT 'leased' "
        "UNION ALL SELECT printf('ticket %d is leased to nobody', ticket_id) FROM tickets "
        "WHERE state = 'leased' AND ticket_id NOT IN (SELECT ticket_id FROM leases)",
    ),
    _Law(
        text="no sample is being made twice",
        count="SELECT count(*) FROM leases",
        against="SELECT printf('ticket %d, sample %d: leases %s', ticket_id, value, group_concat(lease_id)) FROM leases, "
        "json_each(leases.outstanding) GROUP BY ticket_id, value HAVING count(*) > 1",
    ),
    _Law(
        text="a prompt is tried again once, and only after its ticket was dropped",
        count="SELECT count(*) FROM tickets WHERE parent > 0",
        against="SELECT printf('tickets %s follow ticket %d, which is %s', group_concat(child.ticket_id), child.parent, "
        "coalesce(max(old.state), 'unknown')) FROM tickets AS child LEFT JOIN tickets AS old ON old.ticket_id = child.parent "
        "WHERE child.parent > 0 GROUP BY child.parent HAVING count(*) > 1 OR max(old.state) IS NOT 'dropped'",
    ),
    _Law(
        text="the counters say what the rows add up to",
        count="SELECT count(*) FROM statistics",
        against="WITH sums AS ("
        "SELECT 'num_samples_dropped' AS name, count(*) AS num FROM tickets CROSS JOIN samples USING (ticket_id) WHERE state = 'dropped' "
        "UNION ALL SELECT 'tokens_dropped', coalesce(sum(num_sampled), 0) FROM tickets CROSS JOIN samples USING (ticket_id) "
        "WHERE state = 'dropped' "
        "UNION ALL SELECT 'tokens_trained', coalesce(sum(num_sampled), 0) FROM tickets CROSS JOIN samples USING (ticket_id) "
        f"WHERE {_IS_COUNTED} AND sample_index < num_samples - num_greedy "
        "UNION ALL SELECT 'verdict_accepted', (SELECT count(*) FROM samples) + (SELECT count(*) FROM tickets WHERE state = 'evaluated') "
        f"UNION ALL {_LAGS}) "
        "SELECT printf('%s is %d, the rows say %d', name, coalesce(value, 0), num) FROM sums LEFT JOIN statistics USING (name) "
        "WHERE coalesce(value, 0) != num "
        "UNION ALL SELECT printf('%s is %d, the rows say 0', name, value) FROM statistics "
        f"WHERE name LIKE 'trained_lag_%' AND value != 0 AND name NOT IN (SELECT name FROM ({_LAGS}))",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of one statement."""

    text: str
    num_checked: int
    offenders: list[str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of a run's audit."""

    run: str
    checks: list[Check]
    tickets: dict[str, int]
    """By state, and `issued`."""
    drops: dict[str, int]
    """By reason."""
    facts: dict[str, int] = field(default_factory=dict)
    """Committed steps, restarts and rollbacks, bytes of trajectories, ..."""

    @property
    def is_clean(self) -> bool:
        """Nothing contradicts anything."""
        return not any(check.offenders for check in self.checks)

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self) | {"clean": self.is_clean}, indent=2)

    def lines(self) -> Iterator[str]:
        """As a short table."""
        for check in self.checks:
            yield f"{'FAILED' if check.offenders else 'ok':>6}  {check.num_checked:>11,}  {check.text}"
            yield from (f"{'':>21}{offender}" for offender in check.offenders[:_NUM_SHOWN])
            if len(check.offenders) > _NUM_SHOWN:
                yield f"{'':>21}and {len(check.offenders) - _NUM_SHOWN:,} more (--json names them all)"
        yield "tickets  " + "  ".join(f"{state} {count:,}" for state, count in self.tickets.items() if count)
        if self.drops:
            yield "dropped  " + "  ".join(f"{reason} {count:,}" for reason, count in self.drops.items())
        yield "  ".join(f"{name} {value:,}" for name, value in self.facts.items())


def audit_run(root: Path) -> Report:
    """Audits the run in `root`. Raises ConfigError when it has no ledger, StoreCorruptError when SQLite cannot read it."""
    directories = RunPaths(root).ledgers
    if not directories:
        raise ConfigError(f"{root} has no ledger: with buffer.durability=none a run leaves no books to audit")
    config = load_config(["--config", str(RunPaths(root).config)])
    checkpointed = max(
        checkpoints(RunPaths(root)), default=0
    )  # before the ledgers are read: a running job adds some
    shards = [_Shard(directory) for directory in directories]
    try:
        reports = [shard.report() for shard in shards]
    except sqlite3.DatabaseError as error:
        raise StoreCorruptError(
            f"{root}: its ledger cannot be read ({error}); is it whole, and of this release?"
        ) from None
    checks = [
        Check(
            text=same[0].text,
            num_checked=sum(check.num_checked for check in same),
            offenders=[
                _in_shard(offender, shard, shards)
                for shard, check in zip(shards, same, strict=True)
                for offender in check.offenders
            ],
        )
        for same in zip(*(report.checks for report in reports), strict=True)
    ]
    checks.append(_whole_steps(shards, config=config, checkpointed=checkpointed))
    if len(shards) > 1 or config.buffer.num_shards > 1:
        checks += [_every_shard(shards, config=config), _same_versions(shards)]
    return Report(
        run=str(root),
        checks=checks,
        tickets=add_up(report.tickets for report in reports),
        drops=add_up(report.drops for report in reports),
        facts=add_up(report.facts for report in reports)
        # Every shard has these of its own, and they are the same.
        | {
            name: min(report.facts[name] for report in reports)
            for name in ("committed_steps", "versions", "rollbacks")
        },
    )


def _whole_steps(shards: list[_Shard], *, config: Config, checkpointed: int) -> Check:
    """Steps that were committed, or that the newest checkpoint contains, have all their places filled."""
    problems = []
    begun = min(shard.first_step for shard in shards)
    # They are read one after the other: in a running job only what all have committed was whole when the first was read.
    done = max(checkpointed, 1 + min(shard.committed_step for shard in shards))
    for shard in shards:
        groups = {step: num_groups for step, num_groups, _ in shard.steps}
        wanted = shard.place.share(config.trainer.groups_per_step)
        found = [
            f"step {step}: {num} groups, the last at position {last}"
            for step, num, last in shard.steps
            if last != num - 1
        ]
        found += [
            f"step {step}: {groups.get(step, 0)} of {wanted} groups"
            for step in range(begun, done)
            if groups.get(step, 0) != wanted
        ]
        problems += [_in_shard(problem, shard, shards) for problem in found]
    return Check(
        text="every step that was committed or checkpointed is whole",
        num_checked=max(0, done - begun),
        offenders=problems,
    )


def _every_shard(shards: list[_Shard], *, config: Config) -> Check:
    """The ledgers are one each of as many shards as the run has."""
    wanted = {shard.ledger: shard for shard in all_shards(config.buffer.num_shards)}
    found = {shard.directory.name: shard.place for shard in shards}
    problems = [
        f"{name}: shard {place.index} of {place.count}"
        for name, place in found.items()
        if wanted.get(name) != place
    ]
    problems += [f"{name} is missing" for name in wanted if name not in found]
    return Check(text="every shard is there, once", num_checked=len(shards), offenders=problems)


def _same_versions(shards: list[_Shard]) -> Check:
    """What the others have adopted is what the first gave out (it may have given out more since it was read)."""
    first, *others = shards
    problems = []
    for other in others:
        for version, step in other.versions.items():
            if version <= max(first.versions, default=0) and first.versions.get(version) != step:
                problem = f"version {version} is weights of step {step}, in {first.directory.name} of {first.versions.get(version, 'none')}"
                problems.append(_in_shard(problem, other, shards))
    num_checked = sum(len(other.versions) for other in others)
    return Check(
        text="a version is the same weights in every shard", num_checked=num_checked, offenders=problems
    )


class _Shard:
    """One ledger, read in one transaction."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = WHOLE
        self.committed_step = -1
        self.first_step = 0
        self.versions: dict[int, int] = {}
        """Version -> step."""
        self.steps: list[tuple[int, int, int]] = []
        """(step, groups, last position) of every step that has one."""

    def report(self) -> Report:
        """Everything that one ledger can say by itself."""
        with closing(self._connect()) as connection:
            connection.execute("BEGIN")
            every = connection.execute
            checks = [
                Check(
                    text=law.text,
                    num_checked=every(law.count).fetchone()[0],
                    offenders=[row[0] for row in every(law.against)],
                )
                for law in _LAWS
            ]
            tickets = dict(every("SELECT state, count(*) FROM tickets GROUP BY 1 ORDER BY 1"))
            drops = dict(
                every("SELECT reason, count(*) FROM tickets WHERE state = 'dropped' GROUP BY 1 ORDER BY 1")
            )
            marks = dict(every("SELECT name, value FROM marks"))
            self.place = Shard(marks.get("shard", 0), marks.get("num_shards", 1))
            self.committed_step = marks.get("committed_step", -1)
            self.steps = every(
                "SELECT step, count(*), max(position) FROM tickets WHERE state IN ('batched', 'trained') GROUP BY step ORDER BY step"
            ).fetchall()
            self.first_step = self.steps[0][0] if self.steps else self.committed_step + 1
            self.versions = dict(every("SELECT version, step FROM versions"))
            (num_bytes,) = every("SELECT coalesce(sum(num_bytes), 0) FROM segments").fetchone()
            num_rollbacks, num_tokens = every(
                "SELECT count(*), coalesce(sum(num_tokens), 0) FROM rollbacks"
            ).fetchone()
            places = every(
                "SELECT ticket_id, sample_index, segment, offset, num_bytes, crc32 FROM tickets CROSS JOIN samples USING (ticket_id) "
                "WHERE released = 0 AND state IN ('ready', 'batched', 'trained')"
            ).fetchall()
            connection.execute("COMMIT")
        return Report(
            run=str(self.directory),
            checks=[*checks, self._records(places)],
            tickets={"issued": sum(tickets.values())} | tickets,
            drops=drops,
            facts={
                "committed_steps": self.committed_step + 1,
                "versions": len(self.versions),
                "rollbacks": num_rollbacks,
                "tokens_rolled_back": num_tokens,
                "trajectory_bytes": num_bytes,
            },
        )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{self.directory / 'ledger.sqlite3'}?mode=ro", uri=True, isolation_level=None, timeout=10
        )

    def _records(self, places: list[tuple[int, ...]]) -> Check:
        problems: dict[int, str] = {}
        for ticket_id, sample_index, *place in places:
            try:
                read_record(self.directory, Place(*place), ticket_id=ticket_id, sample_index=sample_index)
            except StoreCorruptError as error:
                problems.setdefault(ticket_id, str(error))
        if problems:  # a running buffer lets go of what nobody can ask for any more, perhaps since we looked
            with closing(self._connect()) as connection:
                gone = connection.execute(
                    "SELECT ticket_id FROM tickets WHERE released = 1 OR state = 'dropped'"
                )
                for (ticket_id,) in gone:
                    problems.pop(ticket_id, None)
        return Check(
            text="every trajectory that may be trained on is on disk as it was written",
            num_checked=len(places),
            offenders=list(problems.values()),
        )


def _in_shard(offender: str, shard: _Shard, shards: list[_Shard]) -> str:
    return offender if len(shards) == 1 else f"{shard.directory.name}: {offender}"
