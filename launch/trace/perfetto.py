"""The trace-event format (JSON), which Perfetto and chrome://tracing read. Pure.

A daemon is a process of the trace, and a lane is one or several of its threads: overlapping spans of a lane
are in different rows, at most MAX_ROWS. Spans beyond that are left out; the counter `LANE in progress` counts
all.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from launch.trace.reading import Process, Span

MAX_ROWS = 64
"""Most rows of one lane."""


def events(processes: Sequence[Process], *, first_s: float, last_s: float) -> Iterator[dict[str, Any]]:
    """The events between two times, to which longer spans are cut; microseconds since `first_s`."""

    def at(time_s: float) -> float:
        return round(1e6 * (time_s - first_s), 1)

    for pid, process in enumerate(processes, start=1):
        yield from _named("process", f"{process.daemon} ({process.host}, pid {process.pid})", pid=pid)
        lanes: dict[str, list[Span]] = defaultdict(list)
        for span in process.spans:
            if span.end_s >= first_s and span.start_s <= last_s:
                lanes[span.lane].append(span)
        tid = 0
        for lane, spans in sorted(lanes.items()):
            rows = packed(spans)
            for number, row in enumerate(rows[:MAX_ROWS], start=1):
                tid += 1
                label = lane if len(rows) == 1 else f"{lane} {number}"
                yield from _named("thread", label, pid=pid, tid=tid)
                for span in row:
                    yield {
                        "ph": "X",
                        "name": span.name,
                        "cat": lane,
                        "pid": pid,
                        "tid": tid,
                        "ts": at(max(first_s, span.start_s)),
                        "dur": round(1e6 * (min(last_s, span.end_s) - max(first_s, span.start_s)), 1),
                        "args": span.arguments,
                    }
            if len(rows) > 1:
                for time_s, count in in_progress(spans):
                    if first_s <= time_s <= last_s:
                        yield _counter(pid, f"{lane} in progress", at(time_s), count)
        for value in process.values:
            if first_s <= value.at_s <= last_s:
                yield _counter(pid, value.name, at(value.at_s), value.value)


def packed(spans: Iterable[Span]) -> list[list[Span]]:
    """The spans in rows without overlaps, as few as possible."""
    rows: list[list[Span]] = []
    free: list[tuple[float, int]] = []
    for span in sorted(spans, key=lambda one: one.start_s):
        if free and free[0][0] <= span.start_s:
            _, row = heapq.heappop(free)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(span)
        heapq.heappush(free, (span.end_s, row))
    return rows


def in_progress(spans: Iterable[Span]) -> Iterator[tuple[float, int]]:
    """(time, spans that have begun and not ended), at each change."""
    spans = list(spans)
    changes = [(one.start_s, 1) for one in spans] + [(one.end_s, -1) for one in spans]
    count = 0
    for time_s, change in sorted(changes, key=lambda one: (one[0], -one[1])):
        count += change
        yield time_s, count


def window(
    processes: Sequence[Process], *, last_s: float | None, steps: tuple[int, int] | None
) -> tuple[float, float] | None:
    """(first, last) time of the requested part: all, the last seconds, or steps; None if it has no spans."""
    if steps is not None:
        of_steps = [
            span
            for process in processes
            if process.daemon.startswith("trainer")
            for span in process.spans
            if span.lane == "step" and _is_in(span.arguments.get("step"), steps)
        ]
        ends = [time_s for span in of_steps for time_s in (span.start_s, span.end_s)]
        return (min(ends), max(ends)) if ends else None
    ends = [time_s for one in processes for span in one.spans for time_s in (span.start_s, span.end_s)]
    ends += [value.at_s for one in processes for value in one.values]
    if not ends:
        return None
    return (min(ends) if last_s is None else max(ends) - last_s), max(ends)


def _is_in(step: Any, steps: tuple[int, int]) -> bool:
    return isinstance(step, int) and steps[0] <= step < steps[1]


def _named(kind: str, name: str, *, pid: int, tid: int = 0) -> Iterator[dict[str, Any]]:
    """The events that set the name and the order of a process or a thread."""
    for what, arguments in (("name", {"name": name}), ("sort_index", {"sort_index": tid or pid})):
        yield {"ph": "M", "name": f"{kind}_{what}", "pid": pid, "tid": tid, "args": arguments}


def _counter(pid: int, name: str, at: float, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at, "args": {"value": value}}
