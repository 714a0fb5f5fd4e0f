"""A buffer and a rollout server as processes, with a task that fails in several ways; the test trains."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from areal_like.selection import selection_report
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import (
    CommitStep,
    EvalResult,
    GetRunCounters,
    Group,
    RequestEval,
    RunCounters,
)
from launch.audit.run import audit_run
from rollout_server.tasks.base import make_task
from tests.support.buffer_harness import BufferProcess, running_buffer, training
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S
from tests.support.rollout_harness import ServerProcess
from tests.support.rollout_tasks import HangingVerifier
from trainer.models.tiny import build_tiny_model, character_tokenizer

TASK = {"_target_": "tests.support.rollout_tasks.HangingVerifier", "max_prompt_tokens": 16}
NUM_STEPS, GROUPS, SIZE = 2, 6, 4
SETTINGS: dict[str, Any] = {
    "max_staleness": NUM_STEPS,
    "sampling": {"group_size": SIZE},
    "trainer": {"num_steps": NUM_STEPS, "groups_per_step": GROUPS},
    "eval": {"num_prompts": 4},
    "task": TASK,
    "rollout": {"max_running": 16, "queue_samples": 16, "reward_timeout_s": 1.0},
}


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_answers_that_hang_the_verifier_get_reward_0(tmp_path: Path) -> None:
    """Long, because a sixth of all rewards takes its whole time limit, and its worker is then replaced."""
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=5, swap_prob=0.5)
    with ExitStack() as stack:
        buffer = stack.enter_context(running_buffer(tmp_path, model={"path": str(model)}, **SETTINGS))
        server = ServerProcess(buffer.peers_config)
        stack.callback(server.close)
        evaluation, groups, counters = asyncio.run(train(buffer))
        metrics = buffer.get("/metrics")
        code, _, errors = server.terminate()
        assert code == 0, errors
    check_groups(groups)
    assert evaluation.num_failed == 2 and evaluation.num_evaluated == 2, "prompts 1 and 3 are too long"
    report = selection_report(counters.counters)
    num_hung = sum(is_hanging(t) for group in groups for t in group.trajectories)
    assert num_hung and report["failures"]["reward_timeout"]["zero"] >= num_hung
    assert report["failures"]["prompt"]["drop"] >= 2 and report["prompts_given_up"] > 0
    assert "retry" not in report["failures"]["prompt"]
    assert report["trained"]["samples"] == NUM_STEPS * GROUPS * SIZE
    trained = sum(t.reward for group in groups for t in group.trajectories)
    assert report["trained"]["reward_mean"] == pytest.approx(trained / report["trained"]["samples"], abs=1e-6)
    assert 'areal_samples_failed_total{kind="reward_timeout",outcome="zero"}' in metrics
    assert 'areal_response_tokens_bucket{le="+Inf",of="trained"}' in metrics
    audit = audit_run(buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.failures["reward_timeout zero"] == report["failures"]["reward_timeout"]["zero"]


async def train(buffer: BufferProcess) -> tuple[EvalResult, list[Group], RunCounters]:
    groups: list[Group] = []
    async with training(buffer) as trainer:
        request = RequestEval(eval_id=0, num_prompts=4, min_version=0)
        evaluation = await trainer.call(request, timeout_s=WAIT_LIMIT_S)
        for step in range(NUM_STEPS):
            groups += await trainer.train(step, timeout_s=WAIT_LIMIT_S)
            await trainer.call(CommitStep(step=step))
        return evaluation, groups, await trainer.call(GetRunCounters())


def check_groups(groups: list[Group]) -> None:
    """Prompts fit, and an answer has the reward of the task, or 0 if the task hangs on it."""
    task = make_task(TASK, seed=0)
    for group in groups:
        prompts = [closed.prompt_index for closed in group.closed] or [group.prompt_index]
        assert all(map(HangingVerifier.fits, prompts))
        for trajectory in group.trajectories:
            expected = 0.0 if is_hanging(trajectory) else task.reward(None, completion_of(trajectory))  # type: ignore[arg-type]
            assert trajectory.reward == expected and trajectory.num_sampled > 0


def completion_of(trajectory: Trajectory) -> str:
    sampled = trajectory.tokens[trajectory.loss_mask == 1]
    return str(character_tokenizer().decode(sampled, skip_special_tokens=True))


def is_hanging(trajectory: Trajectory) -> bool:
    return HangingVerifier.hangs_on(completion_of(trajectory))
