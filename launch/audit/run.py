"""Audits a whole run from its files: ledgers, segment files and checkpoints.

The job may be running: each ledger is read in one transaction, and if a record has disappeared in the
meantime, the ledger is read again for its ticket. The audit checks that the right samples were trained in the
right order, not the quality of the training data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.ledger_place import shards_of
from areal_like.paths import RunPaths
from areal_like.promise import promise
from areal_like.runtime.command_line import load_config
from areal_like.shards import add_up, all_shards
from launch.audit.ledger import LedgerAudit, audit_ledger
from launch.audit.result import Audit, Check
from launch.run_directory.rundir import checkpoints
from launch.run_files import read_rows

_COLUMNS = {"trainer.lr": "lr_base", "max_staleness": "max_staleness"}
"""Setting that may change during the run -> column of metrics.jsonl."""


def audit_run(root: Path) -> Audit:
    """Audits the run in `root`. Raises ConfigError without a ledger, StoreCorruptError when SQLite fails."""
    config = load_config(["--config", str(RunPaths(root).config)])
    configured = {shard.ledger for shard in all_shards(config.buffer.num_shards)}
    # Other ledgers without a ticket were made by buffers that were refused: the run has another number of
    # shards.
    directories = [
        directory
        for directory in RunPaths(root).ledgers
        if directory.name in configured or shards_of(directory) is not None
    ]
    if not directories:
        raise ConfigError(f"{root} has no ledger: with buffer.durability=none a run records nothing to audit")
    # Before the ledgers are read: a running job may add a checkpoint, or a step, afterwards.
    rows = _step_rows(RunPaths(root).metrics)
    num_checkpointed = max(checkpoints(RunPaths(root)), default=0)
    ledgers = [audit_ledger(directory) for directory in directories]
    checks = [*_merged(ledgers), _whole_steps(ledgers, config=config, num_checkpointed=num_checkpointed)]
    checks += [_settings_in_force(ledgers, rows), _lags_within_bounds(ledgers, rows)]
    if len(ledgers) > 1 or config.buffer.num_shards > 1:
        checks += [_every_shard(ledgers, config=config), _same_versions(ledgers)]
    results = [ledger.result for ledger in ledgers]
    # Every shard has the same values of these, so they are not added up.
    common = ("committed_steps", "versions", "rollbacks")
    return Audit(
        run=str(root),
        promise=promise(config),
        checks=checks,
        tickets=add_up(result.tickets for result in results),
        drops=add_up(result.drops for result in results),
        failures=add_up(result.failures for result in results),
        facts=add_up(result.facts for result in results)
        | {name: min(result.facts[name] for result in results) for name in common},
    )


def _merged(ledgers: list[LedgerAudit]) -> list[Check]:
    """The checks of single ledgers, each merged over all ledgers."""
    return [
        Check(
            text=same[0].text,
            num_checked=sum(check.num_checked for check in same),
            offenders=[
                _located(offender, ledger, ledgers)
                for ledger, check in zip(ledgers, same, strict=True)
                for offender in check.offenders
            ],
        )
        for same in zip(*(ledger.result.checks for ledger in ledgers), strict=True)
    ]


def _whole_steps(ledgers: list[LedgerAudit], *, config: Config, num_checkpointed: int) -> Check:
    """Checks that the steps that were committed, or that the newest checkpoint contains, have all groups.

    Each step is checked against the settings that it had; one that was trained with `buffer.durability=none`
    is not in any ledger. If a release did not record a setting, the value in config.yaml is used.
    """
    problems = []
    begun = min(ledger.first_step for ledger in ledgers)
    # The ledgers are read one after the other. In a running job only the steps that all of them have
    # committed were whole when the first one was read.
    done = max(num_checkpointed, 1 + min(ledger.committed_step for ledger in ledgers))
    for ledger in ledgers:
        groups = {step: num_groups for step, num_groups, *_ in ledger.steps}
        configured = config.trainer.groups_per_step
        wanted = {
            step: ledger.shard.share(int(ledger.setting_at("trainer.groups_per_step", step) or configured))
            for step in range(begun, done)
            if ledger.setting_at("buffer.durability", step) != "none"
        }
        found = [
            f"step {step}: {num} groups, the last at position {last}"
            for step, num, last, _ in ledger.steps
            if last != num - 1
        ]
        found += [
            f"step {step}: {groups.get(step, 0)} of {num} groups"
            for step, num in wanted.items()
            if groups.get(step, 0) != num
        ]
        problems += [_located(problem, ledger, ledgers) for problem in found]
    return Check(
        text="every step that was committed or checkpointed is whole",
        num_checked=max(0, done - begun),
        offenders=problems,
    )


def _settings_in_force(ledgers: list[LedgerAudit], rows: list[dict[str, Any]]) -> Check:
    """Checks that the rows of steps have the settings that the ledger has for them; the first shard decides.

    Columns that a row lacks, and steps before the first recorded value, are left out.
    """
    first = next((ledger for ledger in ledgers if ledger.shard.index == 0), None)
    settings = first.settings if first is not None else []
    problems, num_checked = [], 0
    for row in rows:
        for key, column in _COLUMNS.items():
            values = [value for step, name, value in settings if name == key and step <= row["step"]]
            found = row.get(column)
            if not values or values[-1] == "auto" or not isinstance(found, (int, float)):
                continue
            num_checked += 1
            if float(values[-1]) != found:
                problems.append(f"step {row['step']}: {key}={values[-1]}, trained with {column} {found}")
    text = "every step was trained with the settings that were in force"
    return Check(text=text, num_checked=num_checked, offenders=problems)


def _lags_within_bounds(ledgers: list[LedgerAudit], rows: list[dict[str, Any]]) -> Check:
    """Checks that the trainer used no token beyond the bound of its step; with `buffer.overdue=close` lags
    are those of the tokens that were trained on.

    Steps with `staleness.beyond` `cap` or `ratio` are left out: these limit the weights of older tokens, not
    their age.
    """
    first = next((ledger for ledger in ledgers if ledger.shard.index == 0), ledgers[0])
    bounds: dict[int, int] = {}
    for ledger in ledgers:
        for step, _, _, bound in ledger.steps:
            bounds[step] = max(bound, bounds.get(step, bound))
    problems, num_checked = [], 0
    for row in rows:
        step, lag = row["step"], row.get("lag_max")
        is_by_token = first.setting_at("buffer.overdue", step) == "close"
        limits_weights = is_by_token and first.setting_at("staleness.beyond", step) != "mask"
        if step not in bounds or limits_weights or not isinstance(lag, (int, float)):
            continue
        num_checked += 1
        if lag > bounds[step]:
            problems.append(f"step {step}: lag_max {lag}, the largest bound of its groups is {bounds[step]}")
    text = "no step was trained with a lag beyond the bound of its groups"
    return Check(text=text, num_checked=num_checked, offenders=problems)


def _step_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of steps, without a last line that is incomplete (a crash, or it is being written)."""
    return [
        {"step": row["step"]} | {name: row.get(name) for name in (*_COLUMNS.values(), "lag_max")}
        for row in read_rows(metrics)
        if row is not None and isinstance(row.get("step"), int)
    ]


