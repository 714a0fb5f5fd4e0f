"""What `areal-like sft` shows: lines with the loss, and the results at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from areal_like.config import Config
from areal_like.paths import RunPaths
from launch.observation.observer import Observation
from launch.view.formatting import duration, fixed, rate
from launch.view.plain import PlainView
from launch.view.speed import Eta, recent_mean, tokens_per_s_trained

ROWS = (
    ("optimizer steps", "steps", "{:,}"),
    ("loss, first 10% of steps", "loss_first", "{:.4f}"),
    ("loss, last 10% of steps", "loss_last", "{:.4f}"),
    ("held-out loss, before", "eval_loss_before", "{:.4f}"),
    ("held-out loss, after", "eval_loss_after", "{:.4f}"),
    ("tokens read", "tokens_read", "{:,}"),
    ("tokens learned from", "tokens_trained", "{:,}"),
)
"""(label, key of summary.json, format)"""
_COUNTS = (
    ("num_too_long", "left out (too long)"),
    ("num_truncated", "cut at the limit"),
    ("num_without_target", "left out (nothing to learn)"),
)


class SftView(PlainView):
    """Prints time-stamped lines. The number of steps is known when the trainer has read the rows."""

    def __init__(self, config: Config, console: Console) -> None:
        super().__init__(config, console)
        self._facts = RunPaths.of(config).rows

    def _line(self, seen: Observation) -> str:
        num_steps = read_json(self._facts).get("num_steps", 0)
        self._eta.num_steps = num_steps
        return sft_line(seen, num_steps=num_steps, eta=self._eta)


def sft_line(seen: Observation, *, num_steps: int, eta: Eta) -> str:
    """The state of training on one line."""
    row = seen.steps[-1]
    held_out = [step["eval_loss"] for step in seen.steps if "eval_loss" in step]
    parts = [
        f"step {seen.last_step + 1}/{num_steps}",
        f"epoch {row.get('epoch', 0):.2f}",
        f"loss {fixed(recent_mean(seen, 'loss'), digits=4)}",
        f"held-out {held_out[-1]:.4f}" if held_out else "",
        f"lr {row.get('lr', 0):.2e}",
        f"learned {rate(tokens_per_s_trained(seen))} tok/s",
        f"ETA {eta}",
    ]
    return "  ".join(filter(None, parts))


def show_results(config: Config, console: Console) -> None:
    """Prints the results of a run, its files, and how to go on: the last line is `model.path=...`."""
    paths = RunPaths.of(config)
    summary = read_json(paths.summary)
    table = Table(title=config.name, show_header=False, title_justify="left")
    for label, key, form in ROWS:
        if isinstance(summary.get(key), (int, float)):
            table.add_row(label, form.format(summary[key]))
    if isinstance(seconds := summary.get("wall_seconds"), (int, float)):
        table.add_row("wall time", duration(seconds))
    facts = read_json(paths.rows)
    for name, source in (("rows", "rows"), ("held-out rows", "eval_rows")):
        if isinstance(counts := facts.get(source), dict):
            notes = [f"{counts[key]:,} {what}" for key, what in _COUNTS if counts.get(key)]
            table.add_row(name, ", ".join([f"{counts.get('num_rows', 0):,}", *notes]))
    console.print(table)
    files = [path for path in (paths.metrics, paths.checkpoints, paths.logs) if path.exists()]
    names = ["summary.json", "config.yaml", *(path.name + "/" * path.is_dir() for path in files)]
    _print(console, f"{paths.root}: {', '.join(names)}")
    if not summary.get("finished"):
        _print(console, f"stopped before its last step; continue with: {_resume_command(config)}")
    if "model" in summary:
        _print(console, "train it with rewards: areal-like run, with")
        _print(console, f"model.path={summary['model']}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _resume_command(config: Config) -> str:
    runs_dir = "" if config.runs_dir == "runs" else f" runs_dir={config.runs_dir}"
    settings = f"name={config.name} resume=latest{runs_dir}"
    return f'make sft ARGS="{settings}"' if "MAKELEVEL" in os.environ else f"areal-like sft {settings}"


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
