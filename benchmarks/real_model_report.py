"""Results of the real model's stages: scores with intervals, the curve, times, lags, and log-probs compared.

Each held-out score is greedy over distinct questions, with Wilson's 95 % interval; `all` pools the
sets, which have the same number of questions each.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from areal_like.evaluation.statistics import wilson_interval
from benchmarks.report import pyplot, table

ALL = "all"
KEPT = (
    "steps", "wall_seconds", "training_seconds", "tokens_generated", "tokens_trained", "max_trained_lag",
    "mean_trained_lag", "generation_idle_fraction", "trainer_idle_fraction", "drops", "tickets",
)  # fmt: skip
"""Keys of the job's summary that are copied to the result."""
STAGES = {"base": "as it comes", "sft": "after the supervised start", "rl": "after reinforcement learning"}

Scores = dict[str, dict[str, float]]
"""Set -> score, low, high, num_prompts."""


def collect(work: Path, rows: Path) -> dict[str, Any]:
    """The results of the runs in `work`, trained on the files in `rows`."""
    by_step = scores_by_step(work / "rl")
    first, last = min(by_step), max(by_step)
    metrics = read_rows(work / "rl" / "metrics.jsonl")
    result: dict[str, Any] = {
        "num_rows": {file.name: len(file.read_text().splitlines()) for file in sorted(rows.glob("*.jsonl"))},
        "scores": {
            "base": scores_by_step(work / "base").popitem()[1],
            "sft": by_step[first],
            "rl": by_step[last],
        },
        "curve": {str(step): by_step[step] for step in sorted(by_step)},
        "sft": json.loads((work / "sft" / "summary.json").read_text()),
        "rl": {
            **{key: value for key, value in summary_of(work / "rl").items() if key in KEPT},
            **agreement(metrics),
            "step_seconds_median": statistics.median(row["step_s"] for row in metrics),
            "step_seconds_p90": sorted(row["step_s"] for row in metrics)[len(metrics) * 9 // 10],
            "rewards": [round(row["reward_mean"], 4) for row in metrics],
            "seconds": [round(row["time_unix_s"] - metrics[0]["time_unix_s"], 1) for row in metrics],
            "ess_ratio_mean": statistics.mean(row["ess_ratio"] for row in metrics),
        },
    }
    if (work / "sglang" / "summary.json").exists():
        metrics = read_rows(work / "sglang" / "metrics.jsonl")
        summary = summary_of(work / "sglang")
        result["sglang"] = {
            **{key: value for key, value in summary.items() if key in KEPT},
            **agreement(metrics),
            "step_seconds_median": statistics.median(row["step_s"] for row in metrics),
            "weights_version": summary["weights_version"],
        }
    return result


def agreement(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean |engine log-prob - trainer log-prob| in the steps whose tokens were sampled with their own
    weights."""
    means = [row["mismatch_abs"] for row in metrics if "mismatch_abs" in row]
    checks = [row["weight_check_abs"] for row in metrics if "weight_check_abs" in row]
    return {
        "mismatch_steps": len(means),
        "mismatch_mean": statistics.mean(means) if means else None,
        "mismatch_max": max(means, default=None),
        "weight_check_max": max(checks, default=None),
    }


def scores_by_step(run: Path) -> dict[int, Scores]:
    """Step -> the pooled scores of its evaluation; only steps whose sets are complete."""
    by_step: dict[int, Scores] = {}
    for row in read_rows(run / "evaluations.jsonl"):
        low, high = row["ci_low"], row["ci_high"]
        score = {"score": row["avg"], "low": low, "high": high, "num_prompts": row["num_prompts"]}
        by_step.setdefault(row["step"], {})[row["set"]] = score
    num_sets = max(len(scores) for scores in by_step.values())
    complete = {step: scores for step, scores in by_step.items() if len(scores) == num_sets}
    return {step: {**scores, ALL: pooled(scores)} for step, scores in complete.items()}


def pooled(scores: Scores) -> dict[str, float]:
    """The share of correct answers over the questions of all sets."""
    total = sum(one["num_prompts"] for one in scores.values())
    share = sum(one["score"] * one["num_prompts"] for one in scores.values()) / total
    low, high = wilson_interval(share, int(total))
    return {"score": share, "low": low, "high": high, "num_prompts": total}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    """The summary of a run."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def tables(result: dict[str, Any]) -> str:
    """Scores by data set and stage; the curve; one row for each run."""
    sets = list(result["scores"]["rl"])
    scores = [[name, *(cell(result["scores"][stage][name]) for stage in STAGES)] for name in sets]
    curve = [[step, *(f"{at[name]['score']:.3f}" for name in sets)] for step, at in result["curve"].items()]
    runs = []
    for name in ("rl", "sglang"):
        if run := result.get(name):
            runs.append(
                [
                    {"rl": "embedded", "sglang": "SGLang, float32"}[name],
                    run["steps"],
                    f"{run['wall_seconds'] / 60:.1f}",
                    f"{run['step_seconds_median']:.1f}",
                    f"{run['tokens_trained']:,}",
                    f"{run['mean_trained_lag']:.2f} / {run['max_trained_lag']}",
                    idle(run["trainer_idle_fraction"]),
                    idle(run["generation_idle_fraction"]),
                    difference(run["mismatch_mean"]),
                    difference(run["mismatch_max"]),
                    difference(run["weight_check_max"]),
                ]
            )
    header = [
        "engine", "steps", "minutes", "s a step", "sampled tokens trained", "lag mean / max", "trainer idle",
        "generation idle", "mismatch, mean", "mismatch, worst step", "worst check of a push",
    ]  # fmt: skip
    return "\n\n".join(
        [table(["held-out", *STAGES.values()], scores), table(["step", *sets], curve), table(header, runs)]
    )


def cell(score: dict[str, float]) -> str:
    """`0.31 (0.28 to 0.35)`."""
    return f"{score['score']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def idle(fraction: float | None) -> str:
    """A share of time; `-` if it was not measured."""
    return "-" if fraction is None else f"{fraction:.2f}"


def difference(value: float | None) -> str:
    """A difference of log-probs in nats; `-` if there was nothing to compare."""
    return "-" if value is None else f"{value:.1e}"


def draw(result: dict[str, Any], path: Path, *, window: int = 10) -> None:
    """Held-out scores with intervals, and the training reward as a moving average, over the steps."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6), dpi=140)
    steps = [int(step) for step in result["curve"]]
    for name in result["scores"]["rl"]:
        at = [result["curve"][str(step)][name] for step in steps]
        wide = {"linewidth": 2.2, "color": "black"} if name == ALL else {"linewidth": 1.2}
        (line,) = left.plot(steps, [one["score"] for one in at], marker="o", markersize=3, label=name, **wide)
        low, high = [one["low"] for one in at], [one["high"] for one in at]
        left.fill_between(steps, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    left.set_ylabel("held-out, greedy, 95 % interval")
    left.legend(frameon=False, fontsize=7)
    rewards = result["rl"]["rewards"]
    parts = [rewards[max(0, at - window + 1) : at + 1] for at in range(len(rewards))]
    right.plot(rewards, color="tab:gray", linewidth=0.6, alpha=0.6)
    right.plot([sum(part) / len(part) for part in parts], color="black", linewidth=1.6)
    right.set_ylabel(f"reward of training samples (mean of {window} steps)")
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
