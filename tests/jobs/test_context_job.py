"""A job whose trainer has context groups: it is resumed without them, and its replay is that of one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.jobs.test_lora_job import SMALL
from tests.support.launching import TEST_LIMIT_S, areal_like


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_job_with_context_groups(tmp_path: Path, cache: dict[str, str]) -> None:
    """Two data ranks with contexts of two, then a context of two, then one rank."""
    job = [word for word in SMALL if not word.startswith("trainer.num_steps")]
    shapes = [(4, 2, 3), (2, 2, 6), (1, 1, 8)]
    for world_size, size, num_steps in shapes:
        done = areal_like(
            *("run", "name=x", *job, "resume=auto", f"trainer.num_steps={num_steps}"),
            *(f"trainer.world_size={world_size}", f"trainer.context_parallel={size}"),
            cwd=tmp_path,
            environment=cache,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "x"
    assert audit_run(root).is_clean
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert all((row.get("mismatch_abs") or 0.0) < 1e-4 for row in rows)
    for words in (
        ["replay", "x", "name=one"],
        ["replay", "x", "name=two", "trainer.world_size=4", "trainer.context_parallel=4"],
        ["replay", "x", "--against", "one", "--tolerance", "1e-5"],
        ["replay", "one", "--against", "two", "--tolerance", "1e-5"],
    ):
        done = areal_like(*words, cwd=tmp_path, environment=cache)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference\n" in done.stdout, done.stdout
