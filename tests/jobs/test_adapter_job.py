"""A job that pushes its adapter alone: its engines' log-probs, and a resume with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.jobs.test_lora_job import SMALL
from tests.support.launching import TEST_LIMIT_S, areal_like

LORA = ("model.lora.rank=8", "weights.lora=adapter", "weights.integrity=sha256", "weights.update_mode=drain")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_job_pushes_its_adapter_alone(tmp_path: Path, cache: dict[str, str]) -> None:
    """The second run's engines start with the base and get the adapter of step 6 from two ranks."""
    for settings in ((), ("trainer.num_steps=9", "trainer.world_size=2", "resume=latest")):
        small = [word for word in SMALL if not any(word.split("=")[0] in other for other in settings)]
        done = areal_like("run", "name=lora", *small, *LORA, *settings, cwd=tmp_path, environment=cache)
        assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "lora"
    assert audit_run(root).is_clean
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(9))
    checked = [row["weight_check_abs"] for row in rows if row.get("weight_check_abs") is not None]
    assert checked and max(checked) < 1e-4
    assert all((row.get("mismatch_abs") or 0.0) < 1e-4 for row in rows)
    assert all("lora_lost_updates" not in row for row in rows)  # nothing is added up and rounded
    assert rows[-1]["weights_version"] > rows[5]["weights_version"] > 0
