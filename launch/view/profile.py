"""The report of `areal-like profile`: the paths of the traces, and two tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_OPERATIONS = 15
_MAX_NAME = 48


def profile_lines(reports: Sequence[Mapping[str, Any]], *, directory: Path) -> list[str]:
    """Lines for a terminal. `reports`: one per rank, in order. `directory`: contains the traces."""
    lines = []
    for report in reports:
        steps = report["steps"]
        what = f"rank {report['rank']}: {len(steps)} of {report['num_asked']} steps"
        lines.append(f"{what} ({report['error']})" if report["error"] else what)
        lines += [f"  {directory / trace}" for trace in report["traces"]]
    recorded = [report for report in reports if report["steps"]]
    if not recorded:
        return lines
    lines += ["  (open them at https://ui.perfetto.dev or in chrome://tracing)", "", *_parts(recorded)]
    return [*lines, "", *_operations(recorded[0])]


def _parts(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds a step of the named parts: on the host, and on the device if a rank has one."""
    columns, titles = [], []
    for report in reports:
        num_steps = len(report["steps"])
        columns.append({row["name"]: 1e3 * row["cpu_s"] / num_steps for row in report["ranges"]})
        titles.append(f"rank {report['rank']}")
        if report["device"] != "cpu":
            columns.append({row["name"]: 1e3 * row["device_s"] / num_steps for row in report["ranges"]})
            titles.append(report["device"])
    names = sorted({name for column in columns for name in column}, key=lambda name: -columns[0].get(name, 0))
    lines = [f"{'ms a step, with what is in it':{_MAX_NAME}}" + "".join(f"{title:>11}" for title in titles)]
    for name in names:
        numbers = "".join(f"{column[name]:11.2f}" if name in column else f"{'-':>11}" for column in columns)
        lines.append(f"{_short(name):{_MAX_NAME}}{numbers}")
    return lines


def _operations(report: Mapping[str, Any]) -> list[str]:
    key = "cpu_s" if report["device"] == "cpu" else "device_s"
    num_steps = len(report["steps"])
    title = f"operations of rank {report['rank']}, by themselves"
    lines = [f"{title:{_MAX_NAME}}{'ms a step':>11}{'calls':>11}"]
    for row in report["operations"][:_MAX_OPERATIONS]:
        calls = row["calls"] / num_steps
        lines.append(f"{_short(row['name']):{_MAX_NAME}}{1e3 * row[key] / num_steps:11.2f}{calls:11.0f}")
    return lines


def _short(name: str) -> str:
    text = "".join(char if char.isprintable() else "?" for char in name)
    return text if len(text) < _MAX_NAME else f"{text[: _MAX_NAME - 5]}... "
