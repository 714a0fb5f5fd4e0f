"""The largest learning rate that each method tolerated at each age in the staleness grid.

    python -m benchmarks.staleness --report      writes trainer/step/staleness_bounds.json from all results

A rate is tolerated if the mean reward over the seeds is at least HOLDS of the method's best on-policy reward,
and all smaller rates that were tried are tolerated, too. Only rates that were tried with the full number of
seeds count. The trainer compares a job with this table when it starts.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from benchmarks.staleness_cell import Cell, CellResult

TABLE = ROOT / "trainer" / "step" / "staleness_bounds.json"
HOLDS = 0.8
"""Share of the best on-policy reward that a tolerated rate keeps."""


def bounds(done: Iterable[tuple[Cell, CellResult]]) -> dict[str, Any]:
    """The table; methods without on-policy results, or with their own advantage, are left out."""
    rewards: dict[str, dict[tuple[str, int], dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    objectives: dict[str, dict[str, Any]] = {}
    for cell, result in done:
        # A periodic plan for "fixed" ages has some that are twice as large.
        if cell.advantage:
            continue
        if not cell.periodic or cell.mode == "mixed" or cell.lag == 0:
            objectives[cell.method] = cell.objective
            rewards[cell.method][cell.mode, cell.lag][cell.lr].append(result.reward)
    methods = []
    for method, settings in rewards.items():
        at = {setting: _means(rates) for setting, rates in sorted(settings.items())}
        on_policy = at.pop(("fixed", 0), {})
        if not on_policy or not at:
            continue
        best = max(on_policy.values())
        rows = [_row(mode, lag, rates, best=best) for (mode, lag), rates in at.items()]
        methods.append(
            {"method": method, "objective": objectives[method], "best": round(best, 3), "rows": rows}
        )
    return {"holds": HOLDS, "methods": sorted(methods, key=lambda each: str(each["method"]))}


def write_bounds(done: Iterable[tuple[Cell, CellResult]], path: Path = TABLE) -> None:
    """Writes the table, each row on one line."""
    text = json.dumps(bounds(done), indent=1)
    path.write_text(re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n")


def _means(rates: dict[float, list[float]]) -> dict[float, float]:
    """Rate -> mean reward, ascending; rates with fewer seeds than another are left out."""
    most = max(map(len, rates.values()))
    return {lr: statistics.fmean(seeds) for lr, seeds in sorted(rates.items()) if len(seeds) == most}


def _row(mode: str, lag: int, rates: dict[float, float], *, best: float) -> dict[str, Any]:
    """`lr`: the largest tolerated rate, 0 for none; `failed_lr`: the smallest failed rate, 0 for none."""
    tolerated, failed = 0.0, 0.0
    for lr, reward in rates.items():
        if reward < HOLDS * best:
            failed = lr
            break
        tolerated = lr
    return {
        "mode": mode,
        "lag": lag,
        "lr": tolerated,
        "failed_lr": failed,
        "failed_reward": round(rates[failed], 3) if failed else 0.0,
    }
