"""What a run leaves to be read: `metrics.jsonl`, one object an optimizer step, and `summary.json` at its end. Rank 0 only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from areal_like.paths import write_json
from areal_like.wire.messages.consumer import RunCounters

WARM_UP_STEPS = 10
"""Steps whose waiting does not count as idleness: the pipeline is filling."""


_RENAMED = {"reward": "reward_mean", "wait_s": "wait_data_s", "response_tokens": "response_length_mean"}


def step_row(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """The line of one optimizer step, from what `StepRunner.run` returned."""
    num_tokens = round(metrics["response_tokens"] * metrics["num_sequences"])
    row = {"step": step, "time_unix_s": round(time.time(), 3)} | {
        _RENAMED.get(name, name): value for name, value in metrics.items()
    }
    return row | {
        "tokens_trained": num_tokens,
        "tokens_per_s_trained": num_tokens / max(1e-9, metrics["step_s"]),
    }


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the rows of a run come to. Means are of the known values; None where there are none."""

    num_steps: int
    reward_first: float | None
    """Over the first tenth of the steps."""
    reward_last: float | None
    """Over the last tenth."""
    loss_last: float | None
    """Over the last tenth."""
    tokens_trained: int
    trainer_idle_fraction: float | None
    """Part of the steps' time, those of the warm-up left out, in which the trainer waited for data."""


class MetricsFile:
    """Appends step metrics; on resume drops the lines of steps that will be trained again.

    The file is the only memory of the rows, which may be millions: what is said of all of them is read from it once, at the end.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_rows = 0
        self.last: dict[str, Any] = {}
        """The newest row; empty before the first."""
        partial = path.with_suffix(".partial")
        with partial.open("w") as kept:
            for row in _earlier_rows(path):
                if row["step"] < start_step:
                    self._write(row, kept)
        partial.replace(path)
        self._file = path.open("a+")

    def append(self, row: dict[str, Any]) -> None:
        """One optimizer step. Non-finite numbers become null: JSON has no NaN."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._write(row, self._file)
        self._file.flush()

    def account(self) -> Account:
        """Of everything that was appended, in this life or before."""
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
        return Account(
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


def _earlier_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an earlier life; a last line that a crash cut short is left out."""
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
    account: Account,
    books: RunCounters,
    books_after_warm_up: RunCounters | None,
    books_at_end: RunCounters,
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
    summary = {
        "finished": finished,
        "resumed_from_step": resumed_from_step,
        "steps": account.num_steps,
        "reward_first": account.reward_first,
        "reward_last": account.reward_last,
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
        "trainer_idle_fraction": account.trainer_idle_fraction,
        "counters": books.counters,
    }
    write_json(path, summary)
    return summary


def _generation_idle(books: RunCounters, earlier: RunCounters | None) -> float | None:
    def difference(name: str) -> float:
        return books.counters.get(name, 0.0) - (earlier.counters.get(name, 0.0) if earlier else 0.0)

    total_s = difference("generation_busy_s") + difference("generation_idle_s")
    return round(difference("generation_idle_s") / total_s, 4) if total_s > 0 else None
