"""Makes the staleness benchmark's table and figure from the cells that have results.

Each method has two scores, means over seeds: at the best of the learning rates, and at one that is common to
all. The learning rate has as large an effect as the method, so the report must show how a method performs at
a rate that was not chosen for it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import pyplot, table
from benchmarks.staleness_cell import Cell, CellResult

COMMON_RATE = 3e-4
"""The learning rate of the right half of the figure; with it, every method learns from fresh samples."""
Setting = tuple[str, int]
"""(mode, lag)"""


@dataclass(frozen=True)
class Score:
    """Rewards of one method, setting and learning rate, one per seed."""

    rewards: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.rewards)


Scores = dict[tuple[str, Setting], tuple[Score, Score | None]]
"""(method, setting) -> at the best learning rate, and at the common one, if it was run."""


def scores(done: Iterable[tuple[Cell, CellResult]]) -> Scores:
    """The scores of every method and setting that has results."""
    by_rate: dict[tuple[str, Setting], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in done:
        by_rate[cell.method, (cell.mode, cell.lag)][cell.lr].append(result.reward)
    found: Scores = {}
    for key, rates in by_rate.items():
        at = {lr: Score(tuple(rewards)) for lr, rewards in rates.items()}
        # With one seed a rate may win by luck: rates with fewer seeds than others do not compete.
        most = max(len(score.rewards) for score in at.values())
        best = max((s for s in at.values() if len(s.rewards) == most), key=lambda score: score.mean)
        found[key] = (best, at.get(COMMON_RATE))
    return found


def in_order(
    done: Iterable[tuple[Cell, CellResult]], methods: Iterable[str]
) -> tuple[list[str], list[Setting]]:
    """The methods and settings that have results: methods as given, fixed before mixed, short lags first."""
    pairs = list(done)
    have = {cell.method for cell, _ in pairs}
    return [m for m in methods if m in have], sorted({(cell.mode, cell.lag) for cell, _ in pairs})


def as_table(done: list[tuple[Cell, CellResult]], methods: Iterable[str]) -> str:
    """A Markdown table: a row per method, a column per setting, fields `best / common (worst seed)`."""
    names, settings = in_order(done, methods)
    found = scores(done)
    fields = [[_field(found.get((name, setting))) for setting in settings] for name in names]
    return table(
        ["method", *(f"{mode} {lag}" for mode, lag in settings)],
        [[n, *f] for n, f in zip(names, fields, strict=True)],
    )


def _field(pair: tuple[Score, Score | None] | None) -> str:
    if pair is None:
        return "–"
    best, common = pair
    return f"{best.mean:.2f} / " + (
        "–" if common is None else f"{common.mean:.2f} ({min(common.rewards):.2f})"
    )


def draw(done: list[tuple[Cell, CellResult]], methods: Iterable[str], path: Path) -> None:
    """Plots reward against lag, one line per method, with the range of the seeds.

    Left at the method's best learning rate, right at the common one.
    """
    names, settings = in_order(done, methods)
    found = scores(done)
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.2), dpi=140, sharey=True)
    palette = pyplot().get_cmap("tab20" if len(names) > 10 else "tab10").colors
    colors = [color for color in palette if len(set(color)) > 1]  # gray is that of no correction
    titles = ("each method at its best learning rate", f"all at the learning rate {COMMON_RATE:g}")
    for rank, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for number, name in enumerate(names):
            for mode in ("fixed", "mixed"):
                points = [
                    (column, pair[rank])
                    for column, setting in enumerate(settings)
                    if setting[0] == mode and (pair := found.get((name, setting))) is not None
                ]
                there = [(column, score) for column, score in points if score is not None]
                if not there:
                    continue
                # Slightly shifted, so that the ranges of the seeds can be distinguished.
                columns = [column + 0.03 * (number - len(names) / 2) for column, _ in there]
                means = [score.mean for _, score in there]
                below = [score.mean - min(score.rewards) for _, score in there]
                above = [max(score.rewards) - score.mean for _, score in there]
                axes.errorbar(
                    columns,
                    means,
                    yerr=(below, above),
                    marker="os^vDP*X"[number % 8],
                    markersize=5,
                    linewidth=2.2 if name == "VCPO" else 1.2,
                    elinewidth=0.7,
                    color="0.6" if name == "none" else colors[number % len(colors)],
                    label=name if mode == "fixed" else None,
                )
        axes.set_xticks(
            range(len(settings)),
            [f"{lag}" if mode == "fixed" else f"0..{lag}\n(mixed)" for mode, lag in settings],
        )
        axes.set_xlabel("age of the samples, optimizer steps")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-0.02, 1)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out reward, last tenth of the run")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot().close(figure)
