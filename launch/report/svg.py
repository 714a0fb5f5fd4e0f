"""Draws a chart as HTML with inline SVG, legible at any width without a script. Pure.

The plot is stretched to the width of the page (`preserveAspectRatio="none"`, strokes that do not scale).
Labels are text in SVGs that are not stretched, at percentages. Everything that a run has named is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from areal_like.terminal_text import harmless
from launch.formatting import labels, short, ticks
from launch.report.charts import Chart, DrawnLine, DrawnPoints

WIDTH, HEIGHT = 1000, 200
"""Of the plot's coordinates."""
NUM_COLORS = 8
_MAX_MARKS = 60


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line in every chart: something happened at a step."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to [0, 1]."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Position of a value; clipped a little outside of the axis."""
        if self.is_log:
            value = math.log10(max(value, 1e-300))
        return min(1.02, max(-0.02, (value - self.low) / (self.high - self.low)))

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """(position, label)"""
        if self.is_log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            every = max(1, len(powers) // count)
            return [(self.at(10.0**power), short(10.0**power)) for power in powers][::every]
        values = ticks(self.low, self.high, count=count)
        return [(self.at(value), label) for value, label in zip(values, labels(values), strict=True)]


def x_axis(charts: Iterable[Chart]) -> Axis:
    """One axis of steps for all charts, so that what happened at a step is below one another."""
    steps: list[float] = []
    for chart in charts:
        steps += (x for one in chart.lines for x in (one.line.x[:1] + one.line.x[-1:]))
        steps += (point.step for one in chart.points for point in one.points)
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    return Axis(low=low, high=high if high > low else low + 1)


def y_axis(chart: Chart) -> Axis:
    """The axis of the values, with a small margin."""
    values = [
        value
        for one in chart.lines
        for column in (one.line.low, one.line.high)
        for value in column
        if math.isfinite(value)
    ]
    for drawn in chart.points:
        for point in drawn.points:
            values += [value for value in (point.avg, point.low, point.high) if value is not None]
    if not values:
        return Axis(low=0, high=1)
    low, high = min(values), max(values)
    if chart.log_scale and low > 0 and high / low > 100:
        return Axis(low=math.log10(low) - 0.1, high=math.log10(high) + 0.1, is_log=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = low - margin if chart.floor is None or low < chart.floor else chart.floor
    return Axis(low=floor, high=high + margin)


def drawn(chart: Chart, *, index: int, x: Axis, marks: Sequence[Mark], num_runs: int) -> str:
    """The HTML of one chart. `index`: its place in the page's data."""
    y = y_axis(chart)
    body = "".join(
        [
            *(f'<path class="grid" d="M0 {_y(at)}H{WIDTH}"/>' for at, _ in _inside(y.ticks(5))),
            *(
                f'<path class="mark" d="M{_x(x.at(one.step))} 0V{HEIGHT}">'
                f"<title>{escape(one.text)}</title></path>"
                for one in marks[:_MAX_MARKS]
            ),
            *(_band(one, x, y) for one in chart.lines if one.line.is_reduced and not one.is_thin),
            *(_line(one, x, y) for one in chart.lines),
            *(_points(one, x, y) for one in chart.points),
        ]
    )
    y_labels = "".join(
        f'<text x="100%" dx="-6" y="{100 * (1 - at):.1f}%" dy="4" text-anchor="end">{label}</text>'
        for at, label in _inside(y.ticks(5))
    )
    x_labels = "".join(
        f'<text x="{100 * at:.1f}%" y="15" text-anchor="{_anchor(at)}">{label}</text>'
        for at, label in _inside(x.ticks(5))
    )
    return (
        f'<figure class="chart" data-chart="{index}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p class="unit">{escape(chart.unit)}</p>{_legend(chart, num_runs=num_runs)}</figcaption>'
        f'<div class="plot"><svg class="ys" aria-hidden="true">{y_labels}</svg>'
        f'<div class="area"><svg class="xy" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(chart.title)}">{body}'
        f'<path class="cursor" d="M0 0V{HEIGHT}" visibility="hidden"/></svg>'
        f'<div class="tip" hidden></div></div>'
        '<svg class="xs" aria-hidden="true"><text x="100%" dx="-6" y="15" text-anchor="end">step</text></svg>'
        f'<svg class="xs" aria-hidden="true">{x_labels}</svg></div></figure>'
    )


