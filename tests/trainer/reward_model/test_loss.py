"""The loss of reward models against its formulas, and its measures of accuracy and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_like.chat.token_row import TokenRow
from trainer.batching.packing import PackedBatch, collate
from trainer.offline.rows import training_sample
from trainer.reward_model.loss import BradleyTerryLoss

LEVELS = ((1.0, 0.0), (0.0, 0.0), (-3.0, -1.0, -2.0))
"""A pair with a margin, a tie, and a ranking."""
SCORES = (2.0, 0.5, 1.0, -1.0, 0.3, 0.1, 0.3)


def batch_of(levels: Sequence[Sequence[float]], *, margin: float = 0.0) -> PackedBatch:
    row = TokenRow(tokens=[5, 6], loss_mask=[0, 1])
    return collate(
        [
            training_sample(row, value=level, margin=0.0 if group else margin, group=group)
            for group, row_levels in enumerate(levels)
            for level in row_levels
        ]
    )


def loss_of(scores: Sequence[float], batch: PackedBatch, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """(the loss's gradient by the scores, metrics and details)"""
    score_N = torch.tensor(scores, requires_grad=True)
    model: Any = lambda batch: score_N  # noqa: E731 - a model that has learned these scores
    loss = BradleyTerryLoss(model, **settings)
    total, sums_K = loss(batch)
    total.backward()  # type: ignore[no-untyped-call]
    sums = dict(zip(loss.names, sums_K.tolist(), strict=True))
    assert total.item() == pytest.approx(sums["loss"]) and score_N.grad is not None
    return score_N.grad, loss.metrics(sums) | loss.details(sums)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def test_the_loss_is_that_of_the_formulas() -> None:
    gradient_N, found = loss_of(SCORES, batch_of(LEVELS, margin=0.25))
    parts = [
        -log_sigmoid(1.25),
        -(log_sigmoid(2.0) + log_sigmoid(-2.0)) / 2,
        *(-log_sigmoid(value) for value in (0.1 - 0.3, 0.1 - 0.3, 0.3 - 0.3)),  # of the ranking
    ]
    assert found["loss"] == pytest.approx(sum(parts) / 5) and found["num_pairs"] == 5
    assert found["accuracy"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert found["margin"] == pytest.approx((1.5 - 0.2 - 0.2 + 0.0) / 4)
    assert found["score_mean"] == pytest.approx(sum(SCORES) / 7)
    # A tie draws both scores together, as far as either is from the other.
    assert gradient_N[2] == pytest.approx(1 / (1 + math.exp(-2)) - 0.5)
    assert gradient_N[3] == -gradient_N[2]
    assert gradient_N[0] == pytest.approx(-1 / (1 + math.exp(1.25)))


def test_centering_draws_sums_to_zero() -> None:
    _, plain = loss_of((2.0, 1.0), batch_of([(1, 0)]))
    gradient_N, centered = loss_of((2.0, 1.0), batch_of([(1, 0)]), center_coef=0.01)
    assert centered["loss"] - plain["loss"] == pytest.approx(0.01 * 9)
    assert gradient_N.sum() == pytest.approx(2 * 2 * 0.01 * 3)


def test_calibration_is_that_of_the_bins() -> None:
    """Two pairs of confidence 0.6 (one is wrong), one of 0.9, and a tie that does not count."""
    low, high = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    scores = (low, 0.0, 0.0, low, high, 0.0, 5.0, 0.0)
    _, found = loss_of(scores, batch_of([(1, 0), (1, 0), (1, 0), (0, 0)]))
    bins: Any = found["reliability"]
    assert [(each["num_pairs"], each["accuracy"]) for each in bins] == [(2, 0.5), (1, 1.0)]
    assert [each["confidence"] for each in bins] == pytest.approx([0.6, 0.9])
    assert found["ece"] == pytest.approx((2 * 0.1 + 0.1) / 3)


def test_a_batch_without_pairs_has_no_loss() -> None:
    """As the dummies of a rank that has no work left."""
    gradient_N, found = loss_of((3.0,), batch_of([(0,)]))
    assert gradient_N.tolist() == [0] and found["loss"] == 0 and "accuracy" not in found
