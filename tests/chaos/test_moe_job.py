"""Whole jobs on mixtures of experts and wrapped models: two ranks, two embedded engines, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.moe_model import run_moe_job

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("family", ["", "glm4_moe", "qwen3_5"])
def test_a_job_on_the_embedded_engine(tmp_path: Path, family: str) -> None:
    run_moe_job(tmp_path, "trainer.world_size=2", "rollout.num_servers=2", num_steps=12, family=family)
