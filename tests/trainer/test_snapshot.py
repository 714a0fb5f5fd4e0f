"""Snapshots of the weights for a push, on one rank and on several."""

from pathlib import Path

import pytest
import torch

from tests.support.trainer_helpers import run_ranks, write_model


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_snapshot_is_not_changed_by_later_steps(tmp_path: Path, world_size: int) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("snapshots", str(tmp_path), path, world_size=world_size, module="tests.support.snapshot_ranks")


def test_rank_0_may_request_early_or_freed_snapshots(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    run_ranks("late_ranks", str(tmp_path), path, world_size=2, module="tests.support.snapshot_ranks")
