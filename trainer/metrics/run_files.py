"""The result files of a run: `metrics.jsonl`, one JSON object per optimizer step, and `summary.json`.

Rank 0 only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from areal_like.paths import write_json
from areal_like.selection import selection_report
from areal_like.spans.recorder import unix_now
from areal_like.wire.messages.consumer import RunCounters

WARM_UP_STEPS = 10
"""First steps of a run, left out of the idle fractions: the pipeline is still filling."""

ROW_NAMES = {
    "reward": "reward_mean",
    "wait_s": "wait_data_s",
    "wait_s_min": "wait_data_s_min",
    "wait_s_max": "wait_data_s_max",
    "response_tokens": "response_length_mean",
}
"""Name in the metrics of `StepRunner.run` -> name in metrics.jsonl, where it differs."""


def step_row(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The row of one optimizer step, from the metrics that `StepRunner.run` returned."""
    num_tokens = round(metrics["response_tokens"] * metrics["num_sequences"])
    row = {"step": step, "time_unix_s": round(unix_now(), 3)} | {
        ROW_NAMES.get(name, name): value for name, value in metrics.items()
    }
    return row | {
        "tokens_trained": num_tokens,
        "tokens_per_s_trained": num_tokens / max(1e-9, metrics["step_s"]),
    }


@dataclass(frozen=True, kw_only=True)
class RunTotals:
    """Totals and means over the rows of a run. Unknown values are left out; None if all are unknown."""

    num_steps: int
    reward_first: float | None
    """Over the first tenth of the steps."""
    reward_last: float | None
    """Over the last tenth."""
    loss_last: float | None
    """Over the last tenth."""
    tokens_trained: int
    trainer_idle_fraction: float | None
    """Share of the steps' time in which the trainer waited for data, without the warm-up."""


class MetricsFile:
    """Appends the rows of steps; on a resume drops the rows of steps that will be trained again.

    Rows are not kept in memory, as there may be millions: `totals` reads them from the file at the end.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_rows = 0
        self.num_dropped = 0
        """Rows of steps that will be trained again."""
        self.num_kept = 0
        """Rows of steps that earlier trainers have done."""
        self.last: dict[str, Any] = {}
        """The newest row; empty before the first."""
        partial = path.with_suffix(".partial")
        with partial.open("w") as kept:
            for row in read_rows(path):
                if row["step"] < start_step:
                    self._write(row, kept)
                else:
                    self.num_dropped += 1
        partial.replace(path)
        self.num_kept = self.num_rows
        self._file = path.open("a+")

    def append(self, row: dict[str, Any]) -> None:
        """Appends the row of one optimizer step. Non-finite numbers become null: JSON has no NaN."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._write(row, self._file)
        self._file.flush()

    def totals(self) -> RunTotals:
        """The totals over all rows, including those from before a resume."""
        tenth = max(1, self.num_rows // 10)
        reward_first, reward_last, loss_last = _Mean(), _Mean(), _Mean()
        step_s = wait_s = 0.0
        tokens_trained = 0
        self._file.seek(0)
        for index, line in enumerate(self._file):
            row = json.loads(line)
            tokens_trained += row["tokens_trained"]
            if index < tenth:
                reward_first.add(row["reward_mean"])
            if index >= self.num_rows - tenth:
                reward_last.add(row["reward_mean"])
                loss_last.add(row["loss"])
            if index >= WARM_UP_STEPS:
                step_s, wait_s = step_s + row["step_s"], wait_s + row["wait_data_s"]
        return RunTotals(
            num_steps=self.num_rows,
            reward_first=reward_first.value,
            reward_last=reward_last.value,
            loss_last=loss_last.value,
            tokens_trained=tokens_trained,
            trainer_idle_fraction=round(wait_s / step_s, 4) if step_s > 0 else None,
        )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, row: dict[str, Any], file: TextIO) -> None:
        file.write(json.dumps(row) + "\n")
        self.num_rows, self.last = self.num_rows + 1, row


