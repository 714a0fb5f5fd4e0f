"""What a run leaves to be read: `metrics.jsonl`, one object an optimizer step, and `summary.json` at its end. Rank 0 only."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from areal_like.messages.consumer import Books
from areal_like.paths import write_json

WARM_UP_STEPS = 10
"""Steps whose waiting does not count as idleness: the pipeline is filling."""


_RENAMED = {"reward": "reward_mean", "wait_s": "wait_data_s", "response_tokens": "response_length_mean"}


def step_row(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The line of one optimizer step, from what `StepRunner.run` returned."""
    num_tokens = round(metrics["response_tokens"] * metrics["num_sequences"])
    row = {"step": step, "time_unix_s": round(time.time(), 3)} | {_RENAMED.get(name, name): value for name, value in metrics.items()}
    return row | {"tokens_trained": num_tokens, "tokens_per_s_trained": num_tokens / max(1e-9, metrics["step_s"])}


class MetricsFile:
    """Appends step metrics; on resume drops the lines of steps that will be trained again."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in _read(path) if row["step"] < start_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in self.rows))
        partial.replace(path)
        self._file = path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """One optimizer step. Non-finite numbers become null: JSON has no NaN."""
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self.rows.append(row)
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def write_summary(
    path: Path,
    *,
    rows: list[dict[str, Any]],
    books: Books,
    books_after_warm_up: Books | None,
    books_at_end: Books,
    eval_before: float | None,
    eval_after: float | None,
    weights_version: int,
    finished: bool,
    resumed_from_step: int,
    wall_seconds: float,
    training_seconds: float,
) -> dict[str, Any]:
    """Writes and returns the account of a run.

    Rewards and the trainer's idle fraction are over all its steps, seconds and generation's idle fraction since `resumed_from_step`, and
    tickets, tokens and lags, which the buffer counts, over the whole run where its ledger is durable.
    `books_after_warm_up` and `books_at_end` bound the time over which generation counts as idle or busy; `books` are the last ones.
    """
    tenth = max(1, len(rows) // 10)
    summary = {
        "finished": finished,
        "resumed_from_step": resumed_from_step,
        "steps": len(rows),
        "reward_first": mean([row["reward_mean"] for row in rows[:tenth]]),
        "reward_last": mean([row["reward_mean"] for row in rows[-tenth:]]),
        "eval_before": eval_before,
        "eval_after": eval_after,
        "wall_seconds": round(wall_seconds, 3),
        "training_seconds": round(training_seconds, 3),
        "tokens_generated": int(books.counters["tokens_generated"]),
        "tokens_trained": int(books.counters["tokens_trained"]),
        "max_trained_lag": int(books.counters["max_trained_lag"]),
        "mean_trained_lag": books.counters["mean_trained_lag"],
        "weights_version": weights_version,
        "tickets": books.tickets,
        "drops": books.drops,
        "generation_idle_fraction": _generation_idle(books_at_end, books_after_warm_up),
        "trainer_idle_fraction": _trainer_idle(rows),
        "counters": books.counters,
    }
    write_json(path, summary)
    return summary


def _generation_idle(books: Books, earlier: Books | None) -> float | None:
    def difference(name: str) -> float:
        return books.counters.get(name, 0.0) - (earlier.counters.get(name, 0.0) if earlier else 0.0)

    total_s = difference("generation_busy_s") + difference("generation_idle_s")
    return round(difference("generation_idle_s") / total_s, 4) if total_s > 0 else None


def _trainer_idle(rows: list[dict[str, Any]]) -> float | None:
    steady = rows[WARM_UP_STEPS:]
    total_s = sum(row["step_s"] for row in steady)
    return round(sum(row["wait_data_s"] for row in steady) / total_s, 4) if total_s > 0 else None


def mean(values: list[float | None]) -> float | None:
    """Of the known ones; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
