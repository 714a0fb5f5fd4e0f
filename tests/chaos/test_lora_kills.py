"""A job with LoRA whose trainer is killed in mid-push, and goes on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.audit.run import audit_run
from tests.support.launching import TEST_LIMIT_S, num_steps_done, wait_until
from tests.support.roles import started_roles

NUM_STEPS, GROUPS_PER_STEP = 6, 4


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("lora", ["adapter", "merged"])
def test_a_kill_in_mid_push_costs_only_that_push(tmp_path: Path, cache: dict[str, str], lora: str) -> None:
    """The buffer and the server live on. The second trainer's learning rate is 0, so the weights that it has
    resumed are those of its own checkpoint: the same as in the first trainer's, to the last bit."""
    settings = (
        "model.warm_start_steps=0",
        "model.lora.rank=8",
        f"weights.lora={lora}",
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
        "objective.deaths='push:4'",
    )
    with started_roles(tmp_path, settings, cache) as roles:
        run = roles.run
        buffer, port = roles.start_buffer()
        server = roles.start("rollout_server", "--name", "rollout-0", port)
        first = roles.start("trainer", port, "trainer.lr=1e-3")
        wait_until(lambda: first.poll() is not None, what="the death", run_root=run)
        assert (tmp_path / "push:4").exists() and num_steps_done(run) in (3, 4)
        log = run / "logs" / "rollout-0.log"
        wait_until(lambda: "PushWeights failed: engine" in log.read_text(), what="a broken push")
        before = load_file(run / "checkpoints" / "step_000003" / "adapter_model.safetensors")

        words = ("trainer.world_size=2", "trainer.lr=0", "resume=latest")
        second = roles.start("trainer", port, *words)
        for process in (second, server, buffer):
            wait_until(lambda process=process: process.poll() is not None, what="its end", run_root=run)
        assert [process.returncode for process in (second, server, buffer)] == [0, 0, 0]

    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == NUM_STEPS * GROUPS_PER_STEP
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert all(row["grad_norm"] > 0 for row in rows)
    checked = [row["weight_check_abs"] for row in rows[3:] if row.get("weight_check_abs") is not None]
    assert checked and max(checked) < 1e-4, "the engines compute with what the second trainer has resumed"
    after = load_file(run / "checkpoints" / "step_000006" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.any() for name, tensor in before.items() if ".lora_B." in name), "it had learned"
