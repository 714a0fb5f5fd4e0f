"""The lag of a step's samples and tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.consumer import Group
from areal_like.wire.records import Record
from trainer.metrics.lag import LagTally


def group_of(*versions: list[int], version_steps: list[int], step: int) -> Group:
    """A group whose samples' tokens have these versions; -1: not sampled."""
    records = [
        Record.of(
            3,
            index,
            Trajectory(
                tokens=np.zeros(len(of_tokens), np.int32),
                loss_mask=(np.array(of_tokens) >= 0).astype(np.uint8),
                logprobs=np.zeros(len(of_tokens), np.float32),
                versions=np.array(of_tokens, np.int32),
                reward=0.0,
                finish_reason=FinishReason.STOP,
            ),
        )
        for index, of_tokens in enumerate(versions)
    ]
    return Group(
        step=step, position=0, ticket_id=3, prompt_index=0, records=records, version_steps=version_steps
    )


def test_lags_are_counted_by_samples_and_by_tokens() -> None:
    tally = LagTally(max_staleness=4)
    # Versions are two ahead of the steps, as after repeated pushes; the newest is ahead of the step itself.
    group = group_of([-1, -1, 7, 8, 12], [-1, 9, -1, 9], version_steps=[5, 7], step=8)
    first_T, second_T = tally.counted(group).lags
    assert first_T.tolist() == [0, 0, 3, 2, 0]
    assert second_T.tolist() == [0, 1, 0, 1]
    assert first_T.dtype == np.int64
    alone = SimpleNamespace(sum=lambda table: table)
    metrics = tally.reduced(alone)  # type: ignore[arg-type]
    assert metrics == {
        "lag_mean": 2.0, "lag_max": 3, "lag_histogram": {"0": 0, "1": 1, "2": 0, "3": 1, "4": 0},
    }  # fmt: skip


@pytest.mark.parametrize("version_step", [3, 9])
def test_a_lag_beyond_the_bound_is_an_error(version_step: int) -> None:
    group = group_of([-1, 7], version_steps=[version_step], step=8)
    with pytest.raises(AssertionError, match="ticket 3 has lag"):
        LagTally(max_staleness=4).counted(group)


def test_the_bound_of_a_whole_group_is_one_of_all_its_tokens() -> None:
    """With `wait` and `drop`; only a group that was recorded with `close` may have older tokens."""
    group = replace(
        group_of([-1, 5, 8], version_steps=[5], step=8), max_staleness=2, versions=[5, 8], steps=[5, 8]
    )
    with pytest.raises(AssertionError, match="ticket 3 has lag 3 in step 8, beyond its bound of 2"):
        LagTally(max_staleness=4).counted(group)
    LagTally(max_staleness=4).counted(replace(group, max_staleness=3))
    tally = LagTally(max_staleness=4)
    tally.counted(replace(group, begin_step=5))
    alone = SimpleNamespace(sum=lambda table: table)
    assert tally.reduced(alone)["lag_max"] == 0  # type: ignore[arg-type]
