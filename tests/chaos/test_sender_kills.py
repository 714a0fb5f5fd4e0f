"""A job with two senders of weights, of which the one that is not rank 0 is killed in mid-push."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.support.launching import TEST_LIMIT_S, num_steps_done, wait_until
from tests.support.roles import started_roles

NUM_STEPS, GROUPS_PER_STEP = 6, 4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_sender_costs_only_that_push(tmp_path: Path, cache: dict[str, str]) -> None:
    """Buffer and server live on. The first trainer ends, because a rank is gone, and the second resumes. Its
    engine computes with the weights that the second trainer pushes, as the checks of log-probs show."""
    settings = (
        "model.warm_start_steps=0",
        "weights.senders=2",
        "trainer.world_size=2",
        "weights.integrity=sha256",
        "weights.bucket_bytes=16384",
        "weights.check_interval_s=0",
        "task._target_=tests.support.rollout_tasks.Checksum",
        "sampling.group_size=4",
        f"trainer.groups_per_step={GROUPS_PER_STEP}",
        f"trainer.num_steps={NUM_STEPS}",
        "trainer.checkpoint_interval=3",
        "trainer.keep_checkpoints=9",
        "max_staleness=0",  # each step needs the push before it, so no push is skipped
        "eval.num_prompts=0",
        "rollout.max_running=16",
        "rollout.queue_samples=8",
        "objective._target_=tests.support.fault_points.KilledTrainer",
        f"objective.folder={tmp_path}",
        "objective.deaths='sender:4'",
    )
    with started_roles(tmp_path, settings, cache) as roles:
        run = roles.run
        buffer, port = roles.start_buffer()
        server = roles.start("rollout_server", "--name", "rollout-0", port)
        first = roles.start("trainer", port)
        wait_until(lambda: first.poll() is not None, what="the death", run_root=run)
        assert first.returncode and (tmp_path / "sender:4").exists() and num_steps_done(run) in (3, 4)
        second = roles.start("trainer", port, "resume=latest")
        for process in (second, server, buffer):
            wait_until(lambda process=process: process.poll() is not None, what="its end", run_root=run)
        assert [process.returncode for process in (second, server, buffer)] == [0, 0, 0]

    assert "PushWeights failed: " in (run / "logs" / "rollout-0.log").read_text()
    assert "from 2 senders" in (run / "logs" / "trainer-0.log").read_text()
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == NUM_STEPS * GROUPS_PER_STEP
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    checked = [row["weight_check_abs"] for row in rows if row.get("weight_check_abs") is not None]
    assert checked and max(checked) < 1e-4, "engines compute with what was pushed"
