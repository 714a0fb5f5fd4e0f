"""`evaluations.jsonl`: one JSON object for each evaluation of each set, written by trainer rank 0.

Imports no torch: a model is also evaluated without a trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_like.config import EvalSetConfig
from areal_like.evaluation.statistics import EvalStatistics
from areal_like.spans.recorder import unix_now
from areal_like.wire.messages.evaluation import EvalResult, SampleOutcome
from trainer.metrics.run_files import read_rows


def statistics_of(result: EvalResult, settings: EvalSetConfig) -> EvalStatistics:
    """The statistics of a result of the set with these settings."""
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

    `seconds`: from the request to the result, training in between included.
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
    """One line about a row, for the log."""
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
    avg = "no finite mean" if row["avg"] is None else f"{row['avg']:.4f}{interval}"
    passed = "".join(f", pass@{k} {share:.4f}" for k, share in row["pass_at_k"].items() if k != "1")
    failed = f", {row['num_failed']} samples failed and count 0" if row["num_failed"] else ""
    times = f" x {row['num_samples']}" if row["num_samples"] > 1 else ""
    mixed = (
        f", weights of versions {row['oldest_version']} to {row['newest_version']}" if row["is_mixed"] else ""
    )
    return f"{avg} over {row['num_prompts']} prompts{times}{passed}{failed}{mixed}"


class EvaluationsFile:
    """Appends rows; on a resume drops those of steps that will be trained, and evaluated, again."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        """`start_step`: completed steps. A run at step 0 begins with an evaluation, so no row is kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._first: dict[str, dict[str, Any]] = {}
        self.last: dict[str, dict[str, Any]] = {}
        """The row of each set with the newest weights."""
        partial = path.with_suffix(".partial")
        with partial.open("w") as kept:
            for row in read_rows(path):
                if start_step > 0 and row["step"] <= start_step:
                    kept.write(json.dumps(row) + "\n")
                    self._note(row)
        partial.replace(path)
        self._file = path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._note(row)

    def sets_of(self, step: int) -> set[str]:
        """The sets whose newest weights with a row are those of this step."""
        return {name for name, row in self.last.items() if row["step"] == step}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Set -> the rows of its first and its last weights, `before` and `after`."""
        return {name: {"before": self._first[name], "after": self.last[name]} for name in self.last}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _note(self, row: dict[str, Any]) -> None:
        name, step = row["set"], row["step"]
        # An evaluation between steps may end after the one of the last weights.
        if step <= self._first.get(name, row)["step"]:
            self._first[name] = row
        if step >= self.last.get(name, row)["step"]:
            self.last[name] = row


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