def escape(text: str) -> str:
    """For HTML, attributes included; control and invisible characters become visible escapes."""
    return html.escape(harmless(text), quote=True)


def _inside(found: list[tuple[float, str]]) -> list[tuple[float, str]]:
    return [(at, label) for at, label in found if -0.001 <= at <= 1.001]


def _anchor(at: float) -> str:
    return "start" if at < 0.04 else "end" if at > 0.96 else "middle"


def _x(at: float) -> str:
    return f"{WIDTH * at:.1f}".removesuffix(".0")


def _y(at: float) -> str:
    return f"{HEIGHT * (1 - at):.1f}".removesuffix(".0")


def _runs_of(values: Sequence[float]) -> Iterator[range]:
    """Ranges of consecutive finite values."""
    start = None
    for index, value in enumerate([*values, math.nan]):
        if math.isfinite(value):
            start = index if start is None else start
        elif start is not None:
            yield range(start, index)
            start = None


def _line(one: DrawnLine, x: Axis, y: Axis) -> str:
    pieces = []
    for span in _runs_of(one.line.mean):
        points = [f"{_x(x.at(one.line.x[at]))} {_y(y.at(one.line.mean[at]))}" for at in span]
        pieces.append(f"M{points[0]}" + ("L" + " ".join(points[1:]) if len(points) > 1 else "h0"))
    classes = (
        f"line c{one.color % NUM_COLORS}" + (" thin" if one.is_thin else "") + (" other" if one.run else "")
    )
    return f'<path class="{classes}" d="{"".join(pieces)}"/>' if pieces else ""


def _band(one: DrawnLine, x: Axis, y: Axis) -> str:
    pieces = []
    for span in _runs_of(one.line.mean):
        upper = [f"{_x(x.at(one.line.x[at]))} {_y(y.at(one.line.high[at]))}" for at in span]
        lower = [f"{_x(x.at(one.line.x[at]))} {_y(y.at(one.line.low[at]))}" for at in reversed(span)]
        pieces.append(f"M{'L'.join([*upper, *lower])}Z")
    return f'<path class="band c{one.color % NUM_COLORS}" d="{"".join(pieces)}"/>'


def _points(one: DrawnPoints, x: Axis, y: Axis) -> str:
    places = [(_x(x.at(point.step)), point) for point in one.points]
    whiskers = "".join(
        f"M{at} {_y(y.at(point.low))}V{_y(y.at(point.high))}"
        for at, point in places
        if point.low is not None and point.high is not None
    )
    joined = "L".join(f"{at} {_y(y.at(point.avg))}" for at, point in places)
    dots = "".join(f"M{at} {_y(y.at(point.avg))}h0" for at, point in places)
    color = f"c{one.color % NUM_COLORS}" + (" other" if one.run else "")
    return (
        f'<path class="line thin {color}" d="M{joined}"/><path class="whisker {color}" d="{whiskers}"/>'
        f'<path class="dot {color}" d="{dots}"/>'
    )


def _legend(chart: Chart, *, num_runs: int) -> str:
    """One entry for each color; of two runs that differ in color, one for each of them."""
    named = [(one.label, one.color, one.run) for one in chart.lines]
    named += [(one.label, one.color, one.run) for one in chart.points]
    entries = list(dict.fromkeys(named))
    if num_runs == 1 and len(entries) < 2:
        return ""
    shown: dict[int, str] = {}
    for label, color, run in entries:
        num_colors = len({one[1] for one in entries if one[0] == label})
        if num_runs > 1 and num_colors > 1:
            label = f"{label} ({'A' if run == 0 else 'B'})"
        shown.setdefault(color, label)
    items = "".join(
        f'<li class="c{color % NUM_COLORS}">{escape(label)}</li>' for color, label in shown.items()
    )
    return f'<ul class="legend">{items}</ul>'
