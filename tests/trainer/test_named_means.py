"""Means under names that tasks choose: bounded in number, and in Prometheus as in the row."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from areal_like.runtime.metrics import Metrics
from areal_like.trajectory import FinishReason, Trajectory
from tests.support.trainer_helpers import random_trajectory
from trainer.distributed.ranks import Ranks
from trainer.metrics.named_means import MAX_NAMES, NamedMeans
from trainer.metrics.prometheus import TrainerSeries
from trainer.metrics.step_totals import StepTotals


def sample(reward: float = 0.0, **changes: Any) -> Trajectory:
    return replace(random_trajectory(np.random.default_rng(0), longest=8, reward=reward), **changes)


def row_of(groups: list[list[Trajectory]], ranks: Ranks) -> dict[str, Any]:
    totals = StepTotals()
    for group in groups:
        totals.recorded(group)
    totals.reduce(ranks)
    return totals.metrics()


def test_the_gold_reward_is_a_column(ranks: Ranks) -> None:
    golds = [sample(reward, metrics={"reward_gold": 1 - reward}) for reward in (0.25, 0.75)]
    row = row_of([[*golds, sample(0.5)]], ranks)
    assert row["reward_gold_mean"] == row["sample_metrics"]["reward_gold"] == 0.5
    assert "reward_gold_mean" not in row_of([[sample(0.5)]], ranks)


def test_means_are_over_the_samples_that_have_a_name(ranks: Ranks) -> None:
    group = [
        sample(1.0, metrics={"calls": 3.0}, label="math", generation_s=2.0, reward_s=0.5),
        sample(0.0, metrics={"calls": 1.0, "errors": 1.0}, finish_reason=FinishReason.TOKENS),
        sample(0.5, label="math", finish_reason=FinishReason.TURNS, generation_s=4.0),
        sample(9.0, metrics={"calls": 9.0}, label="math", is_greedy=True),
    ]
    row = row_of([group], ranks)
    assert row["sample_metrics"] == {"calls": 2.0, "errors": 1.0}
    assert row["reward_parts"] == {"half": 0.25}
    length = row["response_tokens"]
    assert row["by_label"] == {
        "math": {
            "num_samples": 2,
            "reward_mean": 0.75,
            "truncated_fraction": 0.5,
            "response_length_mean": length,
            "turns": 1.0,
        }
    }
    assert row["finish_reasons"] == {
        "stop": pytest.approx(1 / 3),
        "length": 0.0,
        "timeout": 0.0,
        "turns": pytest.approx(1 / 3),
        "tokens": pytest.approx(1 / 3),
        "context": 0.0,
    }
    assert row["sample_generation_s"] == 2.0 and row["sample_reward_s"] == pytest.approx(0.5 / 3)
    assert row["truncated_fraction"] == pytest.approx(2 / 3) and row["num_sequences"] == 3


def test_names_are_bounded_in_row_and_series(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    series = TrainerSeries(metrics)
    for step in range(3):
        group = [
            sample(metrics={f"step {step} sample {i:03d}": 1.0, "x" * 65: 1.0}, label=f"{step}/{i}")
            for i in range(100)
        ]
        row = row_of([group], ranks)
        assert len(row["sample_metrics"]) == len(row["by_label"]) == MAX_NAMES
        assert next(iter(row["sample_metrics"])) == f"step {step} sample 000"
        series.stepped(step, row | {"tokens_trained": 1, "freeze_s": 0.0, "wait_data_s": 0.0, "step_s": 1.0})
    text = metrics.exposition().decode()
    assert (
        text.count("areal_trainer_sample_metric{") == text.count("areal_trainer_label_reward{") == MAX_NAMES
    )
    assert text.count("areal_trainer_reward_part{") == 1
    assert 'areal_trainer_finished_fraction{reason="stop"} 1.0' in text
    assert sum("leave out names" in record.message for record in caplog.records) == 3, "once in a step"


def test_sums_beyond_the_range_of_a_float_are_null(ranks: Ranks) -> None:
    row = row_of([[sample(metrics={"huge": 1e308, 'a "quoted"\nname\\': 0.5})] * 3], ranks)
    assert row["sample_metrics"]["huge"] is None
    assert json.loads(json.dumps(row["sample_metrics"], allow_nan=False)) == row["sample_metrics"]
    series = TrainerSeries(metrics := Metrics())
    series.stepped(0, row | {"tokens_trained": 1, "freeze_s": 0.0, "wait_data_s": 0.0, "step_s": 1.0})
    assert r'metric="a \"quoted\"\nname\\"} 0.5' in metrics.exposition().decode()


def test_nothing_named_gives_nothing(ranks: Ranks) -> None:
    means = NamedMeans()
    means.reduce(ranks)
    assert means.metrics() == {}
