"""Makes the staleness benchmark's table and figure from the cells that have results.

Each method has two scores, at the better and at the worse of the learning rates; each is a mean over seeds.
The learning rate has as large an effect as the method, so the report must show if a method works at only one
of the rates.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

from benchmarks.report import table
from benchmarks.staleness_cell import Cell, CellResult

matplotlib.use("Agg")
from matplotlib import pyplot

Setting = tuple[str, int]
"""(mode, lag)"""
Scores = dict[tuple[str, Setting], tuple[float, float]]
"""(method, setting) -> mean reward over seeds at the best and at the worst learning rate."""


def scores(done: Iterable[tuple[Cell, CellResult]]) -> Scores:
    """The best and the worst mean over seeds among the learning rates."""
    by_rate: dict[tuple[str, Setting], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, result in done:
        by_rate[cell.method, (cell.mode, cell.lag)][cell.lr].append(result.reward)
    means = {key: [statistics.fmean(rewards) for rewards in rates.values()] for key, rates in by_rate.items()}
    return {key: (max(values), min(values)) for key, values in means.items()}


def in_order(
    done: Iterable[tuple[Cell, CellResult]], methods: Iterable[str]
) -> tuple[list[str], list[Setting]]:
    """The methods and settings that have results: methods as given, fixed before mixed, short lags first."""
    pairs = list(done)
    have = {cell.method for cell, _ in pairs}
    return [m for m in methods if m in have], sorted({(cell.mode, cell.lag) for cell, _ in pairs})


def as_table(done: list[tuple[Cell, CellResult]], methods: Iterable[str]) -> str:
    """A Markdown table with one row per method, one column per setting, and fields `best / worst`."""
    names, settings = in_order(done, methods)
    found = scores(done)
    fields = [[_field(found.get((name, setting))) for setting in settings] for name in names]
    return table(
        ["method", *(f"{mode} {lag}" for mode, lag in settings)],
        [[n, *f] for n, f in zip(names, fields, strict=True)],
    )


def _field(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}"


def draw(done: list[tuple[Cell, CellResult]], methods: Iterable[str], path: Path) -> None:
    """Plots reward against lag, one line per method: left at the best learning rate, right at the worst."""
    names, settings = in_order(done, methods)
    found = scores(done)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.9), dpi=140, sharey=True)
    colors = pyplot.get_cmap("tab20" if len(names) > 10 else "tab10")
    for rank, (axes, title) in enumerate(zip(panels, ("best", "worst"), strict=True)):
        for number, name in enumerate(names):
            for mode in ("fixed", "mixed"):
                columns = [
                    i for i, setting in enumerate(settings) if setting[0] == mode and (name, setting) in found
                ]
                rewards = [found[name, settings[i]][rank] for i in columns]
                style = {"color": colors(number % colors.N), "label": name if mode == "fixed" else None}
                axes.plot(
                    columns, rewards, marker="os^vDP*X"[number % 8], markersize=5, linewidth=1.3, **style
                )
        axes.set_xticks(
            range(len(settings)),
            [f"{lag}" if mode == "fixed" else f"0..{lag}\n(mixed)" for mode, lag in settings],
        )
        axes.set_xlabel("age of the samples, optimizer steps")
        axes.set_title(f"{title} of the learning rates", fontsize=10)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out reward, last tenth of the run")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
