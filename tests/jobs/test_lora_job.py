"""docs/guides/lora.md: its commands run; the engines' log-probs are the trainer's; a killed run resumes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.audit.run import audit_run
from tests.support.launching import ROOT, TEST_LIMIT_S, areal_like

PAGE = (ROOT / "docs" / "guides" / "lora.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^areal-like (.*)$", PAGE, re.M)]
SMALL = (
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "trainer.num_steps=6",
    "trainer.checkpoint_interval=3",
    "trainer.keep_checkpoints=9",
    "weights.check_interval_s=0",
    "buffer.retain_trajectories=true",
    "max_staleness=1",
    "kl.coef=0.01",
    "eval.num_prompts=0",
)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_commands_of_the_guide_run(tmp_path: Path, cache: dict[str, str]) -> None:
    """Its engines pass their checks, a replay has the same adapter, and the adapter starts another run."""
    train, merge = COMMANDS
    done = areal_like(*train, *SMALL, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "lora"
    assert audit_run(root).is_clean
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["lora_lost_updates"] == 0  # float32
        assert row.get("weight_check_abs") is None or row["weight_check_abs"] < 1e-4
        assert row.get("mismatch_abs") is None or row["mismatch_abs"] < 1e-4
    assert any(row.get("weight_check_abs") is not None for row in rows)

    done = areal_like(*merge, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    merged = load_file(root / "merged" / "model.safetensors")
    base = load_file(root / "model" / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed == {name for name in base if "_proj.weight" in name}

    done = areal_like("replay", "lora", cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights after step 3, 6: equal to the recorded run's, to the last bit" in done.stdout

    adapter = root / "checkpoints" / "step_000006"
    start = [f"model.path={root / 'model'}", f"model.lora.path={adapter}", "model.lora.rank=8"]
    small = [word for word in SMALL if not word.startswith("trainer.num_steps")]
    done = areal_like(
        "run", "name=again", *start, *small, "trainer.num_steps=1", cwd=tmp_path, environment=cache
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "runs/again/metrics.jsonl").read_text().splitlines()]
    assert row["weights_version"] >= 1 and row["mismatch_abs"] < 1e-4, "no sample is of the base alone"

    done = areal_like("eval", "lora", cwd=tmp_path, environment=cache)
    assert done.returncode == 2 and "areal-like merge" in done.stderr
