"""The result files of a run, all written by trainer rank 0.

    metrics.jsonl       one JSON object for each optimizer step
    evaluations.jsonl   one for each evaluation of each set
    summary.json        totals of the run

It does not import torch: a model is also evaluated without a trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from areal_like.config import EvalSetConfig
from areal_like.evaluation.statistics import EvalStatistics
from areal_like.paths import write_json
from areal_like.selection import selection_report
from areal_like.spans.recorder import unix_now
from areal_like.wire.messages.consumer import RunCounters
from areal_like.wire.messages.evaluation import EvalResult, SampleOutcome
from trainer.metrics.entropy_watch import EntropyWatch

WARM_UP_STEPS = 10
"""Number of first steps that the idle fractions leave out: the pipeline is still filling."""

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
    share = 1 - metrics.get("masked_share", 0.0) - metrics.get("unrouted_share", 0.0)
    num_tokens = round(metrics["response_tokens"] * metrics["num_sequences"] * share)
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
    """Mean reward over the first tenth of the steps."""
    reward_last: float | None
    """Mean reward over the last tenth."""
    loss_last: float | None
    """Mean loss over the last tenth."""
    num_steps_without_gradient: int
    """Steps whose gradient was zero, as where all rewards of each group are equal, or not finite."""
    tokens_trained: int
    trainer_idle_fraction: float | None
    """Share of the steps' time in which the trainer waited for data, without the warm-up."""


class RowsFile:
    """Appends rows to a file of JSON lines; on a resume drops the rows of steps that will be repeated.

    Rows are not kept in memory, as there may be millions.
    """

    def __init__(self, path: Path, *, keeps: Callable[[dict[str, Any]], bool]) -> None:
        """`keeps`: tells whether an existing row stays in the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_rows = 0
        self.num_dropped = 0
        """Number of rows of steps that will be repeated."""
        partial = path.with_suffix(".partial")
        with partial.open("w") as kept:
            for row in read_rows(path):
                if keeps(row):
                    self._write(row, kept)
                else:
                    self.num_dropped += 1
        partial.replace(path)
        self.num_kept = self.num_rows
        """Number of rows of steps that earlier trainers completed."""
        self._file = path.open("a+")

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row. Non-finite numbers become null: JSON has no NaN."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._write(row, self._file)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any], file: TextIO) -> None:
        file.write(json.dumps(row) + "\n")
        self.num_rows += 1
        self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        """Called with every row that is kept or appended."""


class MetricsFile(RowsFile):
    """`metrics.jsonl`."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.last: dict[str, Any] = {}
        """The newest row; empty before the first."""
        self.entropy = EntropyWatch()
        super().__init__(path, keeps=lambda row: row["step"] < start_step)

    def totals(self) -> RunTotals:
        """The totals over all rows, read from the file, including those from before a resume."""
        tenth = max(1, self.num_rows // 10)
        reward_first, reward_last, loss_last = _Mean(), _Mean(), _Mean()
        step_s = wait_s = 0.0
        tokens_trained = num_steps_without_gradient = 0
        self._file.seek(0)
        for index, line in enumerate(self._file):
            row = json.loads(line)
            tokens_trained += row["tokens_trained"]
            num_steps_without_gradient += not row.get("grad_norm")
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
            num_steps_without_gradient=num_steps_without_gradient,
            tokens_trained=tokens_trained,
            trainer_idle_fraction=round(wait_s / step_s, 4) if step_s > 0 else None,
        )

    def _note(self, row: dict[str, Any]) -> None:
        self.last = row
        self.entropy.observe(row)


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
    """The rows in the file, without a last line that a crash cut short."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError):
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
    `tokens_per_s_generated` and the idle fraction of generation. They cover the whole run only without
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
        "steps_without_gradient": totals.num_steps_without_gradient,
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


def statistics_of(result: EvalResult, settings: EvalSetConfig) -> EvalStatistics:
    shape = (result.num_prompts, result.num_samples)
    outcomes_PS = result.outcomes.reshape(shape)

    def has(outcome: SampleOutcome) -> Any:
        return (outcomes_PS & int(outcome)) != 0

    return EvalStatistics.of(
        result.rewards.reshape(shape),
        tokens_PS=result.tokens.reshape(shape),
        is_missing_PS=has(SampleOutcome.MISSING),
        has_failed_PS=has(SampleOutcome.FAILED),
        is_truncated_PS=has(SampleOutcome.TRUNCATED),
        ks=[k for k in settings.ks if k <= result.num_samples],
        solved_reward=settings.solved_reward,
    )


def evaluation_row(result: EvalResult, settings: EvalSetConfig, *, seconds: float) -> dict[str, Any]:
    """The row of one evaluation of one set; docs/reference/evaluation.md has the fields.

    `seconds`: from the request to the result, including training in between.
    """
    numbers = statistics_of(result, settings)
    low, high = numbers.interval or (None, None)
    return {
        "step": result.eval_id,
        "set": result.eval_set,
        "time_unix_s": round(unix_now(), 3),
        "avg": _finite(numbers.avg),
        "ci_low": _finite(low),
        "ci_high": _finite(high),
        "pass_at_k": {str(k): share for k, share in numbers.pass_at_k.items()},
        "num_prompts": result.num_prompts,
        "num_samples": result.num_samples,
        "num_failed": numbers.num_failed,
        "truncated_fraction": numbers.truncated_fraction,
        "mean_tokens": numbers.mean_tokens,
        "num_tokens": numbers.num_tokens,
        "oldest_version": result.oldest_version,
        "newest_version": result.newest_version,
        "oldest_step": result.oldest_step,
        "newest_step": result.newest_step,
        "is_mixed": result.oldest_version != result.newest_version,
        "seconds": round(seconds, 3),
    }


def described(row: Mapping[str, Any]) -> str:
    """A summary of a row in one line, for the log."""
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
    avg = "no finite mean" if row["avg"] is None else f"{row['avg']:.4f}{interval}"
    passed = "".join(f", pass@{k} {share:.4f}" for k, share in row["pass_at_k"].items() if k != "1")
    failed = f", {row['num_failed']} samples failed and count 0" if row["num_failed"] else ""
    times = f" x {row['num_samples']}" if row["num_samples"] > 1 else ""
    mixed = (
        f", weights of versions {row['oldest_version']} to {row['newest_version']}" if row["is_mixed"] else ""
    )
    return f"{avg} over {row['num_prompts']} prompts{times}{passed}{failed}{mixed}"


class EvaluationsFile(RowsFile):
    """`evaluations.jsonl`."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        """`start_step`: completed steps. A run at step 0 begins with an evaluation, so no row is kept."""
        self._first: dict[str, dict[str, Any]] = {}
        self.last: dict[str, dict[str, Any]] = {}
        """Set -> its row with the newest weights."""
        super().__init__(path, keeps=lambda row: start_step > 0 and row["step"] <= start_step)

    def sets_of(self, step: int) -> set[str]:
        """The sets whose newest row is for the weights of this step."""
        return {name for name, row in self.last.items() if row["step"] == step}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Set -> the rows of its first and its last weights, `before` and `after`."""
        return {name: {"before": self._first[name], "after": self.last[name]} for name in self.last}

    def _note(self, row: dict[str, Any]) -> None:
        name, step = row["set"], row["step"]
        # An evaluation between steps may end after the one of the last weights.
        if step <= self._first.get(name, row)["step"]:
            self._first[name] = row
        if step >= self.last.get(name, row)["step"]:
            self.last[name] = row


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
