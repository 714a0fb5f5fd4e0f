"""Fixtures shared by the trainer's tests: one rank, and a small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.support.trainer_helpers import write_model
from trainer.distributed.ranks import Ranks


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """One rank on the CPU, whose process group ends with the test."""
    yield Ranks.alone()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with LayerNorm, in float64."""
    return write_model(tmp_path_factory.mktemp("model"), "gpt2")
