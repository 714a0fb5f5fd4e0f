"""metrics.jsonl and summary.json: totals over all rows of the file, and rates after a resume."""

from __future__ import annotations

import contextlib
import json
import math
import random
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.config import EvalSetConfig, from_mapping
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.metrics import Metrics
from areal_like.wire.messages.consumer import RunCounters
from areal_like.wire.messages.evaluation import EvalResult, SampleOutcome
from launch.view.summary import summary_table
from trainer.metrics.run_files import (
    WARM_UP_STEPS,
    EvaluationsFile,
    MetricsFile,
    described,
    evaluation_row,
    write_summary,
)
from trainer.run_record import RunRecord


def row(step: int) -> dict[str, Any]:
    """A row with random figures; every seventh row has no reward."""
    rng = random.Random(step)
    return {
        "step": step,
        "reward_mean": math.nan if step % 7 == 2 else rng.random(),
        "loss": rng.gauss(0, 1),
        "step_s": 0.1 + rng.random(),
        "wait_data_s": 0.1 * rng.random(),
        "tokens_trained": rng.randrange(1000),
        "grad_norm": 0.0 if step % 5 == 3 else rng.random(),
    }


def mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


@pytest.mark.parametrize("num_rows", [0, 1, 3, 9, 10, 11, 57, 230])
def test_totals_are_over_all_rows_also_after_a_resume(tmp_path: Path, num_rows: int) -> None:
    path = tmp_path / "metrics.jsonl"
    resumed_at = num_rows // 3
    file = MetricsFile(path, start_step=0)
    for step in range(resumed_at + 2):  # two more steps than the checkpoint
        file.append(row(step))
    file.close()
    path.write_text(path.read_text() + '{"step": ')  # a crash
    file = MetricsFile(path, start_step=resumed_at)
    assert file.last.get("step", -1) == resumed_at - 1
    for step in range(resumed_at, num_rows):
        file.append(row(step))
    totals = file.totals()
    file.append(row(num_rows))  # reading the file must not move the place where rows are appended
    file.close()

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(num_rows + 1))
    rows = [row(step) for step in range(num_rows)]
    tenth = max(1, num_rows // 10)
    assert totals.num_steps == num_rows and totals.tokens_trained == sum(
        row["tokens_trained"] for row in rows
    )
    assert totals.reward_first == pytest.approx(mean([row["reward_mean"] for row in rows[:tenth]]))
    assert totals.reward_last == pytest.approx(mean([row["reward_mean"] for row in rows[-tenth:]]))
    assert totals.loss_last == pytest.approx(mean([row["loss"] for row in rows[-tenth:]]))
    assert totals.num_steps_without_gradient == len(range(3, num_rows, 5))
    steady = rows[WARM_UP_STEPS:]
    idle = (
        sum(row["wait_data_s"] for row in steady) / sum(row["step_s"] for row in steady) if steady else None
    )
    assert totals.trainer_idle_fraction == (None if idle is None else pytest.approx(idle, abs=1e-4))


def test_rows_are_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step) | {"reward_mean": 0.5}) + "\n" for step in range(10_000)))
    tracemalloc.start()
    file = MetricsFile(path, start_step=10_000)
    for step in range(10_000, 12_000):
        file.append(row(step))
    assert file.totals().num_steps == 12_000
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    file.close()
    assert most_bytes < path.stat().st_size / 4, "all rows are kept in memory"


def counters(*, tokens_generated: float, busy_s: float, idle_s: float) -> RunCounters:
    """The buffer's counters at one moment."""
    figures = {
        "tokens_generated": tokens_generated,
        "tokens_trained": tokens_generated / 2,
        "max_trained_lag": 1.0,
        "mean_trained_lag": 0.5,
        "generation_busy_s": busy_s,
        "generation_idle_s": idle_s,
    }
    return RunCounters(tickets={"trained": 400}, drops={}, counters=figures)


def test_rates_after_a_resume_cover_one_time_span(tmp_path: Path) -> None:
    """40 steps of 1 s, a resume, then 20 more steps of 1 s, always at 6,000 tokens per second."""
    metrics = tmp_path / "metrics.jsonl"
    first = MetricsFile(metrics, start_step=0)
    for step in range(40):
        first.append(row(step))
    first.close()
    resumed = MetricsFile(metrics, start_step=40)
    for step in range(40, 60):
        resumed.append(row(step))
    at_end = counters(tokens_generated=360_000.0, busy_s=18.0, idle_s=2.0)
    path = tmp_path / "summary.json"
    write_summary(
        path,
        totals=resumed.totals(),
        counters_at_start=counters(tokens_generated=240_000.0, busy_s=0.0, idle_s=0.0),
        counters_after_warm_up=None,
        counters_at_close=at_end,
        counters_at_end=at_end,
        counted_seconds=20.0,
        eval_before=None,
        eval_after=None,
        evaluations={},
        weights_version=60,
        finished=True,
        was_restarted=True,
        resumed_from_step=40,
        wall_seconds=25.0,
        training_seconds=20.0,
        max_new_tokens=10,
    )
    resumed.close()

    summary = json.loads(path.read_text())
    assert summary["tokens_per_s_generated"] == 6000.0
    assert (summary["steps"], summary["resumed_from_step"]) == (60, 40)
    assert (summary["tokens_generated"], summary["tokens_trained"]) == (360_000, 180_000)
    assert (summary["wall_seconds"], summary["generation_idle_fraction"]) == (25.0, 0.1)
    assert (resumed.num_kept, resumed.num_dropped) == (40, 0)
    labels = list(summary_table(summary, title="x").columns[0].cells)
    assert labels[-3:] == ["generation idle, since step 40", "wall time, since step 40", "tickets"]
    labels = list(summary_table(summary | {"was_restarted": False}, title="x").columns[0].cells)
    assert labels[-3:] == ["generation idle", "wall time", "tickets"]
    flat = [label for label in labels if label == "steps without a gradient"]
    assert (summary["steps_without_gradient"], len(flat)) == (12, 1)
    labels = list(summary_table(summary | {"steps_without_gradient": 0}, title="x").columns[0].cells)
    assert "steps without a gradient" not in labels


