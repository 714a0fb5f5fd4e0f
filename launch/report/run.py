"""Reads everything that a report needs from a run's files, without requests to its daemons."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.config import Config, to_mapping
from areal_like.config.loading import flat
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import OPEN_SECTIONS
from areal_like.selection import selection_report
from launch.offline_verbs import OfflineVerb, offline_verb
from launch.report.columns import Columns, read_columns
from launch.report.ledger import Event, LedgerFacts, read_ledgers
from launch.report.logs import LogFacts, read_logs
from launch.run_directory.rundir import is_held
from launch.run_files import json_lines, mapping, number, read_config, read_object

_SILENT_S = 120.0
"""A run whose roles were started by hand counts as running if it has written a file within this time."""
_MAX_EVALUATIONS = 20_000


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Whether the run is running, and otherwise why not."""

    word: str
    """`running`, `finished`, `drained`, `failed` or `ended` (for an unknown reason: killed, or lost)."""
    detail: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one set."""

    set_name: str
    step: int
    avg: float
    low: float | None
    high: float | None


@dataclass(kw_only=True)
class Run:
    """One run."""

    name: str
    config: dict[str, Any]
    """Settings as plain values, without possible secrets; empty if config.yaml cannot be read."""
    verb: OfflineVerb | None
    """The verb of a run that trains on rows; None for one with rewards."""
    columns: Columns
    evaluations: list[Evaluation]
    """In order of steps."""
    summary: dict[str, Any]
    rows: dict[str, Any]
    """The content of rows.json of a run that trains on rows."""
    ledger: LedgerFacts
    logs: LogFacts
    status: RunStatus
    has_ledger: bool = False

    @property
    def is_offline(self) -> bool:
        return self.verb is not None

    @property
    def num_steps(self) -> int | None:
        """The planned number of steps."""
        planned = number(self.rows.get("num_steps")) if self.is_offline else None
        planned = planned or number(mapping(self.config.get("trainer")).get("num_steps"))
        return int(planned) if planned else None

    @property
    def completed(self) -> int:
        """Optimizer steps that have a row."""
        return int(self.columns.steps[-1]) + 1 if len(self.columns.steps) else 0

    @property
    def seconds(self) -> float | None:
        """Seconds from the end of the first step to the end of the last one, including pauses."""
        times = self.columns.times_s
        return float(times[-1] - times[0]) if len(times) > 1 else None

    @property
    def num_starts(self) -> dict[str, int]:
        """How many processes have run under each name, according to the ledger and the launcher's log."""
        return {
            name: max(self.ledger.starts.get(name, 0), self.logs.num_starts.get(name, 0))
            for name in sorted({*self.ledger.starts, *self.logs.num_starts} - {"prepare_model"})
        }

    @property
    def selection(self) -> dict[str, Any]:
        """Offered samples compared with trained samples, like `selection` in summary.json."""
        if self.has_ledger and self.ledger.counters:
            return selection_report(self.ledger.counters)
        return mapping(self.summary.get("selection"))

    @property
    def counters(self) -> dict[str, float]:
        """Counters of the ledger, or of the summary without one."""
        found = self.ledger.counters if self.has_ledger else mapping(self.summary.get("counters"))
        return {name: value for name, value in found.items() if number(value) is not None}

    @property
    def closing(self) -> dict[str, Any]:
        """Closed groups and their samples; empty without any."""
        return mapping(self.selection.get("closing"))

    @property
    def held_back_s(self) -> float | None:
        """Seconds in which the trainer waited for samples that were complete, in groups that were not."""
        return self.counters.get("held_back_s")

    @property
    def drops(self) -> dict[str, int]:
        """Dropped tickets by reason, zeros left out."""
        found = self.ledger.drops if self.has_ledger else mapping(self.summary.get("drops"))
        return {str(name): int(count) for name, count in found.items() if number(count)}

    def events(self) -> list[Event]:
        """Restarts, rollbacks and operators' actions, ordered by time where it is known."""
        found = [*self.ledger.events, *self.logs.events]
        for event in found:
            if event.unix_s is None and event.step is not None:
                event.unix_s = self.time_of(event.step)
            elif event.step is None and event.unix_s is not None:
                event.step = self.step_at(event.unix_s)
        return sorted(found, key=lambda one: (one.unix_s or 0.0, one.step or 0))

    def step_at(self, unix_s: float) -> int | None:
        """The step that was in progress at a time; None before the first row and without rows."""
        times = self.columns.times_s
        if not len(times) or unix_s < times[0]:
            return None
        return int(self.columns.steps[min(len(times) - 1, int(times.searchsorted(unix_s)))])

    def time_of(self, step: int) -> float | None:
        """When a step ended; None if it has no row."""
        at = int(self.columns.steps.searchsorted(step))
        if at == len(self.columns.steps) or self.columns.steps[at] != step:
            return None
        return float(self.columns.times_s[at])

    def settings(self) -> dict[str, str]:
        """Settings that differ from their defaults, plus every setting of an open section, as typed on the
        command line."""
        return {
            key: text
            for key, text in flat(self.config).items()
            if key.partition(".")[0] in OPEN_SECTIONS or _DEFAULTS.get(key) != text
        }


