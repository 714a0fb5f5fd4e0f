"""Reads the logs of a run: warnings and errors in groups, and starts and ends of processes with the reasons.

Messages that differ only in numbers form one group. Only the end of each file is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.logs.files import find_sources
from launch.report.ledger import Event
from launch.run_files import tail, unix_time

_MAX_BYTES = 4 << 20
"""Bytes that are read at the end of each file."""
_MAX_FILES = 64
_LEVELS = {"WARNING": 1, "ERROR": 2, "CRITICAL": 3}
_EXIT_LOGGER = "areal_like.runtime.exit"
_VARYING = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")
_STARTED = re.compile(r"(\S+) started, pid \d+")
_ENDED = re.compile(r"(\S+) ended: (.*)", re.S)
_MAX_EVENTS = 300


@dataclass(kw_only=True)
class Message:
    """Warnings or errors of one daemon that differ only in numbers."""

    daemon: str
    level: str
    example: str
    """The newest."""
    count: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(kw_only=True)
class LogFacts:
    """The facts from all log files of a run."""

    messages: list[Message] = field(default_factory=list)
    """Errors first, then by how often they occur."""
    events: list[Event] = field(default_factory=list)
    exits: list[tuple[float, str, str]] = field(default_factory=list)
    """(Unix time, daemon, reason) of processes that ended with an error, by time."""
    num_starts: dict[str, int] = field(default_factory=dict)
    """Process -> starts by the launcher, if its log has not been rotated away."""
    is_closing: bool = False
    """True while the launcher ends the processes."""


def read_logs(directory: Path) -> LogFacts:
    """Reads `*.log` and their rotated files (`*.log.1`)."""
    facts = LogFacts()
    groups: dict[tuple[str, str, str], Message] = {}
    sources = [source for source in find_sources(directory, ()) if source.is_json]
    files = [(source.name, path, source.offset_s) for source in sources for path in source.files]
    for daemon, path, offset_s in files[:_MAX_FILES]:
        for entry in _entries(path, with_info=daemon == "launcher"):
            message, time_s = str(entry.get("message", "")), (unix_time(entry.get("time")) or 0.0) + offset_s
            if daemon == "launcher":
                _note_process(facts, message, time_s)
            level = str(entry.get("level"))
            if level not in _LEVELS:
                continue
            if entry.get("logger") == _EXIT_LOGGER:
                facts.exits.append((time_s, daemon, _reason(entry)))
            key = (daemon, level, _VARYING.sub("#", message[:300]))
            group = groups.setdefault(
                key, Message(daemon=daemon, level=level, example=message, first_s=time_s)
            )
            group.count += 1
            group.first_s = min(group.first_s, time_s)
            if time_s >= group.last_s:
                group.last_s, group.example = time_s, message
    facts.messages = sorted(groups.values(), key=lambda one: (-_LEVELS[one.level], -one.count, one.first_s))
    facts.exits.sort()
    facts.events = sorted(facts.events, key=lambda one: one.unix_s or 0.0)[-_MAX_EVENTS:]
    return facts


def _note_process(facts: LogFacts, message: str, time_s: float) -> None:
    """Records a start or an end that the launcher's log mentions."""
    if match := _STARTED.match(message):
        name = match[1]
        facts.num_starts[name] = facts.num_starts.get(name, 0) + 1
        if facts.num_starts[name] > 1 and name != "prepare_model":
            facts.events.append(Event(f"{name} was started again", unix_s=time_s))
    elif message in ("starting", "closing"):
        facts.is_closing = message == "closing"
    elif (match := _ENDED.match(message)) and not facts.is_closing and match[1] != "prepare_model":
        facts.events.append(Event(f"{match[1]} ended: {match[2][:200]}", unix_s=time_s))
    elif message.startswith(("replacing the trainer", "the run is drained", "the run is finished")):
        facts.events.append(Event(message[:200], unix_s=time_s))


def _reason(entry: dict[str, Any]) -> str:
    """The message, with the last line of the traceback for an unexpected error."""
    lines = str(entry.get("exception", "")).strip().splitlines()
    message = str(entry.get("message", ""))
    return f"{message}: {lines[-1]}" if lines else message


def _entries(path: Path, *, with_info: bool) -> Iterator[dict[str, Any]]:
    for line in tail(path, max_bytes=_MAX_BYTES).splitlines():
        if not line.startswith("{"):
            continue  # an engine's own log
        if not with_info and '"level": "INFO"' in line[:80]:
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry
