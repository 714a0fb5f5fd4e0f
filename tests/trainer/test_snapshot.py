"""Snapshots of the weights for a push, on one rank and on several."""

from pathlib import Path

import pytest
import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ConfigError
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import run_ranks, write_model


@pytest.mark.parametrize("world_size", [*only_in_chaos(1), 3])
def test_a_snapshot_is_not_changed_by_later_steps(tmp_path: Path, world_size: int) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("snapshots", str(tmp_path), path, world_size=world_size, module="tests.support.snapshot_ranks")


def test_rank_0_may_request_early_or_freed_snapshots(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("late_ranks", str(tmp_path), path, world_size=2, module="tests.support.snapshot_ranks")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_with_one_copy_the_next_snapshot_waits_for_the_push(tmp_path: Path, world_size: int) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("one_copy", str(tmp_path), path, world_size=world_size, module="tests.support.snapshot_ranks")


@pytest.mark.parametrize("world_size", [*only_in_chaos(1), 2])
def test_the_last_push_is_kept_as_a_base(tmp_path: Path, world_size: int) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("bases", str(tmp_path), path, world_size=world_size, module="tests.support.snapshot_ranks")


def test_large_pushes_have_one_copy() -> None:
    assert WeightsConfig().snapshots_on("cuda", num_bytes=16e9) == 2
    assert WeightsConfig().snapshots_on("cuda:3", num_bytes=140e9) == 1
    assert WeightsConfig().snapshots_on("cpu", num_bytes=140e9) == 2
    assert WeightsConfig(update_mode="drain").snapshots_on("cuda", num_bytes=140e9) == 2
    assert WeightsConfig(num_snapshots=1).snapshots_on("cpu", num_bytes=1e6) == 1
    with pytest.raises(ConfigError, match="num_snapshots=3: use auto, 1 or 2"):
        WeightsConfig(num_snapshots=3)
    assert WeightsConfig(num_snapshots=2).snapshots_on("cuda", num_bytes=140e9) == 2
