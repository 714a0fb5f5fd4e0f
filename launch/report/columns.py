"""Reads the numbers of metrics.jsonl into one array per column, and reduces them to a few hundred points.

A run may have millions of steps: rows are read one by one, and only numbers are kept, 4 bytes each. A chart
shows at most NUM_BUCKETS points. Each point of a longer run stands for a bucket of steps, with their mean,
minimum and maximum, so that a single outlier stays visible.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.run_files import read_rows

NUM_BUCKETS = 320
"""Most points of a line."""
MAX_COLUMNS = 256
"""Most columns that are kept, including names within `_NESTED`."""
_NESTED = ("finish_reasons", "reward_parts", "drops")
"""Columns that are mappings from a name to a number; others of this kind are left out."""

Floats = NDArray[np.float32]


@dataclass(kw_only=True)
class Columns:
    """Rows of a run, column by column. A number that a row lacks is NaN."""

    steps: NDArray[np.int64]
    """Step numbers, ascending and unique."""
    times_s: NDArray[np.float64]
    """Unix time of each step's end; NaN where the row has none."""
    values: dict[str, Floats] = field(default_factory=dict)
    """Column -> its values; an entry of a mapping has a name such as `finish_reasons.length`."""
    is_incomplete: bool = False
    """True if a line could not be read, so that it and the lines after it are missing."""

    def get(self, name: str) -> Floats:
        """A column of metrics.jsonl, or one of `DERIVED`; NaN in each step if no row has it."""
        if name in DERIVED:
            return DERIVED[name](self)
        absent = np.full(len(self.steps), np.nan, np.float32)
        return self.values.get(name, absent)

    def has(self, name: str) -> bool:
        """True if a row has a finite number in the column."""
        return bool(np.isfinite(self.get(name)).any())

    def head_mean(self, name: str) -> float | None:
        """Mean over the first tenth of the steps (at least one); None without a number there."""
        return mean(self.get(name)[: self._tenth])

    def tail_mean(self, name: str) -> float | None:
        """Mean over the last tenth of the steps (at least one); None without a number there."""
        return mean(self.get(name)[-self._tenth :])

    @property
    def _tenth(self) -> int:
        return max(1, round(len(self.steps) / 10))

    def increase(self, name: str) -> Floats:
        """The increase of a counter since the previous row that has it, at each row that has it.

        A counter that has become smaller was reset to 0.
        """
        column = self.get(name)
        known = np.flatnonzero(np.isfinite(column))
        gained = np.full(len(column), np.nan, np.float32)
        if len(known) > 1:
            now, before = column[known[1:]], column[known[:-1]]
            gained[known[1:]] = np.where(now >= before, now - before, now)
        return gained

    def seconds_between(self, name: str) -> Floats:
        """Seconds since the previous row that has the counter, at each row that has it."""
        gained = np.full(len(self.steps), np.nan, np.float32)
        known = np.flatnonzero(np.isfinite(self.get(name)))
        gained[known[1:]] = np.diff(self.times_s[known])
        return gained


def read_columns(path: Path) -> Columns:
    """Reads metrics.jsonl; empty without the file. Reading stops at a line that a crash cut short."""
    steps, times = array("q"), array("d")
    values: dict[str, array[float]] = {}
    is_incomplete = False
    for row in read_rows(path):
        if row is None:
            is_incomplete = True
            break
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
            continue
        while steps and steps[-1] >= step:  # trained again
            steps.pop()
            times.pop()
            for column in values.values():
                column.pop()
        for name, value in _numbers(row):
            if name not in values:
                if len(values) >= MAX_COLUMNS:
                    continue
                values[name] = array("f", [math.nan]) * len(steps)
            values[name].append(value)
        steps.append(step)
        times.append(_as_float(row.get("time_unix_s")))
        for column in values.values():
            if len(column) < len(steps):
                column.append(math.nan)
    return Columns(
        steps=np.frombuffer(steps, np.int64) if steps else np.zeros(0, np.int64),
        times_s=np.frombuffer(times, np.float64) if times else np.zeros(0),
        values={name: np.frombuffer(column, np.float32) for name, column in values.items() if column},
        is_incomplete=is_incomplete,
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """The points of one line: at most NUM_BUCKETS."""

    x: list[float]
    """The middle of the steps that each point stands for."""
    mean: list[float]
    """NaN where no step of the bucket has a number."""
    low: list[float]
    high: list[float]

    @property
    def is_reduced(self) -> bool:
        """True if a point stands for several steps that differ."""
        return self.low != self.mean


def reduced(steps: NDArray[np.int64], values: NDArray[Any], *, num_buckets: int = NUM_BUCKETS) -> Line:
    """The line through the values; buckets are equally wide in steps."""
    if len(steps) <= num_buckets:
        points = [float(value) for value in values]
        return Line(x=[float(step) for step in steps], mean=points, low=points, high=points)
    width = (int(steps[-1]) - int(steps[0]) + 1) / num_buckets
    buckets = np.minimum(num_buckets - 1, ((steps - steps[0]) / width).astype(np.int64))
    starts = np.flatnonzero(np.diff(buckets, prepend=-1))
    ends = np.append(starts[1:], len(steps))
    x = [(float(steps[a]) + float(steps[b - 1])) / 2 for a, b in zip(starts, ends, strict=True)]
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(np.int64), starts)
    total = np.add.reduceat(np.where(known, values, 0).astype(np.float64), starts)
    is_empty = count == 0

    def filled(column: NDArray[Any]) -> list[float]:
        return [float(value) for value in np.where(is_empty, np.nan, column)]

    return Line(
        x=x,
        mean=filled(total / np.maximum(count, 1)),
        low=filled(np.minimum.reduceat(np.where(known, values, np.inf), starts)),
        high=filled(np.maximum.reduceat(np.where(known, values, -np.inf), starts)),
    )


def _idle_of_engines(rows: Columns) -> Floats:
    idle = rows.increase("generation_idle_s")
    return filled_back(ratio(idle, idle + rows.increase("generation_busy_s")))


DERIVED: dict[str, Callable[[Columns], Floats]] = {
    "trainer idle": lambda rows: ratio(rows.get("wait_data_s"), rows.get("step_s")),
    "engines idle": _idle_of_engines,
    "generated rate": lambda rows: filled_back(
        ratio(rows.increase("tokens_generated"), rows.seconds_between("tokens_generated"))
    ),
}
"""Columns that are computed from others: the share of each step's time in which rank 0 waited for data, the
share of the time in which the engines had nothing to decode, and sampled tokens a second. The last two are
computed over the time since the previous row that has the counters."""


def filled_back(values: Floats) -> Floats:
    """Replaces each unknown value by the next known one: a rate covers the time since the previous known
    row."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known):
        following = known[np.minimum(np.searchsorted(known, np.arange(len(values))), len(known) - 1)]
        values = np.where(np.arange(len(values)) <= known[-1], values[following], np.float32(np.nan))
    return values


def ratio(part: Floats, whole: Floats) -> Floats:
    """One column over another, NaN where the other is not above 0."""
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def mean(values: Floats) -> float | None:
    """The mean of the finite values; None if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        nested = name in _NESTED and isinstance(value, dict)
        for key, item in value.items() if nested else [("", value)]:
            is_number = isinstance(item, int | float) and not isinstance(item, bool)
            if is_number and name not in ("step", "time_unix_s"):
                # A float32 cannot hold more.
                yield f"{name}.{key}" if nested else name, item if abs(item) < 3e38 else math.nan


def _as_float(value: object) -> float:
    """A Unix time; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else math.nan