_DEFAULTS = flat(to_mapping(Config()))


def read_run(root: Path) -> Run:
    """Reads the files of a run. Files that are absent or damaged are left out."""
    paths = RunPaths(root)
    try:
        directories, ledger = paths.ledgers, read_ledgers(paths.ledgers)
    except ConfigError as error:  # on a disk that this machine does not have
        directories, ledger = [], LedgerFacts(problem=str(error))
    columns, logs = read_columns(paths.metrics), read_logs(paths.logs)
    summary = read_object(paths.summary)
    try:
        config = read_config(paths.config)
    except ConfigError:
        config = {}
    return Run(
        name=str(config.get("name") or root.resolve().name),
        config=config,
        verb=offline_verb(paths),
        columns=columns,
        evaluations=_evaluations(paths.evaluations),
        summary=summary,
        rows=read_object(paths.rows),
        ledger=ledger,
        logs=logs,
        status=status_of(paths, logs, summary, num_rows=len(columns.steps)),
        has_ledger=bool(directories),
    )


def _evaluations(path: Path) -> list[Evaluation]:
    found: deque[Evaluation] = deque(maxlen=_MAX_EVALUATIONS)
    for row in map(mapping, json_lines(path)):
        step, avg = number(row.get("step")), number(row.get("avg"))
        if step is not None and avg is not None:
            low, high = number(row.get("ci_low")), number(row.get("ci_high"))
            found.append(Evaluation(str(row.get("set", "")), int(step), avg, low, high))
    return sorted(found, key=lambda one: one.step)


def status_of(paths: RunPaths, logs: LogFacts, summary: dict[str, Any], *, num_rows: int) -> RunStatus:
    """The status of a run, from its files. `num_rows`: steps that have a row."""
    held = is_held(paths)
    newest = max((modified_unix_s(path) for path in (paths.metrics, *paths.logs.glob("*.log"))), default=0.0)
    steps = f"{num_rows:,} steps"
    if held or (held is None and time.time() - newest < _SILENT_S and any(paths.endpoints.glob("*.json"))):
        return RunStatus(word="running", detail=f"{steps} so far")
    summarized = modified_unix_s(paths.summary)
    if summary and bool(summary.get("finished")):
        return RunStatus(word="finished", detail=f"all {steps} are trained")
    failures = [one for one in logs.exits if one[0] > summarized - 1]
    if failures:
        # The first daemon that failed usually made the others fail.
        last_s = failures[-1][0]
        _, daemon, reason = next(one for one in failures if last_s - one[0] < _SILENT_S)
        return RunStatus(word="failed", detail=f"{daemon}: {reason}")
    if summary:
        return RunStatus(word="drained", detail=f"stopped after {steps}; resume=latest continues it")
    if newest == 0.0:
        return RunStatus(word="ended", detail="nothing is written yet")
    return RunStatus(
        word="ended", detail=f"after {steps}, without a summary: killed, or its machine was lost"
    )


def modified_unix_s(path: Path) -> float:
    """When a file was last changed; 0 if it does not exist, or has just been renamed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
