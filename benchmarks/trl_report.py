"""Figures and the Markdown tables of benchmarks/trl.py.

    python -m benchmarks.trl_report        prints those of benchmarks/results/trl.json, draws docs/trl.png

A reward that a run did not reach counts as the job's limit of seconds. Runs of an earlier release have no
stage and no limit: they count as a comparison, with their own length as the limit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, pyplot, table

WINDOW = 5
REWARDS = (0.7, 0.9)
_TITLES = {"default": "default job:\nanswers up to 10 tokens", "long": "counting:\nanswers up to 128 tokens"}
_COLORS = {"ours": "#3a6ea5", "TRL": "#c8772e"}
PHASES = ("wait_data_s", "compute_s", "reduce_s", "update_s", "freeze_s", "step_s")
"""Metrics of this project's steps that show the trainer's activity; `freeze_s`: copies of the weights."""


def result_of(facts: dict[str, Any], rows: list[dict[str, Any]], *, limit_s: float) -> dict[str, Any]:
    """The figures of one run; steps that ended after the limit do not count."""
    rows = [row for row in rows if row["seconds"] <= limit_s] or rows[:1]
    reached: dict[str, Any] = {}
    for reward in REWARDS:
        reached[str(reward)] = None
        for end in range(WINDOW, len(rows) + 1):
            if statistics.mean(row["reward"] for row in rows[end - WINDOW : end]) >= reward:
                samples = sum(row["samples"] for row in rows[:end])
                reached[str(reward)] = {
                    "seconds": round(rows[end - 1]["seconds"], 2),
                    "samples": round(samples),
                }
                break
    seconds = rows[-1]["seconds"]
    sampled = sum(row["sampled_tokens"] for row in rows)
    tokens = sampled + sum(row["prompt_tokens"] for row in rows)
    result = {
        "steps": len(rows),
        "reached": reached,
        "seconds": round(seconds, 2),
        "seconds_per_step": round(seconds / len(rows), 4),
        "tokens_per_s": round(tokens / seconds),
        "sampled_tokens_per_s": round(sampled / seconds),
        "last_reward": round(statistics.mean(row["reward"] for row in rows[-WINDOW:]), 3),
        "start_s": round(facts["start_s"], 1),
        "peak_mib": round(facts["peak_mib"]),
    }
    if "lag" in rows[0]:
        result["lag"] = round(statistics.mean(row["lag"] for row in rows), 2)
        phases = {key: sum(row["phases_s"][key] for row in rows) for key in PHASES}
        result["phases_ms"] = {key: round(1e3 * total / len(rows), 1) for key, total in phases.items()}
        result["trainer_idle"] = round(phases["wait_data_s"] / seconds, 3)
        result["generation_idle"] = facts["generation_idle"]
    return result | {key: facts[key] for key in ("versions", "arguments") if key in facts}


def seconds_to(run: Mapping[str, Any], reward: float) -> float:
    """Seconds in which a run reached a reward; the limit if it did not."""
    reached = run["reached"][str(reward)]
    return float(reached["seconds"] if reached else run.get("limit_s", run["seconds"]))


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """The comparison, the tuning before it, and the phases of this project's steps."""
    compared = [run for run in runs if run.get("stage", "compare") == "compare"]
    tuned = [run for run in runs if run.get("stage") == "tune"]
    parts = []
    if compared:
        parts.append(table_of(compared))
    if tuned:
        parts.append("Tuning, one run for each setting:\n\n" + tuning_of(tuned))
    if compared:
        parts.append(phases_of(compared))
    return "\n\n".join(parts)


