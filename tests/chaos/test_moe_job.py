"""A whole job on a mixture-of-experts model: two ranks, two embedded engines, pushes and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.moe_model import run_moe_job

pytestmark = pytest.mark.chaos


def test_a_job_on_the_embedded_engine(tmp_path: Path) -> None:
    run_moe_job(tmp_path, "trainer.world_size=2", "rollout.num_servers=2", num_steps=12)
