"""Reads what daemons have recorded in `runs/NAME/spans/` (areal_like/spans/), on the first buffer's clock."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.run_files import json_lines

MAX_FILE_BYTES = 256 << 20
"""Bytes of a file that are read."""
_MAX_TEXT = 200


@dataclass(frozen=True)
class Span:
    """One span of time, in Unix seconds of the first buffer's clock."""

    start_s: float
    seconds: float
    lane: str
    name: str
    arguments: dict[str, Any]

    @property
    def end_s(self) -> float:
        """Its end."""
        return self.start_s + self.seconds


@dataclass(frozen=True)
class Value:
    """A value of a counter, from a time on."""

    at_s: float
    name: str
    value: float


@dataclass(kw_only=True)
class Process:
    """One process of a daemon; a daemon that was restarted has several."""

    daemon: str
    host: str
    pid: int
    offset_s: float = 0.0
    """Added to its times."""
    rtt_s: float | None = None
    """The round trip that the offset was found with; None for the buffer, and before the first heartbeat."""
    spans: list[Span] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)


def read_processes(directory: Path) -> list[Process]:
    """All processes that have recorded something, by daemon and time; damaged lines are skipped."""
    found: list[Process] = []
    names = (path.name.removesuffix(".jsonl").removesuffix(".old") for path in directory.glob("*.jsonl"))
    daemons = sorted(set(names))
    for daemon in daemons:
        current: dict[tuple[str, int], Process] = {}
        process = None
        for line in itertools.chain(
            json_lines(directory / f"{daemon}.old.jsonl", max_bytes=MAX_FILE_BYTES),
            json_lines(directory / f"{daemon}.jsonl", max_bytes=MAX_FILE_BYTES),
        ):
            match line:
                case {"daemon": str(), "host": str(host), "pid": int(pid)}:
                    process = current.setdefault((host, pid), Process(daemon=daemon, host=host, pid=pid))
                case {"offset_s": float() | int() as offset, "rtt_s": float() | int() as rtt} if process:
                    # The estimate with the shortest round trip is used for all of the process's times.
                    if _is_usable(offset, rtt) and (process.rtt_s is None or rtt < process.rtt_s):
                        process.offset_s, process.rtt_s = float(offset), float(rtt)
                case [
                    float() | int() as at,
                    float() | int() as seconds,
                    str(lane),
                    str(name),
                    dict(args),
                ] if process:
                    if _is_usable(at, seconds) and seconds >= 0:
                        lane, name = lane[:_MAX_TEXT], name[:_MAX_TEXT]
                        process.spans.append(Span(float(at), float(seconds), lane, name, args))
                case [float() | int() as at, str(name), float() | int() as value] if process:
                    if _is_usable(at, value):
                        process.values.append(Value(float(at), name[:_MAX_TEXT], float(value)))
        found += current.values()
    return [_on_one_clock(process) for process in found if process.spans or process.values]


def _on_one_clock(process: Process) -> Process:
    offset = process.offset_s
    spans = [replace(one, start_s=one.start_s + offset) for one in process.spans]
    values = [replace(one, at_s=one.at_s + offset) for one in process.values]
    process.spans = sorted(spans, key=lambda one: one.start_s)
    process.values = sorted(values, key=lambda one: one.at_s)
    return process


def _is_usable(*numbers: float) -> bool:
    return all(abs(number) < 1e13 and math.isfinite(number) for number in numbers)
