"""Turns charts into the paths, labels and legends that page.html draws as SVG, and the texts for hover.js.

A plot is stretched to the width of the page (`preserveAspectRatio="none"`, strokes that do not scale), so its
coordinates are percentages. Labels are text in SVGs that are not stretched, at the same percentages: a chart
is legible at any width, on paper and without a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from launch.formatting import labels, short, ticks
from launch.report.charts import Chart, Series, SeriesKind

NUM_COLORS = 8
_NUM_TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to percentages of its length."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Position of a value in percent, clipped slightly beyond the axis."""
        if self.is_log:
            value = math.log10(max(value, 1e-300))
        return round(100 * min(1.02, max(-0.02, (value - self.low) / (self.high - self.low))), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """(percent, label) of round values."""
        if self.is_log:
            powers = [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1)]
            values = powers[:: max(1, len(powers) // _NUM_TICKS)]
            texts = [short(value) for value in values]
        else:
            values = ticks(self.low, self.high, count=_NUM_TICKS)
            texts = labels(values)
        return [(self.at(value), text) for value, text in zip(values, texts, strict=True)]


def x_axis(charts: Iterable[Chart]) -> Axis:
    """One axis of steps for all charts, so that a step has the same position in all of them."""
    steps = [x for chart in charts for one in chart.series for x in (one.line.x[0], one.line.x[-1])]
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Axis(low=low, high=high if high > low else low + 1)


def y_axis(chart: Chart) -> Axis:
    """The axis of the values, with a small margin."""
    lines = [one.line for one in chart.series]
    values = [
        value
        for line in lines
        for column in (line.mean, line.low, line.high)
        for value in column
        if math.isfinite(value)
    ]
    low, high = min(values), max(values)
    if chart.spec.log_scale and low > 0 and high / low > 100:
        return Axis(low=math.log10(low) - 0.1, high=math.log10(high) + 0.1, is_log=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = chart.spec.floor
    return Axis(low=low - margin if floor is None or low < floor else floor, high=high + margin)


def paths(chart: Chart, x: Axis, y: Axis) -> list[tuple[str, str]]:
    """(CSS classes, path data) of all lines; bands are below the lines."""
    found = [path for one in chart.series for path in _paths(one, x, y)]
    return sorted(found, key=lambda path: not path[0].startswith("band"))


def _paths(one: Series, x: Axis, y: Axis) -> Iterator[tuple[str, str]]:
    line = one.line

    def points(indices: Iterable[int], values: Sequence[float]) -> str:
        return "L".join(f"{x.at(line.x[at]):g} {100 - y.at(values[at]):g}" for at in indices)

    pieces = [
        list(indices)
        for is_known, indices in groupby(range(len(line.x)), lambda at: math.isfinite(line.mean[at]))
        if is_known
    ]
    color = f"c{one.color % NUM_COLORS}" + (" other" if one.run else "")
    if _has_band(one):
        bands = (f"M{points(piece, line.high)}L{points(piece[::-1], line.low)}Z" for piece in pieces)
        yield f"band {color}", "".join(bands)
    style = "line thin" if one.kind == SeriesKind.POINTS else one.kind
    # A line of length 0 at the end draws a dot for a single point.
    yield f"{style} {color}", "".join(f"M{points(piece, line.mean)}h0" for piece in pieces)
    if one.kind == SeriesKind.POINTS:
        known = [at for at in range(len(line.x)) if math.isfinite(line.low[at] + line.high[at])]
        whiskers = (f"M{points([at], line.low)}L{points([at], line.high)}" for at in known)
        yield f"whisker {color}", "".join(whiskers)
        yield f"dot {color}", "".join(f"M{points([at], line.mean)}h0" for at in range(len(line.x)))


def _has_band(one: Series) -> bool:
    return one.kind == SeriesKind.LINE and one.line.is_reduced


def legend(series: Sequence[Series], num_runs: int) -> dict[int, str]:
    """Color -> label, one for each run if two runs differ in color; empty for a single series."""
    if num_runs == 1 and len(series) < 2:
        return {}
    shown: dict[int, str] = {}
    for one in series:
        num_colors = len({other.color for other in series if other.label == one.label})
        which = f" ({'AB'[one.run]})" if num_runs > 1 and num_colors > 1 else ""
        shown.setdefault(one.color, one.label + which)
    return shown


def hover(one: Series, steps: list[list[float]], *, num_runs: int) -> dict[str, Any]:
    """Label, color, index of a series' steps in the page's list, and a text for each point.

    `steps`: the page's lists of steps; that of the series is added to it.
    """
    line, is_points = one.line, one.kind == SeriesKind.POINTS
    if line.x not in steps:
        steps.append(line.x)
    texts = []
    for step, mean, low, high in zip(line.x, line.mean, line.low, line.high, strict=True):
        text = short(mean)
        if (is_points or _has_band(one)) and math.isfinite(low + high):
            text += f" [{short(low)}, {short(high)}]"
        texts.append(f"{text} at {step:g}" if is_points else text)
    label = f"{'AB'[one.run]} {one.label}" if num_runs > 1 else one.label
    return {"label": label, "color": one.color % NUM_COLORS, "steps": steps.index(line.x), "texts": texts}
