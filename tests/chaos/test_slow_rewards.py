"""Slow rewards and tools: the engine goes on, nothing is lost, and the log says what to change."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import pytest

from areal_like.wire.messages.producer import SampleDone, ServerHeartbeat
from launch.audit.run import audit_run
from tests.support.launching import finish, launcher, wait_for_steps
from tests.support.rollout_harness import PlayedBuffer, job, serving
from tests.support.rollout_tasks import HANGING, checksum, mishap_of
from trainer.models.tiny import build_tiny_model, character_tokenizer
from trainer.models.tiny_chat import build_tiny_chat_model
from trainer.replay.recording import Recording

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

TASKS = "tests.support.rollout_tasks"
EPISODES = 40
GROUP = 4
GROUPS, NUM_STEPS = 8, 30


def test_the_engine_goes_on_until_max_episodes(tmp_path: Path) -> None:
    """A server with one worker that needs half a second for a reward, and a buffer that grants all credit."""
    build_tiny_model(tmp_path / "model", seed=0, warm_start_steps=0, swap_prob=0.5)
    with PlayedBuffer() as buffer:
        config = job(
            tmp_path,
            port=buffer.port,
            model_dir=tmp_path / "model",
            task={"_target_": f"{TASKS}.HalfASecond"},
            rollout={"max_running": 8, "queue_samples": 4, "max_episodes": EPISODES},
            sampling={"group_size": GROUP},
        )
        with serving(config) as server:
            server.wait_serving(buffer)
            num_granted = grant_all(buffer)
            assert num_granted >= EPISODES - GROUP
            beat = buffer.expect_beat(lambda beat: beat.stats["in_rewards"] >= EPISODES - 2 * GROUP)
            assert beat.stats["at_engine"] == 0 and beat.stats["samples_done"] < EPISODES / 2
            buffer.expect_beat(lambda beat: beat.stats["starved_s"] > 1)
            buffer.expect_beat(lambda beat: not beat.leases and beat.stats["samples_done"] == num_granted)
            buffer.expect_beat(lambda beat: beat.free_samples == 12 and beat.stats["at_engine"] == 0)


def test_slow_tools_leave_the_engine_to_others(tmp_path: Path) -> None:
    """Twelve samples may be at the engine; forty are held, because most wait for their environment."""
    build_tiny_chat_model(tmp_path / "model", seed=0, warm_start_steps=0, uses_tool=False)
    with PlayedBuffer() as buffer:
        config = job(
            tmp_path,
            port=buffer.port,
            model_dir=tmp_path / "model",
            model={
                "path": str(tmp_path / "model"),
                "renderer": "rollout_server.rendering.tiny.TinyRenderer",
            },
            task={"_target_": "tests.support.environment_tasks.SlowToolTask"},
            rollout={"max_running": 8, "queue_samples": 4, "max_episodes": EPISODES, "max_context": 256},
            # Any digit ends a turn: a turn that a limit ends would end the episode.
            sampling={"group_size": GROUP, "max_new_tokens": 100, "stop": list("0123456789")},
        )
        with serving(config) as server:
            server.wait_serving(buffer)
            for lease_id in range(1, EPISODES // GROUP + 1):
                buffer.expect_beat(lambda beat: beat.free_samples >= GROUP)
                buffer.grant(buffer.lease(lease_id, samples=GROUP, prompt=lease_id))
            beat = buffer.expect_beat(lambda beat: beat.stats["in_tools"] > 12)
            assert beat.stats["holding"] > 12 and beat.stats["in_rewards"] == 0
            samples = buffer.expect(SampleDone, count=EPISODES)
            buffer.expect_beat(lambda beat: not beat.leases and beat.stats["in_tools"] == 0)
    for sample in samples:
        trajectory = sample.record.trajectory()
        assert trajectory.reward == 1.0 and [reward for _, reward in trajectory.turns] == [0.5, 0.5]


def grant_all(buffer: PlayedBuffer) -> int:
    """Grants leases while there is credit, one group at a time; returns the number of samples."""
    num_leases = 0
    while True:
        num_leases += 1
        buffer.grant(buffer.lease(num_leases, samples=GROUP, prompt=num_leases))
        beat = buffer.expect_beat(functools.partial(has_sampled, lease_id=num_leases))
        if beat.free_samples < GROUP:
            return num_leases * GROUP


def has_sampled(beat: ServerHeartbeat, *, lease_id: int) -> bool:
    """True if the server holds the lease, and no sample is at the engine."""
    return lease_id in beat.leases and not beat.stats["at_engine"]


def check_rewards(root: Path) -> None:
    """Every trained sample has the reward of its own answer, and 0 only where the reward hangs on it."""
    tokenizer = character_tokenizer()
    num_hung = 0
    with contextlib.closing(Recording(root)) as recording:
        for step in range(NUM_STEPS):
            for group in recording.groups(step, range(GROUPS)):
                for trajectory in group.trajectories:
                    tokens = trajectory.tokens[trajectory.loss_mask == 1]
                    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                    mishap = mishap_of(text)
                    assert mishap not in (1, 2, 3), "these have no reward"
                    expected = 0.0 if mishap in HANGING else checksum(text)
                    assert trajectory.reward == pytest.approx(expected), text
                    num_hung += mishap in HANGING
    assert num_hung > 0


@pytest.mark.parametrize("task", ["SlowOnSome", "SlowService"])
def test_a_job_with_slow_rewards_trains_and_loses_nothing(tmp_path: Path, task: str) -> None:
    """Rewards that now and then take longer than all others together, raise, hang, or end their process."""
    root = tmp_path / "runs" / "x"
    settings = [
        "name=x",
        "model.warm_start_steps=0",
        f"task._target_={TASKS}.{task}",
        f"sampling.group_size={GROUP}",
        f"trainer.groups_per_step={GROUPS}",
        f"trainer.num_steps={NUM_STEPS}",
        "eval.num_prompts=0",
        "rollout.max_running=16",
        "rollout.queue_samples=8",
        "rollout.reward_timeout_s=1",
        "buffer.retain_trajectories=true",
        "buffer.overdue=wait",  # no sample is too old, however slow its reward is
        "rollout.reward_workers=2",
        "buffer.max_consecutive_failures=200",
        *(["rollout.reward_concurrency=32"] if task == "SlowService" else []),
    ]
    with launcher(*settings, cwd=tmp_path) as process:
        wait_for_steps(NUM_STEPS - 1, root, process=process)
        code, out, err = finish(process, root)
    assert code == 0, out + err
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    check_rewards(root)
    summary = json.loads((root / "summary.json").read_text())
    failures = summary["selection"]["failures"]
    assert failures["reward"]["retry"] > 0 and failures["reward_timeout"]["zero"] > 0
    assert summary["tickets"]["dropped"] == 0 and summary["tickets"]["trained"] == NUM_STEPS * GROUPS
