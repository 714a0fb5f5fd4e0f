"""The last output of `areal-like run`, `sft` and `eval`: results, files, the command that continues a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from areal_like.config import Config
from areal_like.config.evaluation import DEFAULT_SET
from areal_like.paths import BUILT_MODELS, RunPaths
from areal_like.promise import promise
from launch.formatting import duration, fixed, rate
from launch.offline_verbs import OfflineVerb
from launch.run_directory.open_run import OpenRun
from launch.run_directory.rundir import checkpoints
from launch.run_files import mapping, number, read_object

Rows = Sequence[tuple[str, str, str]]
"""(label, key of summary.json, format)"""
ROWS: Rows = (
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
_DATA_COUNTS = (
    ("num_too_long", "left out (too long)"),
    ("num_truncated", "cut at the limit"),
    ("num_without_target", "left out (nothing to learn)"),
    ("num_pairs", "comparisons"),
    ("num_ties", "of them ties"),
    ("num_labels", "completions with labels"),
)


def show_summary(run: OpenRun, console: Console, *, since_unix_s: float) -> None:
    """Prints the results of a run. A summary file from before `since_unix_s` is not shown: an earlier process
    wrote it."""
    paths, config = run.paths, run.config
    summary: dict[str, Any] = {}
    if paths.summary.exists() and paths.summary.stat().st_mtime >= since_unix_s:
        summary = read_object(paths.summary)
        console.print(summary_table(summary, title=config.name, bound=promise(config)))
    _print(console, _files(paths, has_summary=bool(summary)))
    steps, num_steps = checkpoints(paths), config.trainer.num_steps
    if steps and steps[-1] < num_steps:
        stopped = f"stopped after step {steps[-1]} of {num_steps}"
        _print(console, f"{stopped}; continue with: {resume_command(config, verb='run')}")


def summary_table(summary: dict[str, Any], *, title: str, bound: str = "") -> Table:
    """A table of labels and values; values that the summary lacks are omitted. `bound`: the staleness bound
    in words."""
    table = _table(summary, ROWS, title=title)
    # Such a run looks like any other: it has trained all of its steps, and has learned nothing in these.
    if flat := summary.get("steps_without_gradient"):
        cause = "zero (usual cause: all rewards of each group are equal) or not finite"
        table.add_row("steps without a gradient", f"{flat:,} of {summary.get('steps', 0):,}: {cause}")
    if bound:
        table.add_row("staleness bound", bound)
    # These count from the last start of the trainer, and the rows above from the first one.
    since = f", since step {summary.get('resumed_from_step', 0)}" if summary.get("was_restarted") else ""
    if isinstance(idle := summary.get("generation_idle_fraction"), (int, float)):
        table.add_row(f"generation idle{since}", f"{idle:.1%}")
    if isinstance(seconds := summary.get("wall_seconds"), (int, float)):
        generated = summary.get("tokens_per_s_generated")
        speed = f", {rate(generated)} generated tok/s" if generated is not None else ""
        table.add_row(f"wall time{since}", f"{duration(seconds)}{speed}")
    for label, text in (*_closing(summary), *_evaluations(summary.get("evaluations") or {})):
        table.add_row(label, text)
    failures = (summary.get("selection") or {}).get("failures") or {}
    failed = {
        kind: sum(count for count in outcomes.values() if isinstance(count, int))
        for kind, outcomes in failures.items()
    }
    # Failures that count as reward 0 do not end the run, so the summary shows them.
    for label, numbers, note in (
        ("tickets", summary.get("tickets") or {}, ""),
        ("drops", summary.get("drops") or {}, ""),
        ("failed samples", failed, " (reasons: logs/rollout-*.log)"),
    ):
        counts = {name: count for name, count in numbers.items() if count}
        if counts:
            table.add_row(label, ", ".join(f"{name} {count:,}" for name, count in counts.items()) + note)
    return table


def _closing(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Closed groups (`buffer.overdue=close`), or what waiting for whole groups has cost."""
    closing = mapping(mapping(summary.get("selection")).get("closing"))
    if closing:
        parts = [f"{closing['samples_early']:,} early, {closing['samples_late']:,} late samples"]
        if closing["parts_dropped"]:
            parts.append(f"{closing['parts_dropped']:,} given up")
        yield "closed groups", f"{closing['groups_closed']:,}: {', '.join(parts)}"
        share = closing["tokens_masked_share"] or 0.0
        yield "tokens beyond the bound", f"{share:.1%} of those of trained samples"
    held_back_s = number(mapping(summary.get("counters")).get("held_back_s"))
    if held_back_s and held_back_s >= 1:
        yield "trainer waited for slow samples", f"{duration(held_back_s)}, while others were complete"


def _offline_rows(verb: OfflineVerb) -> Iterator[tuple[str, str, str]]:
    yield "optimizer steps", "steps", "{:,}"
    yield "loss, first 10% of steps", "loss_first", "{:.4f}"
    yield "loss, last 10% of steps", "loss_last", "{:.4f}"
    for name, label, form in verb.measures:
        for when in ("before", "after"):
            yield f"held-out {label}, {when}", f"eval_{name}_{when}", form
    yield "tokens read", "tokens_read", "{:,}"
    yield "tokens learned from", "tokens_trained", "{:,}"


