"""The last output of `areal-like run`: the run's results, its files, and the command that continues it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from areal_like.config import Config
from areal_like.config.evaluation import DEFAULT_SET
from launch.run_directory.open_run import OpenRun
from launch.run_directory.rundir import checkpoints
from launch.view.formatting import duration, rate

ROWS = (
    ("optimizer steps", "steps", "{:,}"),
    ("reward, first 10% of steps", "reward_first", "{:.3f}"),
    ("reward, last 10% of steps", "reward_last", "{:.3f}"),
    ("held-out greedy reward, before", "eval_before", "{:.3f}"),
    ("held-out greedy reward, after", "eval_after", "{:.3f}"),
    ("tokens generated", "tokens_generated", "{:,}"),
    ("tokens trained", "tokens_trained", "{:,}"),
    ("lag of trained samples, mean", "mean_trained_lag", "{:.2f}"),
    ("lag of trained samples, max", "max_trained_lag", "{}"),
    ("weights version", "weights_version", "{}"),
    ("trainer idle", "trainer_idle_fraction", "{:.1%}"),
)
"""(label, key of summary.json, format) of the whole run."""


def show_summary(run: OpenRun, console: Console, *, since_unix_s: float) -> None:
    """Prints the results of a run. A summary file from before `since_unix_s` is not shown: an earlier process
    wrote it."""
    paths, config = run.paths, run.config
    summary: dict[str, Any] = {}
    if paths.summary.exists() and paths.summary.stat().st_mtime >= since_unix_s:
        summary = json.loads(paths.summary.read_text())
        console.print(summary_table(summary, title=config.name))
    files = [path for path in (paths.metrics, paths.checkpoints, paths.logs) if path.exists()]
    names = (
        ["summary.json"] * bool(summary)
        + ["config.yaml"]
        + [f"{path.name}{'/' if path.is_dir() else ''}" for path in files]
    )
    console.print(f"{paths.root}: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)
    steps = checkpoints(paths)
    num_steps = config.trainer.num_steps
    if steps and steps[-1] < num_steps:
        line = f"stopped after step {steps[-1]} of {num_steps}; continue with: {resume_command(config)}"
        console.print(line, markup=False, soft_wrap=True)


def summary_table(summary: dict[str, Any], *, title: str) -> Table:
    """A table of labels and values; values that the summary lacks are omitted."""
    table = Table(title=title, show_header=False, title_justify="left")
    for label, key, form in ROWS:
        if isinstance(summary.get(key), (int, float)):
            table.add_row(label, form.format(summary[key]))
    # These count from the last start of the trainer, and the rows above from the first one.
    since = f", since step {summary.get('resumed_from_step', 0)}" if summary.get("was_restarted") else ""
    if isinstance(idle := summary.get("generation_idle_fraction"), (int, float)):
        table.add_row(f"generation idle{since}", f"{idle:.1%}")
    if isinstance(seconds := summary.get("wall_seconds"), (int, float)):
        generated = summary.get("tokens_per_s_generated")
        speed = f", {rate(generated)} generated tok/s" if generated is not None else ""
        table.add_row(f"wall time{since}", f"{duration(seconds)}{speed}")
    for label, text in _evaluations(summary.get("evaluations") or {}):
        table.add_row(label, text)
    failures = (summary.get("selection") or {}).get("failures") or {}
    failed = {
        kind: sum(count for count in outcomes.values() if isinstance(count, int))
        for kind, outcomes in failures.items()
    }
    # A kind that is trained with reward 0 does not end the run: here is where a reader sees it.
    for label, numbers, note in (
        ("tickets", summary.get("tickets") or {}, ""),
        ("drops", summary.get("drops") or {}, ""),
        ("failed samples", failed, " (reasons: logs/rollout-*.log)"),
    ):
        counts = {name: count for name, count in numbers.items() if count}
        if counts:
            table.add_row(label, ", ".join(f"{name} {count:,}" for name, count in counts.items()) + note)
    return table


def _evaluations(sets: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, numbers before and after) of each evaluation set, if there are several or one has details."""
    for name, rows in sets.items():
        before, after = rows["before"], rows["after"]
        is_plain = name == DEFAULT_SET and after["num_samples"] == 1
        if len(sets) == 1 and is_plain and not after["num_failed"]:
            return  # the rows of the held-out reward say it
        times = f" x {after['num_samples']}" if after["num_samples"] > 1 else ""
        label = f"evaluation {name} ({after['num_prompts']}{times})"
        passed = [
            f"pass@{k} {before['pass_at_k'].get(k, 0.0):.3f} -> {share:.3f}"
            for k, share in after["pass_at_k"].items()
            if k != "1" or after["num_samples"] > 1
        ]
        notes = [f"{after['truncated_fraction']:.0%} truncated"] if after["truncated_fraction"] else []
        notes += [f"{after['num_failed']} failed"] if after["num_failed"] else []
        yield label, ", ".join([f"{_interval(before)} -> {_interval(after)}", *passed, *notes])


def _interval(row: dict[str, Any]) -> str:
    if row["avg"] is None:
        return "?"
    if row["ci_low"] is None or row["ci_high"] is None:
        return f"{row['avg']:.3f}"
    return f"{row['avg']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def resume_command(config: Config) -> str:
    """The shell command that resumes this run."""
    runs_dir = "" if config.runs_dir == "runs" else f" runs_dir={config.runs_dir}"
    settings = f"name={config.name} resume=latest{runs_dir}"
    return f'make run ARGS="{settings}"' if "MAKELEVEL" in os.environ else f"areal-like run {settings}"
