"""The table and the figure of benchmarks/crash_cost.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

TITLES = {
    "lost_trajectory_s": "trajectory-seconds lost",
    "trained_again": "samples trained twice",
    "repair_s": "seconds to repair",
}
_NAMES = {
    "server": "rollout server",
    "launcher": "launcher",
    "restart": "all, restart from the checkpoint",
}
_ORDER = ("server", "trainer", "buffer", "launcher", "restart")
Kind = tuple[str, str]


def _by_kind(results: Sequence[dict[str, Any]]) -> dict[Kind, list[dict[str, Any]]]:
    """(durability, role) -> its kills, in the order of the table."""
    found: dict[Kind, list[dict[str, Any]]] = {}
    for row in results:
        found.setdefault((row["durability"], row["role"]), []).append(row)
    durabilities = ("process_crash", "power_loss", "none")
    return dict(
        sorted(found.items(), key=lambda one: (durabilities.index(one[0][0]), _ORDER.index(one[0][1])))
    )


def rows_of(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows: of each kind of kill the mean, and the least and the most in brackets."""
    rows: list[list[object]] = []
    for (durability, role), kills in _by_kind(results).items():
        row: list[object] = [_NAMES.get(role, role), f"`{durability}`", len(kills)]
        for key in TITLES:
            values = [kill[key] for kill in kills]
            row.append(f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        rows.append(row)
    return ["killed", "`buffer.durability`", "kills", *TITLES.values()], rows


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each of the three costs: a bar for each role, with every kill as a dot."""
    kinds = {role: kills for (kind, role), kills in _by_kind(results).items() if kind == "process_crash"}
    if not kinds:
        return
    figure, panels = pyplot.subplots(1, len(TITLES), figsize=(10, 2.6), sharey=True)
    labels = [_NAMES.get(role, role) for role in kinds]
    for panel, (key, title) in zip(panels, TITLES.items(), strict=True):
        for place, (role, kills) in enumerate(kinds.items()):
            values = [kill[key] for kill in kills]
            color = "#b4443c" if role == "restart" else "#3a6ea5"
            panel.barh(place, statistics.fmean(values), color=color, height=0.6)
            panel.plot(values, [place] * len(values), ".", color="black", markersize=3, alpha=0.5)
        panel.set_yticks(range(len(labels)), labels)
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(left=0)
    panels[0].invert_yaxis()
    figure.suptitle(
        "What one kill -9 costs: this software, and a restart from the checkpoint (red)", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
