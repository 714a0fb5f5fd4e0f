"""Makes the table and the figure of benchmarks/crash_cost.py from the kills that have results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import pyplot, table

PEERS = ("job", "none")
"""The whole job is killed and resumed from a checkpoint, with nothing else left."""
_ROLES = ("server", "buffer", "trainer", "launcher", "job")
_DURABILITIES = ("process_crash", "power_loss", "none")
_COLUMNS = {
    "lost_s": "trajectory-seconds lost",
    "lost_trajectories": "trajectories lost",
    "lost_complete": "complete ones",
    "twice_samples": "samples trained twice",
    "undone_samples": "samples undone",
    "answered_s": "seconds to repair",
    "caught_up_s": "until a new step",
}
_PANELS = {
    "lost_s": "trajectory-seconds lost",
    "undone_samples": "samples of steps made again",
    "answered_s": "seconds to repair",
}
_NAMES = {
    "server": "rollout server",
    "buffer": "buffer",
    "trainer": "trainer",
    "launcher": "launcher",
    "job": "all processes",
}
Row = dict[str, Any]


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(role, durability) -> its kills, in the order of the table, without those that have none."""
    found = {
        (role, durability): [row for row in rows if (row["role"], row["durability"]) == (role, durability)]
        for durability in _DURABILITIES
        for role in _ROLES
    }
    return {key: kills for key, kills in found.items() if kills}


def spread(values: Sequence[float]) -> str:
    """`mean (min to max)`, or the single value if all are equal."""
    low, mean, high = min(values), statistics.fmean(values), max(values)
    if low == high:
        return f"{low:.3g}"
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table: a row for each role and durability."""
    lines = [
        [
            f"{_NAMES[role]}{', as peers do it' if (role, durability) == PEERS else ''}",
            f"`{durability}`",
            len(kills),
            *(spread([kill[name] for kill in kills]) for name in _COLUMNS),
        ]
        for (role, durability), kills in grouped(rows).items()
    ]
    return table(["killed", "durability", "kills", *_COLUMNS.values()], lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the means, with the range: each role with `process_crash`, and the restart as peers do it."""
    bars = {key: kills for key, kills in grouped(rows).items() if key[1] == "process_crash" or key == PEERS}
    labels = [
        "all processes, resumed as\npeers do: from a checkpoint" if key == PEERS else _NAMES[key[0]]
        for key in bars
    ]
    figure, panels = pyplot().subplots(1, len(_PANELS), figsize=(10, 3.2), dpi=140, sharey=True)
    for axes, (column, title) in zip(panels, _PANELS.items(), strict=True):
        for place, (key, kills) in enumerate(bars.items()):
            values = [kill[column] for kill in kills]
            mean = statistics.fmean(values)
            axes.barh(
                place,
                mean,
                xerr=[[mean - min(values)], [max(values) - mean]],
                color="tab:red" if key == PEERS else "tab:blue",
                height=0.6,
                error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
            )
            axes.annotate(
                f"{mean:.1f}",
                (max(values), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.2 * max(1.0, *(kill[column] for kills in bars.values() for kill in kills)))
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(bars)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle("What one kill -9 costs: mean, and range over the kills", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)
