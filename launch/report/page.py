"""Assembles the page: one HTML file that needs no network, no other file and, to be read, no script.

Its Content-Security-Policy allows only its own style and script, by their hashes. A name, a log line or a
sample of a run that contains HTML is therefore harmless twice: it is escaped, and it could not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launch.formatting import utc
from launch.report.charts import Chart, Section, sections
from launch.report.columns import reduced
from launch.report.figures import figures
from launch.report.findings import findings
from launch.report.run import Run
from launch.report.svg import Mark, drawn, escape, x_axis
from launch.report.tables import (
    changes_table,
    compared,
    drops_and_failures,
    events_table,
    figures_table,
    messages_table,
    selection_tables,
    settings_table,
)

_HERE = Path(__file__).parent


def page(runs: Sequence[Run], *, samples: str, now_s: float, version: str) -> str:
    """The page of one run, or of two: the second is the one that it is compared with.

    `samples`: the HTML of the section on samples.
    """
    run = runs[0]
    style, script = _text("style.css"), _text("hover.js")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_sha256(style)}'; script-src 'sha256-{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    charted = sections(runs)
    parts = [
        ("Look at", "findings", _findings(runs)),
        *([("A and B", "figures", compared(runs))] if len(runs) > 1 else []),
        *_chart_parts(charted, runs),
        *([("Figures", "figures", figures_table(run))] if len(runs) == 1 else []),
        ("Drops and failures", "drops", drops_and_failures(run)),
        ("Selection", "selection", selection_tables(run)),
        ("Changes", "changes", changes_table(run)),
        ("Samples", "samples", samples),
        ("Events", "events", events_table(run)),
        ("Log messages", "log", messages_table(run)),
        ("Settings", "settings", settings_table(runs)),
    ]
    shown = [part for part in parts if part[2]]
    nav = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for title, anchor, _ in shown)
    body = "".join(f'<h2 id="{anchor}">{escape(title)}</h2>{content}' for title, anchor, content in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: report</title><style>{style}</style></head><body><main>"
        f"{_header(runs, now_s=now_s, version=version)}<nav>{nav}</nav>{_keys(run)}{body}</main>"
        f'<script type="application/json" id="data">{_data(charted, runs)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _header(runs: Sequence[Run], *, now_s: float, version: str) -> str:
    lines = []
    for index, run in enumerate(runs):
        letter = f"{'AB'[index]}: " if len(runs) > 1 else ""
        tag = "h1" if index == 0 else "p"
        lines.append(
            f'<div class="line"><{tag}>{escape(letter + run.name)}</{tag}>'
            f'<span class="pill {run.status.word}">{run.status.word}</span>'
            f"<span>{escape(run.status.detail)}</span></div>"
            f'<p class="soft">{escape(described(run))}</p>'
        )
    note = (
        '<p class="soft">In charts with several lines, A is drawn solid and B dashed.</p>'
        if len(runs) > 1
        else ""
    )
    return (
        f"<header>{''.join(lines)}{note}"
        f'<p class="soft">Report of {utc(now_s)}, areal-like {escape(version)}</p></header>'
    )


def described(run: Run) -> str:
    """Model, task, objective and size of the run in one line."""

    def setting(section: str, *keys: str) -> str:
        values = run.config.get(section)
        found = [values.get(key) for key in keys] if isinstance(values, dict) else []
        return next((str(value) for value in found if value not in (None, "")), "")

    parts = [
        ("model", setting("model", "path")),
        ("data" if run.is_sft else "task", setting("sft", "train") if run.is_sft else _task(run)),
        ("objective", "" if run.is_sft else setting("objective", "name", "_target_")),
        ("advantage", "" if run.is_sft else setting("advantage", "name", "_target_")),
        ("staleness bound", "" if run.is_sft else str(run.config.get("max_staleness", ""))),
        ("trainer ranks", setting("trainer", "world_size")),
        ("rollout servers", "" if run.is_sft else setting("rollout", "num_servers")),
    ]
    kind = "Supervised run. " if run.is_sft else ""
    return kind + ", ".join(f"{name} {value}" for name, value in parts if value)


def _task(run: Run) -> str:
    task = run.config.get("task")
    return str(task.get("name") or task.get("_target_") or "") if isinstance(task, dict) else ""


def _keys(run: Run) -> str:
    cards = [
        f'<div class="key"><b>{escape(one.text)}</b><span>{escape(one.name)}</span>'
        f"<span>{escape(one.note)}</span></div>"
        for one in figures(run)
        if one.is_key and one.value is not None
    ]
    # Seven fit beside one another: more are in two rows, so that none stands alone.
    columns = len(cards) if len(cards) <= 7 else min(7, math.ceil(len(cards) / 2))
    return f'<div class="keys of-{columns}">{"".join(cards)}</div>'


def _findings(runs: Sequence[Run]) -> str:
    found = findings(runs[0])
    if not found:
        return '<div class="card"><p>Nothing is conspicuous.</p></div>'
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="card"><ul class="findings">{items}</ul></div>'


def _chart_parts(charted: Sequence[Section], runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    if not charted:
        return []
    x = x_axis(chart for section in charted for chart in section.charts)
    # An event in the last step is usually the end of the run, which is no news.
    marks = [
        Mark(step=event.step, text=event.text)
        for event in runs[0].events()
        if event.step is not None and event.step < runs[0].completed - 1
    ]
    parts, index = [], 0
    for section in charted:
        figures_html = []
        for chart in section.charts:
            figures_html.append(drawn(chart, index=index, x=x, marks=marks, num_runs=len(runs)))
            index += 1
        anchor = "charts-" + section.title.lower()
        parts.append((section.title, anchor, f'<div class="charts">{"".join(figures_html)}</div>'))
    return parts


def _data(charted: Sequence[Section], runs: Sequence[Run]) -> str:
    """What the script shows below the pointer. `<` is an escape, so that no text can end the element."""
    x = x_axis(chart for section in charted for chart in section.charts)
    data = {
        "xs": [reduced(run.columns.steps, run.columns.steps).x for run in runs],
        "charts": [_chart_data(chart, (x.low, x.high), runs) for one in charted for chart in one.charts],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _chart_data(chart: Chart, ends: tuple[float, float], runs: Sequence[Run]) -> dict[str, Any]:
    def label(text: str, run: int) -> str:
        return f"{'AB'[run]} {text}" if len(runs) > 1 else text

    series: list[dict[str, Any]] = []
    for line in chart.lines:
        one = {"label": label(line.label, line.run), "run": line.run, "color": line.color}
        one["values"] = _rounded(line.line.mean)
        if line.line.is_reduced and not line.is_thin:
            one |= {"low": _rounded(line.line.low), "high": _rounded(line.line.high)}
        series.append(one)
    for points in chart.points:
        series.append(
            {
                "label": label(points.label, points.run),
                "color": points.color,
                "xs": [point.step for point in points.points],
                "values": _rounded([point.avg for point in points.points]),
                "low": _rounded([point.low for point in points.points]),
                "high": _rounded([point.high for point in points.points]),
            }
        )
    return {"x": ends, "series": series}


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Four digits; None for what is not finite, because JSON has no NaN."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.4g}") for value in values]


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
