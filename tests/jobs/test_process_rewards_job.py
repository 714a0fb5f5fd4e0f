"""Jobs with process rewards: steps, a KL budget and PRIME; their audit, their replay, a resume."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from areal_like.ledger_place import open_ledger
from areal_like.wire.records import Record, RecordLocation, read_record
from launch.audit.run import audit_run
from tests.support.launching import TEST_LIMIT_S, areal_like

SMALL = (
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Stepped",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "trainer.checkpoint_interval=2",
    "trainer.keep_checkpoints=9",
    "weights.check_interval_s=0",
    "buffer.retain_trajectories=true",
    "max_staleness=1",
    "eval.num_prompts=0",
)
EQUAL = "weights after step 2, 4: equal to the recorded run's, to the last bit"


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_rewards_of_steps_reach_the_trainer(tmp_path: Path, cache: dict[str, str]) -> None:
    settings = ("advantage=grpo_process", "kl.coef=0.1", "kl.budget=1e-6", "trainer.num_steps=4")
    done = areal_like("run", "name=steps", *SMALL, *settings, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "steps"
    assert audit_run(root).is_clean
    rows = rows_of(root)
    assert all(row["steps_per_sample"] > 1 and row["grad_norm"] > 0 for row in rows)
    coefficients = [row["kl_coef"] for row in rows]
    assert coefficients[0] == 0.1 and len(set(coefficients)) > 1

    records = records_of(root / "ledger")
    spoke = [record for record in records if record.num_sampled > 3]  # others may have no text
    assert spoke and all(record.trajectory().steps for record in spoke)

    done = areal_like("replay", "steps", cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert EQUAL in done.stdout


def records_of(directory: Path) -> list[Record]:
    """The records of the first samples of a ledger."""
    with contextlib.closing(open_ledger(directory)) as ledger:
        found = ledger.execute(
            "SELECT ticket_id, sample_index, segment, offset, num_bytes, crc32 FROM samples LIMIT 8"
        ).fetchall()
    return [
        read_record(directory, RecordLocation(*place), ticket_id=ticket_id, sample_index=sample_index)
        for ticket_id, sample_index, *place in found
    ]


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_prime_is_resumed_and_replayed(tmp_path: Path, cache: dict[str, str]) -> None:
    small = (*SMALL, "advantage=prime", "advantage.beta=0.5")
    done = areal_like("run", "name=prime", *small, "trainer.num_steps=2", cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    resume = ("name=prime", "trainer.num_steps=4", "resume=latest")
    done = areal_like("run", *small, *resume, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs" / "prime"
    assert audit_run(root).is_clean
    rows = rows_of(root)
    assert len(rows) == 4 and rows[0]["prm_reward_mean"] == 0 and rows[3]["prm_reward_mean"] != 0
    assert (root / "checkpoints" / "step_000004" / "rows" / "prm-00000-of-00001.safetensors").exists()
    done = areal_like("replay", "prime", cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert EQUAL in done.stdout
