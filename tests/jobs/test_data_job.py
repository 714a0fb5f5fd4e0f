"""A whole job over rows of a file: single turns with a reward of the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.support.launching import TEST_LIMIT_S, areal_like


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_rows_of_a_file_are_trained_on(tmp_path: Path, cache: dict[str, str]) -> None:
    rows = [{"question": f"{row:03}=", "answer": f"{row:03}"} for row in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = areal_like(
        "run",
        "name=x",
        "task={name: data, train: rows.jsonl, eval: rows.jsonl, reward: exact}",
        "model.warm_start_steps=0",
        "sampling.max_new_tokens=4",
        "trainer.num_steps=2",
        "trainer.groups_per_step=2",
        "eval.num_prompts=2",
        cwd=tmp_path,
        environment=cache,
    )
    root = tmp_path / "runs" / "x"
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads((root / "summary.json").read_text())
    assert summary["tickets"]["trained"] == 4 and not summary["selection"].get("failures")
    assert audit_run(root).is_clean