def show_offline_summary(verb: OfflineVerb, config: Config, console: Console) -> None:
    """Prints the results of a run of `areal-like sft` or another such verb, its files, and how to go on; the
    last line has the settings of a run that starts from them: `model.path=PATH`."""
    paths = RunPaths.of(config)
    summary, facts = read_object(paths.summary), read_object(paths.rows)
    table = _table(summary, tuple(_offline_rows(verb)), title=config.name)
    if isinstance(seconds := summary.get("wall_seconds"), (int, float)):
        table.add_row("wall time", duration(seconds))
    for name, source in (("rows", "rows"), ("held-out rows", "eval_rows")):
        if isinstance(counts := facts.get(source), dict):
            notes = [f"{counts[key]:,} {what}" for key, what in _DATA_COUNTS if counts.get(key)]
            table.add_row(name, ", ".join([f"{counts.get('num_rows', 0):,}", *notes]))
    console.print(table)
    _print(console, _files(paths, has_summary=True))
    if not summary.get("finished"):
        command = resume_command(config, verb=verb.verb)
        _print(console, f"stopped before its last step; continue with: {command}")
    if "model" in summary:
        _print(console, verb.use)
        _print(console, _settings_to_start_from(config, str(summary["model"])))


def _settings_to_start_from(config: Config, checkpoint: str) -> str:
    lora = config.model.lora
    if not lora.is_on:
        return f"model.path={checkpoint}"
    is_built = config.model.path in BUILT_MODELS
    words = [
        f"model.path={RunPaths.of(config).built_model if is_built else config.model.path}",
        f"model.lora.rank={lora.rank}",
        f"model.lora.alpha={lora.alpha:g}",
        f"model.lora.path={checkpoint}",
    ]
    if not isinstance(lora.targets, str):
        words.append(f"model.lora.targets=[{','.join(lora.targets)}]")
    return " ".join(words)


def evaluation_table(sets: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """A row for each set of the summary.json of an evaluation."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("set", "prompts", "avg", "pass@k", "tokens", "time", ""):
        table.add_column(name)
    for name, row in sets.items():
        if "avg" not in row:
            table.add_row(name, "", "no result")
            continue
        passed = row["pass_at_k"].items() if row["num_samples"] > 1 else ()
        table.add_row(
            name,
            f"{row['num_prompts']}{_times(row)}",
            _average(row),
            "  ".join(f"{k}: {share:.3f}" for k, share in passed),
            f"{row['mean_tokens']:.1f}",
            duration(row["seconds"]),
            ", ".join(_notes(row)),
        )
    return table


def resume_command(config: Config, *, verb: str) -> str:
    """The shell command that resumes this run. `verb`: `run`, `sft` or another one that trains."""
    runs_dir = "" if config.runs_dir == "runs" else f" runs_dir={config.runs_dir}"
    settings = f"name={config.name} resume=latest{runs_dir}"
    has_target = "MAKELEVEL" in os.environ and verb in ("run", "sft")
    return f'make {verb} ARGS="{settings}"' if has_target else f"areal-like {verb} {settings}"


def _table(summary: Mapping[str, Any], rows: Rows, *, title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for label, key, form in rows:
        if isinstance(summary.get(key), (int, float)):
            table.add_row(label, form.format(summary[key]))
    return table


def _files(paths: RunPaths, *, has_summary: bool) -> str:
    others = [path for path in (paths.metrics, paths.checkpoints, paths.logs) if path.exists()]
    names = ["summary.json"] * has_summary + ["config.yaml", *(p.name + "/" * p.is_dir() for p in others)]
    return f"{paths.root}: {', '.join(names)}"


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _evaluations(sets: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, numbers before and after) of each evaluation set, if there are several or one has details."""
    for name, rows in sets.items():
        before, after = rows["before"], rows["after"]
        is_plain = name == DEFAULT_SET and after["num_samples"] == 1
        if len(sets) == 1 and is_plain and not after["num_failed"]:
            return  # the rows of the held-out reward show it
        passed = [
            f"pass@{k} {before['pass_at_k'].get(k, 0.0):.3f} -> {share:.3f}"
            for k, share in after["pass_at_k"].items()
            if k != "1" or after["num_samples"] > 1
        ]
        label = f"evaluation {name} ({after['num_prompts']}{_times(after)})"
        yield label, ", ".join([f"{_average(before)} -> {_average(after)}", *passed, *_notes(after)])


def _times(row: Mapping[str, Any]) -> str:
    return f" x {row['num_samples']}" if row["num_samples"] > 1 else ""


def _notes(row: Mapping[str, Any]) -> list[str]:
    truncated = [f"{row['truncated_fraction']:.0%} truncated"] if row["truncated_fraction"] else []
    return truncated + ([f"{row['num_failed']} failed"] if row["num_failed"] else [])


def _average(row: Mapping[str, Any]) -> str:
    interval = ""
    if row["ci_low"] is not None and row["ci_high"] is not None:
        interval = f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return fixed(row["avg"], digits=3) + interval
