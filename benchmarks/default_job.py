"""Runs the default job with several seeds: held-out greedy score before and after, and the reward curves.

    python -m benchmarks.default_job [--seeds 0 1 2] [key=value ...]

Writes benchmarks/results/default_job.json and docs/default_job.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, pyplot, run_job, table, write

KEPT = (
    "steps", "eval_before", "eval_after", "reward_first", "reward_last", "training_seconds", "wall_seconds",
    "max_trained_lag", "mean_trained_lag", "tickets", "drops", "generation_idle_fraction",
    "trainer_idle_fraction",
)  # fmt: skip
"""Keys of the job's summary that are copied to the result."""


def main() -> None:
    """Runs the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            summary, rows = run_job(
                f"seed-{seed}", [f"seed={seed}", *args.overrides], runs_dir=Path(scratch), timeout_s=900
            )
            start_s = rows[0]["time_unix_s"]
            curve = [(round(row["time_unix_s"] - start_s, 2), row["reward_mean"]) for row in rows]
            evals = [(row["step"], row["eval_reward"]) for row in rows if "eval_reward" in row]
            runs.append({"seed": seed, **{key: summary[key] for key in KEPT}, "curve": curve, "evals": evals})
            print(f"seed {seed}: {summary['eval_before']:.3f} -> {summary['eval_after']:.3f}", flush=True)
    write("default_job", {"overrides": args.overrides, "runs": runs})
    draw(runs, ROOT / "docs" / "default_job.png")
    print(
        table(
            [
                "seed",
                "held-out before",
                "held-out after",
                "steps",
                "training s",
                "max lag",
                "mean lag",
                "stale drops / issued",
            ],
            [
                [
                    run["seed"],
                    f"{run['eval_before']:.2f}",
                    f"{run['eval_after']:.2f}",
                    run["steps"],
                    f"{run['training_seconds']:.0f}",
                    run["max_trained_lag"],
                    f"{run['mean_trained_lag']:.2f}",
                    f"{run['drops']['stale']} / {run['tickets']['issued']}",
                ]
                for run in runs
            ],
        )
    )


def draw(runs: list[dict[str, Any]], path: Path, *, window: int = 15) -> None:
    """Plots the moving average of the training samples' reward over `window` steps against seconds."""
    figure, axes = pyplot().subplots(figsize=(7, 3.6), dpi=140)
    for run in runs:
        seconds, rewards = zip(*run["curve"], strict=True)
        smooth = [
            sum(rewards[max(0, i - window + 1) : i + 1]) / len(rewards[max(0, i - window + 1) : i + 1])
            for i in range(len(rewards))
        ]
        label = f"seed {run['seed']}: held-out greedy {run['eval_before']:.2f} → {run['eval_after']:.2f}"
        axes.plot(seconds, smooth, linewidth=1.4, label=label)
    axes.set_xlabel("seconds of training on two cores")
    axes.set_ylabel("mean reward of training samples")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
