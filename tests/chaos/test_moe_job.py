"""Whole jobs on mixtures of experts and wrapped models: two ranks, two embedded engines, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launching import areal_like
from tests.support.moe_model import run_moe_job

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "qwen3_5"])
def test_a_job_on_the_embedded_engine(tmp_path: Path, family: str) -> None:
    run_moe_job(tmp_path, "trainer.world_size=2", "rollout.num_servers=2", num_steps=12, family=family)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_a_job_with_router_replay_and_its_replay(tmp_path: Path, family: str) -> None:
    """Routes go from the engine through buffer and ledger to the trainer, and to a replay of the run."""
    rows = run_moe_job(
        tmp_path,
        "model.router_replay=true",
        "buffer.retain_trajectories=true",
        "trainer.world_size=2",
        "rollout.num_servers=2",
        num_steps=6,
        family=family,
    )
    for row in rows:
        assert (row["routes_missing"], row["routes_malformed"], row["unrouted_share"]) == (0, 0, 0)
        # Both are float32, and the routers choose clearly.
        assert row["router_disagreement"] < 0.01
    for words in (("audit", "x"), ("replay", "x")):
        done = areal_like(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "equal to the recorded run's, to the last bit" in done.stdout