def test_a_finished_summary_is_not_replaced_by_an_idle_trainer(tmp_path: Path) -> None:
    """A trainer that is started again after the last step has trained nothing itself."""
    config = from_mapping({"runs_dir": str(tmp_path), "name": "x"})
    paths = RunPaths.of(config)
    first = MetricsFile(paths.metrics, start_step=0)
    for step in range(3):
        first.append(row(step))
    first.close()
    for summary, stays in (({"finished": True, "steps": 3}, True), ({"finished": True, "steps": 2}, False)):
        write_json(paths.summary, summary)
        record = RunRecord(config, Metrics(), step=3)
        again = counters(tokens_generated=1.0, busy_s=0.0, idle_s=0.0)
        found = record.summarize(
            counters_at_start=again,
            counters_after_warm_up=None,
            counters_at_close=again,
            counters_at_end=again,
            counted_seconds=0.0,
            eval_before=None,
            eval_after=None,
            weights_version=1,
            finished=True,
            resumed_from_step=3,
            wall_seconds=1.0,
            training_seconds=0.0,
        )
        record.close(found, waits=lambda name: contextlib.nullcontext())
        assert (found == summary) == stays == (json.loads(paths.summary.read_text()) == summary)
        assert stays or found["was_restarted"]


def evaluated(step: int, *, rewards: list[float], eval_set: str = "hard") -> dict[str, Any]:
    """The row of two answers to each prompt, the last one of which failed."""
    size = len(rewards)
    result = EvalResult(
        eval_id=step,
        eval_set=eval_set,
        num_samples=2,
        rewards=np.array(rewards),
        tokens=np.full(size, 5, np.int32),
        outcomes=np.array([0] * (size - 1) + [SampleOutcome.FAILED], np.uint8),
        oldest_version=step,
        newest_version=step + 1,
        oldest_step=step,
        newest_step=step,
    )
    return evaluation_row(result, EvalSetConfig(num_samples=2, temperature=1.0), seconds=1.5)


def test_a_row_of_an_evaluation_has_its_statistics() -> None:
    row = evaluated(7, rewards=[1.0, 0.0, 1.0, 0.5, 0.0, 0.0])
    assert (row["step"], row["set"], row["avg"], row["num_failed"]) == (7, "hard", pytest.approx(2.5 / 6), 1)
    assert row["pass_at_k"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3)} and row["is_mixed"]
    assert (row["num_prompts"], row["num_samples"], row["num_tokens"]) == (3, 2, 30)
    assert json.loads(json.dumps(row)) == row
    text = described(row)
    assert "0.4167 [" in text and "over 3 prompts x 2, pass@2 0.6667, 1 samples failed" in text
    assert "versions 7 to 8" in text


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (5, [0]), (10, [0, 10]), (30, [0, 10, 20])])
def test_a_resume_drops_later_evaluations(tmp_path: Path, start_step: int, kept: list[int]) -> None:
    path = tmp_path / "evaluations.jsonl"
    file = EvaluationsFile(path, start_step=0)
    for step in (0, 10, 20):
        file.append(evaluated(step, rewards=[step / 20, 0.0]))
    file.close()
    again = EvaluationsFile(path, start_step=start_step)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
    assert again.sets_of(20) == ({"hard"} if 20 in kept else set())
    again.append(evaluated(40, rewards=[1.0, 0.0]))
    ends = again.summary()["hard"]
    assert (ends["before"]["step"], ends["after"]["step"]) == ((kept or [40])[0], 40)
    again.close()


def test_a_late_evaluation_is_not_the_last(tmp_path: Path) -> None:
    with closing(EvaluationsFile(tmp_path / "evaluations.jsonl", start_step=0)) as file:
        for step in (0, 20, 10):  # that after step 10 ends after that of the last weights
            file.append(evaluated(step, rewards=[step / 20, 0.0]))
        ends = file.summary()["hard"]
        assert (ends["before"]["step"], ends["after"]["step"]) == (0, 20)
        assert file.sets_of(20) == {"hard"}
