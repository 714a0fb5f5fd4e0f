"""Jobs whose trainer, or one sender of it, is killed in mid-push and replaced; buffer and server live on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.audit.run import audit_run
from tests.support.launching import TEST_LIMIT_S, num_steps_done, wait_until
from tests.support.roles import started_roles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]
NUM_STEPS, GROUPS_PER_STEP = 6, 4
SETTINGS = (
    "model.warm_start_steps=0",
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
)


def killed_at(death: str, folder: Path) -> tuple[str, ...]:
    target = "objective._target_=tests.support.fault_points.KilledTrainer"
    return (target, f"objective.folder={folder}", f"objective.deaths={death!r}")


def wait_for_ends(processes: Iterable[subprocess.Popen[bytes]], run: Path) -> None:
    for process in processes:
        wait_until(lambda process=process: process.poll() is not None, what="its end", run_root=run)
        assert process.returncode == 0


def checked_rows(run: Path, *, first: int = 0) -> list[dict[str, Any]]:
    """The metrics of all steps, each trained once; from step `first` on the engines compute with what was
    pushed."""
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == NUM_STEPS * GROUPS_PER_STEP
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    errors = [row["weight_check_abs"] for row in rows[first:] if row.get("weight_check_abs") is not None]
    assert errors and max(errors) < 1e-4
    return rows


@pytest.mark.long
def test_a_killed_sender_costs_only_that_push(tmp_path: Path, cache: dict[str, str]) -> None:
    """The first trainer ends, because a rank is gone (not rank 0), and the second resumes."""
    settings = (*SETTINGS, "weights.senders=2", "trainer.world_size=2", *killed_at("sender:4", tmp_path))
    with started_roles(tmp_path, settings, cache) as roles:
        run = roles.run
        buffer, port = roles.start_buffer()
        server = roles.start("rollout_server", "--name", "rollout-0", port)
        first = roles.start("trainer", port)
        wait_until(lambda: first.poll() is not None, what="the death", run_root=run)
        assert first.returncode and (tmp_path / "sender:4").exists() and num_steps_done(run) in (3, 4)
        wait_for_ends((roles.start("trainer", port, "resume=latest"), server, buffer), run)

    assert "PushWeights failed: " in (run / "logs" / "rollout-0.log").read_text()
    assert "from 2 senders" in (run / "logs" / "trainer-0.log").read_text()
    checked_rows(run)


@pytest.mark.chaos
@pytest.mark.parametrize("lora", ["adapter", "merged"])
def test_a_kill_with_lora_costs_only_that_push(tmp_path: Path, cache: dict[str, str], lora: str) -> None:
    """The second trainer has another number of ranks, and learning rate 0, so the weights that it has resumed
    are those of its own checkpoint: the same as in the first trainer's, to the last bit."""
    settings = (*SETTINGS, "model.lora.rank=8", f"weights.lora={lora}", *killed_at("push:4", tmp_path))
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
        wait_for_ends((roles.start("trainer", port, *words), server, buffer), run)

    assert all(row["grad_norm"] > 0 for row in checked_rows(run, first=3))
    after = load_file(run / "checkpoints" / "step_000006" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.any() for name, tensor in before.items() if ".lora_B." in name), "it had learned"