class _Mean:
    def __init__(self) -> None:
        self._sum, self._num = 0.0, 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum, self._num = self._sum + value, self._num + 1

    @property
    def value(self) -> float | None:
        return self._sum / self._num if self._num else None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that are in the file; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def write_summary(
    path: Path,
    *,
    totals: RunTotals,
    counters_at_start: RunCounters,
    counters_after_warm_up: RunCounters | None,
    counters_at_close: RunCounters,
    counters_at_end: RunCounters,
    counted_seconds: float,
    eval_before: float | None,
    eval_after: float | None,
    evaluations: dict[str, dict[str, Any]],
    weights_version: int,
    finished: bool,
    was_restarted: bool,
    resumed_from_step: int,
    wall_seconds: float,
    training_seconds: float,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Writes and returns the summary of a run.

    Over the whole run: rewards, the trainer's idle fraction, and (if the buffer's ledger is durable) tickets,
    tokens, lags and `selection`. Since the trainer's last start, at `resumed_from_step`: seconds,
    `tokens_per_s_generated` and the idle fraction of generation. They are of the whole run only without
    `was_restarted`. For another rate, divide figures of the same span.

    `counters_at_start`, `counters_at_end`: the buffer's counters `counted_seconds` apart, from which the rate
    is computed. `counters_after_warm_up`, `counters_at_close`: the buffer's counters at the two ends of the
    time over which generation counts as idle or busy. Generation stops soon after the close of admission.
    `max_new_tokens`: `sampling.max_new_tokens`.
    """
    counters = counters_at_end.counters
    summary = {
        "finished": finished,
        "was_restarted": was_restarted,
        "resumed_from_step": resumed_from_step,
        "steps": totals.num_steps,
        "reward_first": totals.reward_first,
        "reward_last": totals.reward_last,
        "eval_before": eval_before,
        "eval_after": eval_after,
        "evaluations": evaluations,
        "wall_seconds": round(wall_seconds, 3),
        "training_seconds": round(training_seconds, 3),
        "tokens_generated": int(counters["tokens_generated"]),
        "tokens_per_s_generated": _rate(
            "tokens_generated", counters_at_start, counters_at_end, counted_seconds
        ),
        "tokens_trained": int(counters["tokens_trained"]),
        "max_trained_lag": int(counters["max_trained_lag"]),
        "mean_trained_lag": counters["mean_trained_lag"],
        "weights_version": weights_version,
        "tickets": counters_at_end.tickets,
        "drops": counters_at_end.drops,
        "generation_idle_fraction": _generation_idle(counters_after_warm_up, counters_at_close),
        "trainer_idle_fraction": totals.trainer_idle_fraction,
        "selection": selection_report(counters, limit=max_new_tokens),
        "counters": counters,
    }
    write_json(path, summary)
    return summary


def finished_summary(path: Path, *, num_steps: int) -> dict[str, Any] | None:
    """The summary of a run that was finished with this number of steps; None if there is none."""
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_of_all = isinstance(summary, dict) and summary.get("finished") and summary.get("steps") == num_steps
    return summary if is_of_all else None


def _rate(name: str, first: RunCounters, last: RunCounters, seconds: float) -> float | None:
    """Increase of a counter per second; None if no time has passed."""
    return round(_increase(name, first, last) / seconds, 1) if seconds > 0 else None


def _generation_idle(first: RunCounters | None, last: RunCounters) -> float | None:
    idle_s = _increase("generation_idle_s", first, last)
    total_s = _increase("generation_busy_s", first, last) + idle_s
    return round(idle_s / total_s, 4) if total_s > 0 else None


def _increase(name: str, first: RunCounters | None, last: RunCounters) -> float:
    return last.counters.get(name, 0.0) - (first.counters.get(name, 0.0) if first else 0.0)