def _every_shard(ledgers: list[LedgerAudit], *, config: Config) -> Check:
    """Checks that each shard of the run has one ledger."""
    wanted = {shard.ledger: shard for shard in all_shards(config.buffer.num_shards)}
    found = {ledger.directory.name: ledger.shard for ledger in ledgers}
    problems = [
        f"{name}: shard {shard.index} of {shard.count}"
        for name, shard in found.items()
        if wanted.get(name) != shard
    ]
    problems += [f"{name} is missing" for name in wanted if name not in found]
    return Check(text="every shard has one ledger", num_checked=len(ledgers), offenders=problems)


def _same_versions(ledgers: list[LedgerAudit]) -> Check:
    """Checks that a version has the same step in every shard; the first shard allocates the versions.

    The first shard may have allocated more versions since its ledger was read.
    """
    first, *others = ledgers
    problems = []
    for other in others:
        for version, step in other.versions.items():
            if version <= max(first.versions, default=0) and first.versions.get(version) != step:
                known = f"in {first.directory.name} of step {first.versions.get(version, 'none')}"
                problem = f"version {version} has weights of step {step}, {known}"
                problems.append(_located(problem, other, ledgers))
    num_checked = sum(len(other.versions) for other in others)
    text = "a version has the same weights in every shard"
    return Check(text=text, num_checked=num_checked, offenders=problems)


def _located(offender: str, ledger: LedgerAudit, ledgers: list[LedgerAudit]) -> str:
    return offender if len(ledgers) == 1 else f"{ledger.directory.name}: {offender}"
