"""Directories of runs as a report reads them, with rows of any content and any number of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

START_S = 1_700_000_000.0
CONFIG = """
name: {name}
max_staleness: 4
model: {{path: tiny}}
task: {{name: sort}}
objective: {{name: tis}}
trainer: {{num_steps: {num_steps}, lr: 0.5}}
"""


def row(step: int, **columns: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "time_unix_s": START_S + step,
        "reward_mean": 0.5 + 0.4 * math.sin(step / 50),
        "loss": -0.1,
        "entropy": 1.0,
        "ess_ratio": 0.9,
        "lag_mean": 1.5,
        "lag_max": 3,
        "max_staleness": 4,
        "step_s": 0.5,
        "wait_data_s": 0.1,
        "push_s": 0.2,
        "tokens_per_s_trained": 1000.0,
        "finish_reasons": {"stop": 0.75, "length": 0.25},
    } | columns


def write_run(
    root: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    num_steps: int = 100,
    summary: Mapping[str, Any] | None = None,
    evaluations: Iterable[Mapping[str, Any]] = (),
    logs: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> Path:
    """Writes a run's directory without a ledger."""
    (root / "logs").mkdir(parents=True)
    (root / "config.yaml").write_text(CONFIG.format(name=root.name, num_steps=num_steps))
    _write_lines(root / "metrics.jsonl", rows)
    _write_lines(root / "evaluations.jsonl", evaluations)
    for name, entries in (logs or {}).items():
        _write_lines(root / "logs" / f"{name}.log", entries)
    if summary is not None:
        (root / "summary.json").write_text(json.dumps(summary))
    return root


def log_entry(
    message: str, *, level: str = "WARNING", time_s: float = START_S, **fields: Any
) -> dict[str, Any]:
    """A line of a log."""
    return {"time": time_s, "level": level, "logger": "x", "message": message} | fields


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
