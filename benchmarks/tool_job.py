"""Runs the tool job with several seeds, with the calculator and without it: held-out scores and curves.

    python -m benchmarks.tool_job [key=value ...] [--seeds 0 1 2 3 4] [--again]

Each run is kept as benchmarks/results/tool_job/<variant>-<seed>.json, and a run whose file exists is not
repeated (`--again` repeats all). Writes docs/tool_job.png, and prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, pyplot, run_job, table, write

CONFIG = ("--config", "configs/jobs/tools.yaml")
VARIANTS = {
    "calculator": (),
    "none": ("task.use_tool=false", "trainer.lr=1e-4", "model.warm_start_steps=400"),
}
"""Name of the tool -> settings. Without the tool hardly any completion is correct: with the larger learning
rate, the few rewards would make the policy worse."""
KEPT = (
    "steps", "eval_before", "eval_after", "reward_first", "reward_last", "training_seconds", "wall_seconds",
    "max_trained_lag", "mean_trained_lag", "tickets", "drops", "generation_idle_fraction",
    "trainer_idle_fraction",
)  # fmt: skip
"""Keys of the job's summary that are copied to the result."""
CURVES = ("reward_mean", "turns", "tool_calls", "response_length_mean", "lag_max", "truncated_fraction")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def main() -> None:
    """Makes the missing runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs = []
    for variant, settings in VARIANTS.items():
        for seed in args.seeds:
            name = f"tool_job/{variant}-{seed}"
            file = RESULTS / f"{name}.json"
            if args.again or not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write(name, measured(variant, seed, [*settings, *args.overrides]))
            run = json.loads(file.read_text())
            print(f"{variant}, seed {seed}: {run['eval_before']:.3f} -> {run['eval_after']:.3f}", flush=True)
            runs.append(run)
    draw(runs, ROOT / "docs" / "tool_job.png")
    print(outcomes(runs))
    print()
    print(progress([run for run in runs if run["variant"] == "calculator"]))


def measured(variant: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: its summary, and a curve for each of CURVES over the steps."""
    with tempfile.TemporaryDirectory() as scratch:
        summary, rows = run_job(
            f"{variant}-{seed}", [*CONFIG, f"seed={seed}", *overrides], runs_dir=Path(scratch), timeout_s=1800
        )
    start_s = rows[0]["time_unix_s"]
    for row in rows:
        row["tool_calls"] = row.get("sample_metrics", {}).get("tool_calls", 0.0)
    return {
        "variant": variant,
        "seed": seed,
        "overrides": overrides,
        **{key: summary[key] for key in KEPT},
        "steps_per_minute": 60 * (len(rows) - 1) / (rows[-1]["time_unix_s"] - start_s),
        "seconds": [round(row["time_unix_s"] - start_s, 2) for row in rows],
        "curves": {name: [round(row[name], 4) for row in rows] for name in CURVES},
        "evals": [(row["step"], row["eval_reward"]) for row in rows if "eval_reward" in row],
    }


def outcomes(runs: list[dict[str, Any]]) -> str:
    """A row for each run."""
    header = [
        "tool", "seed", "held-out before", "held-out after", "steps", "training s", "whole job s",
        "steps/min", "max lag", "mean lag", "stale drops / issued",
    ]  # fmt: skip
    rows = [
        [
            run["variant"],
            run["seed"],
            f"{run['eval_before']:.2f}",
            f"{run['eval_after']:.2f}",
            run["steps"],
            f"{run['training_seconds']:.0f}",
            f"{run['wall_seconds']:.0f}",
            f"{run['steps_per_minute']:.0f}",
            run["max_trained_lag"],
            f"{run['mean_trained_lag']:.2f}",
            f"{run['drops']['stale']} / {run['tickets']['issued']}",
        ]
        for run in runs
    ]
    return table(header, rows)


def progress(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, for each fifth of the run."""
    header = [
        "fifth of the run",
        "reward",
        "turns a sample",
        "tool calls a sample",
        "sampled tokens a sample",
    ]
    names = ("reward_mean", "turns", "tool_calls", "response_length_mean")
    rows = []
    for fifth in range(5):
        values = []
        for name in names:
            parts = [run["curves"][name] for run in runs]
            slices = [part[len(part) * fifth // 5 : len(part) * (fifth + 1) // 5] for part in parts]
            numbers = [number for part in slices for number in part]
            values.append(f"{sum(numbers) / len(numbers):.2f}")
        rows.append([fifth + 1, *values])
    return table(header, rows)


def draw(runs: list[dict[str, Any]], path: Path, *, window: int = 5) -> None:
    """Plots reward, and turns and tool calls per sample, over the steps, as moving averages over `window`."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6), dpi=140)
    seeds = sorted({run["seed"] for run in runs})
    for run in runs:
        color, has_tool = COLORS[seeds.index(run["seed"]) % len(COLORS)], run["variant"] == "calculator"
        style = {"color": color, "linewidth": 1.4, "linestyle": "-" if has_tool else ":"}
        label = f"seed {run['seed']}, {run['variant']}: {run['eval_before']:.2f} → {run['eval_after']:.2f}"
        left.plot(smooth(run["curves"]["reward_mean"], window), label=label, **style)
        if has_tool:
            right.plot(smooth(run["curves"]["tool_calls"], window), color=color, label=f"seed {run['seed']}")
    left.set_ylabel("mean reward of training samples")
    left.set_ylim(0, 1)
    left.legend(title="tool: held-out greedy", frameon=False, fontsize=7, title_fontsize=7)
    right.set_ylabel("tool calls a sample")
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: list[float], window: int) -> list[float]:
    """The moving average of the last `window` values."""
    parts = [values[max(0, at - window + 1) : at + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


if __name__ == "__main__":
    main()