def table_of(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over the seeds, with the smallest and largest."""
    lines = []
    for name in dict.fromkeys(run["job"] for run in runs):
        of_job = {
            side: [r for r in runs if (r["job"], r["side"]) == (name, side)] for side in ("ours", "TRL")
        }
        for side, some in of_job.items():
            methods = dict.fromkeys(f"{r['method']}, {r['lr']:.2g}" for r in some if "method" in r)
            columns = []
            for reward in REWARDS:
                num_missed = sum(r["reached"][str(reward)] is None for r in some)
                missed = f", {num_missed} of {len(some)} never" if num_missed else ""
                columns.append(_spread([seconds_to(r, reward) for r in some]) + missed)
                columns.append(
                    _spread(
                        [r["reached"][str(reward)] and r["reached"][str(reward)]["samples"] for r in some]
                    )
                )
            columns += [
                _spread([r.get(key) for r in some])
                for key in ("greedy", "sampled", "seconds_per_step", "tokens_per_s", "peak_mib")
            ]
            lines.append([name, side, "; ".join(methods) or "–", *columns])
        if all(of_job.values()):
            lines.append([name, "TRL / ours", "", *_ratios(of_job)])
    header = [f"{unit} to {reward}" for reward in REWARDS for unit in ("seconds", "samples")]
    ends = ["greedy at the end", "at temperature 1", "s a step", "tokens/s", "peak MiB"]
    return table(["job", "side", "method, rate", *header, *ends], lines)


def tuning_of(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each setting that was tried: seconds to each reward (>: the run was stopped before), and the
    held-out rewards at the end."""
    lines = [
        [
            *(run["job"], run["side"], run["method"], f"{run['lr']:.2g}"),
            *(
                f"{seconds_to(run, reward):.1f}"
                if run["reached"][str(reward)]
                else f"> {run['stopped_s']:.1f}"
                for reward in REWARDS
            ),
            *(f"{run['greedy']:.3f}", f"{run['sampled']:.3f}"),
        ]
        for run in sorted(runs, key=lambda run: (run["job"], run["side"], run["method"], run["lr"]))
    ]
    header = ["job", "side", "method", "rate", *(f"seconds to {reward}" for reward in REWARDS)]
    return table([*header, "greedy at the end", "at temperature 1"], lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds to the first reward and seconds per step: a bar for the median, a dot for each run."""
    reward = str(REWARDS[0])
    jobs = list(dict.fromkeys(run["job"] for run in runs))
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 2.8), sharey=True)
    for number, job in enumerate(jobs):
        for shift, side in ((-0.2, "ours"), (0.2, "TRL")):
            some = [run for run in runs if (run["job"], run["side"]) == (job, side)]
            place = number + shift
            reached = [run["reached"][reward]["seconds"] for run in some if run["reached"][reward]]
            missed = [seconds_to(run, REWARDS[0]) for run in some if not run["reached"][reward]]
            steps = [run["seconds_per_step"] for run in some]
            for panel, values in zip(panels, (reached + missed, steps), strict=True):
                label = {"ours": "this software", "TRL": "TRL"}[side] if number == 0 else None
                median = statistics.median(values)
                panel.barh(place, median, height=0.36, color=_COLORS[side], label=label)
            panels[0].plot(reached, [place] * len(reached), ".", color="black", markersize=5)
            panels[0].plot(missed, [place] * len(missed), "x", color="black", markersize=6)
            panels[1].plot(steps, [place] * len(steps), ".", color="black", markersize=5)
    panels[0].set_yticks(range(len(jobs)), [_TITLES[job] for job in jobs])
    panels[0].invert_yaxis()
    panels[0].set_title(
        f"seconds to a mean reward of {reward} (x: not reached within the limit)", fontsize=10
    )
    panels[1].set_title("seconds a step", fontsize=10)
    panels[1].legend(frameon=False)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def phases_of(runs: Sequence[dict[str, Any]]) -> str:
    """The phases of a step of this project's trainer, in milliseconds; medians over the seeds."""
    lines = []
    ours = [run for run in runs if run["side"] == "ours"]
    for name in dict.fromkeys(run["job"] for run in ours):
        some = [run for run in ours if run["job"] == name]
        phases = [statistics.median(run["phases_ms"][key] for run in some) for key in PHASES]
        shares = [
            f"{statistics.median(run[key] for run in some):.0%}"
            for key in ("trainer_idle", "generation_idle")
        ]
        lines.append([name, *phases, *shares])
    names = [key.removesuffix("_s") for key in PHASES]
    return table(["job", *names, "trainer idle", "generation idle"], lines)


def _ratios(of_job: dict[str, list[dict[str, Any]]]) -> list[str]:
    def ratio(value: Any) -> str:
        medians = []
        for side in ("TRL", "ours"):
            values = [value(run) for run in of_job[side]]
            if None in values:
                return "–"
            medians.append(statistics.median(values))
        return f"{medians[0] / medians[1]:.2f}" if medians[1] else "–"

    ratios = []
    for reward in REWARDS:
        reached = str(reward)
        ratios.append(ratio(lambda r, reward=reward: seconds_to(r, reward)))
        ratios.append(ratio(lambda r, at=reached: r["reached"][at] and r["reached"][at]["samples"]))
    keys = ("greedy", "sampled", "seconds_per_step", "tokens_per_s", "peak_mib")
    return [*ratios, *(ratio(lambda r, key=key: r.get(key)) for key in keys)]


def _spread(values: Sequence[Any]) -> str:
    if not values or None in values:
        known = sum(value is not None for value in values)
        return f"{known} of {len(values)} runs"
    digits = 3 if max(values) < 10 else 1 if max(values) < 1000 else 0
    low, middle, high = (f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    found = json.loads((RESULTS / "trl.json").read_text())["runs"]
    print(tables(found))
    draw([run for run in found if run.get("stage", "compare") == "compare"], ROOT / "docs" / "trl.png")
