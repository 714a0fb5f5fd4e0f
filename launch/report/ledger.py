"""Reads counters, tickets, restarts and operators' changes from the ledgers of a run.

Buffers may write the ledgers at the same time.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from areal_like.ledger_place import LEDGER_FILE, open_ledger

_MAX_ROWS = 500
"""Number of rows that are read from a table of events, the newest."""


@dataclass
class Event:
    """An event in the run: an operator's action or a restart."""

    text: str
    step: int | None = None
    """The step in which it took effect; None if only its time is known."""
    unix_s: float | None = None


@dataclass(frozen=True)
class SettingChange:
    """A setting that changed during the run, or an action that an operator requested."""

    step: int
    """The first step with the value; for an action, the step after which it was done."""
    key: str
    before: str
    """The previous value; empty for an action."""
    value: str
    by: str
    """`operator`, or `start`: configured again when a trainer started."""
    unix_s: float

    @property
    def text(self) -> str:
        """The change on one line."""
        return f"{self.key}: {self.before} -> {self.value}" if self.before else f"{self.key}={self.value}"


@dataclass(kw_only=True)
class LedgerFacts:
    """The facts of all shards, added up."""

    counters: dict[str, float] = field(default_factory=dict)
    """The table `statistics`: counters that survive restarts."""
    counts_selection: bool = True
    tickets: Counter[str] = field(default_factory=Counter)
    """Train tickets by state."""
    drops: Counter[str] = field(default_factory=Counter)
    """Dropped train tickets by reason."""
    starts: dict[str, int] = field(default_factory=dict)
    """Name of a daemon, or `buffer` -> number of processes that have had it."""
    crashed_steps: dict[int, int] = field(default_factory=dict)
    """Step -> trainers that began it and did not complete it."""
    events: list[Event] = field(default_factory=list)
    changes: list[SettingChange] = field(default_factory=list)
    """In the order in which they were made."""
    problem: str = ""
    """Why a ledger could not be read."""


def read_ledgers(directories: Sequence[Path]) -> LedgerFacts:
    """The facts of all shards; empty without a ledger."""
    facts = LedgerFacts()
    for shard, directory in enumerate(directories):
        try:
            with closing(open_ledger(directory)) as ledger:
                _read(ledger, facts, shard=shard, num_shards=len(directories))
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            facts.problem = f"{directory / LEDGER_FILE} cannot be read: {error}"
    return facts


def _read(ledger: sqlite3.Connection, facts: LedgerFacts, *, shard: int, num_shards: int) -> None:
    (version,) = ledger.execute("PRAGMA user_version").fetchone()
    if not version:
        return  # its buffer died before it had made the tables
    for name, value in ledger.execute("SELECT name, value FROM statistics"):
        known = facts.counters.get(str(name), 0.0)
        # The trainer may wait for several shards at once.
        is_time = name == "held_back_s"
        facts.counters[str(name)] = max(known, float(value)) if is_time else known + float(value)
    counts = "SELECT state, coalesce(reason, ''), count(*) FROM tickets WHERE purpose = 'train' GROUP BY 1, 2"
    for state, reason, count in ledger.execute(counts):
        facts.tickets[str(state)] += int(count)
        if state == "dropped":
            facts.drops[str(reason) or "unknown"] += int(count)
    marks = {str(name): int(value) for name, value in ledger.execute("SELECT name, value FROM marks")}
    facts.counts_selection &= bool(marks.get("counts_selection"))
    suffix = f"-{shard}" if num_shards > 1 else ""
    if "generation" in marks:
        facts.starts[f"buffer{suffix}"] = marks["generation"]
    for step, count in ledger.execute("SELECT step, num_starts FROM attempts"):
        facts.crashed_steps[int(step)] = max(int(count), facts.crashed_steps.get(int(step), 0))
    if shard:
        return  # the first shard alone has the names, versions and operations
    for name, value in marks.items():
        if name.startswith("incarnation:"):
            facts.starts[name.removeprefix("incarnation:")] = value
    if marks.get("trainer_incarnation"):
        facts.starts["trainer"] = marks["trainer_incarnation"]
    facts.changes = _changes(ledger)
    of_changes = [
        Event(f"{change.text} ({change.by})", step=change.step, unix_s=change.unix_s)
        for change in facts.changes[-_MAX_ROWS:]
    ]
    facts.events = [*_restarts(ledger), *_operations(ledger), *of_changes]


def _restarts(ledger: sqlite3.Connection) -> list[Event]:
    newest = f"ORDER BY 1 DESC LIMIT {_MAX_ROWS}"
    began = f"SELECT trainer_incarnation, min(version), step FROM versions GROUP BY 1 {newest}"
    undone = f"SELECT id, from_step, to_step, num_tickets, num_tokens, unix_s FROM rollbacks {newest}"
    events = [
        Event(f"trainer process {incarnation} began", step=int(step))
        for incarnation, _, step in ledger.execute(began)
        if incarnation > 1
    ]
    for _, from_step, to_step, num_tickets, num_tokens, unix_s in ledger.execute(undone):
        lost = f"{num_tickets} groups, {num_tokens} tokens"
        text = f"steps {to_step} to {from_step - 1} were undone: {lost}"
        events.append(Event(text, step=int(to_step), unix_s=float(unix_s)))
    return events


def _operations(ledger: sqlite3.Connection) -> list[Event]:
    done = f"SELECT verb, subject, detail, unix_s FROM operations ORDER BY id DESC LIMIT {_MAX_ROWS}"
    return [
        Event(f"{verb} {subject}" + (f" ({detail})" if detail else ""), unix_s=float(unix_s))
        for verb, subject, detail, unix_s in ledger.execute(done)
        if verb != "set"  # in the table of settings, with its step
    ]


def _changes(ledger: sqlite3.Connection) -> list[SettingChange]:
    """The changes, without the values with which the run started."""
    found: list[SettingChange] = []
    values: dict[str, list[tuple[int, str]]] = {}
    rows = ledger.execute("SELECT step, key, value, origin, unix_s FROM settings ORDER BY id")
    for step, key, value, origin, unix_s in rows:
        earlier = [known for first, known in values.get(key, []) if first <= step]
        if origin == "operator" or (earlier and earlier[-1] != value):
            before = earlier[-1] if earlier else ""
            found.append(SettingChange(int(step), str(key), before, str(value), str(origin), float(unix_s)))
        if value != "now":
            values.setdefault(key, []).append((int(step), str(value)))
    return found
