"""Which rows a step has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.config import SftConfig
from areal_like.errors import ConfigError
from trainer.offline.plan import StepPlan


def plan_of(lengths: list[int], *, seed: int = 0, rows: str = "rows", **settings: Any) -> StepPlan:
    return StepPlan.of(SftConfig(**settings), np.array(lengths, dtype=np.int64), seed=seed, rows=rows)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any),
    num_epochs=st.integers(1, 3),
    batch_rows=st.integers(1, 8),
    batch_tokens=st.integers(0, 20),
    num_steps=st.integers(0, 12),
)
def test_epochs_have_every_row_once(
    lengths: list[int], num_epochs: int, batch_rows: int, batch_tokens: int, num_steps: int
) -> None:
    limits = {"num_epochs": num_epochs, "batch_rows": batch_rows, "batch_tokens": batch_tokens}
    whole = plan_of(lengths, **limits)
    steps = [whole.rows(step) for step in range(whole.num_steps)]
    usable = [index for index, length in enumerate(lengths) if length]
    seen = [index for step in steps for index in step]
    for epoch in range(num_epochs):
        of_epoch = seen[epoch * len(usable) : (epoch + 1) * len(usable)]
        assert Counter(of_epoch) == Counter(usable)
    assert len(seen) == num_epochs * len(usable) and whole.epoch(whole.num_steps) == num_epochs
    for at, step in enumerate(steps):
        num_tokens = sum(lengths[index] for index in step)
        assert 0 < len(step) <= batch_rows
        assert not batch_tokens or num_tokens <= batch_tokens or len(step) == 1
        if at + 1 < len(steps):  # and it is as large as it may be
            grown = num_tokens + lengths[steps[at + 1][0]]
            assert len(step) == batch_rows or (batch_tokens and grown > batch_tokens)
    cut = plan_of(lengths, **limits, num_steps=num_steps)
    assert [cut.rows(step) for step in range(cut.num_steps)] == steps[: num_steps or None]
    assert cut.order == whole.order


def test_epochs_and_seeds_have_other_orders() -> None:
    lengths = [3] * 50
    plan = plan_of(lengths, num_epochs=2, batch_rows=50)
    assert plan.rows(0) != plan.rows(1) and plan.rows(0) != list(range(50))
    assert plan_of(lengths, seed=1, batch_rows=50).rows(0) != plan.rows(0)


def test_what_changes_the_order_is_told_apart() -> None:
    first = plan_of([3, 4, 5]).order
    others = [
        plan_of([3, 4, 5], seed=1),
        plan_of([3, 4, 5], rows="others"),
        plan_of([3, 4, 6]),
        plan_of([3, 4, 5], batch_rows=2),
        plan_of([3, 4, 5], batch_tokens=5),
    ]
    assert len({first, *(plan.order for plan in others)}) == 6
    assert plan_of([3, 4, 5], num_epochs=7, num_steps=3).order == first


def test_a_plan_needs_a_row() -> None:
    with pytest.raises(ConfigError, match="no row is left"):
        plan_of([0, 0])
