"""A buffer and a rollout server with environments that fail in many ways, and whose processes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from areal_like.wire.messages.consumer import (
    CommitStep,
    EvalResult,
    GetRunCounters,
    Group,
    RequestEval,
    RunCounters,
)
from launch.audit.run import audit_run
from tests.support.buffer_harness import BufferProcess, running_buffer, training
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S, wait_until
from tests.support.rollout_harness import ServerProcess

NUM_STEPS, GROUPS, SIZE, MAX_TURNS = 3, 6, 4, 3
MISHAPS = {"raise": 0.03, "print": 0.02, "die": 0.03, "hang": 0.01, "allocate": 0.02, "child": 0.02}
SETTINGS: dict[str, Any] = {
    "max_staleness": NUM_STEPS,
    "sampling": {"group_size": SIZE, "max_new_tokens": 12},
    "episode": {"max_turns": MAX_TURNS, "step_timeout_s": 2.0, "memory_mb": 128},
    "trainer": {"num_steps": NUM_STEPS, "groups_per_step": GROUPS},
    # Before its first token a sample is retried, and kills and mishaps may meet the same one several times.
    "buffer": {"max_sample_retries": 50},
    "eval": {"num_prompts": 4},
    "task": {
        "_target_": "tests.support.environment_tasks.ChatterTask",
        "max_prompt_tokens": 64,
        "mishaps": MISHAPS | {"wait 0.2": 0.1},
    },
    "rollout": {"max_running": 16, "queue_samples": 16, "max_context": 200},
}


def environment_processes(pid: int) -> list[int]:
    """A process and its descendants, as far as they serve environments; the one that starts others first."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        if b"rollout_server.workers" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += environment_processes(child)
    return found


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_environments_are_killed_and_no_sample_is_lost(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_chat_model(model)
    settings = SETTINGS | {"model": {"path": str(model), "renderer": "tests.support.line_chat.LineChat"}}
    with ExitStack() as stack:
        buffer = stack.enter_context(running_buffer(tmp_path, **settings))
        server = ServerProcess(buffer.peers_config)
        stack.callback(server.close)
        processes: set[int] = set()
        groups, counters, evaluation = asyncio.run(train(buffer, server, processes))
        wait_until(
            lambda: status_of(server)["stats"]["environment_restarts"] >= 2, what="two restarts counted"
        )
        stats = status_of(server)["stats"]
        # The workers may have ended, but the process that starts them is started again.
        wait_until(lambda: environment_processes(server.process.pid), what="a process of environments")
        processes |= {*environment_processes(server.process.pid)}
        server.process.kill()
        wait_until(
            lambda: not any(map(environment_processes, processes)), what="the end of all its processes"
        )
        buffer.terminate()
    assert evaluation.num_evaluated == 4
    check_groups(groups)
    assert stats["environment_s"] > 0
    finished = {name.rpartition("_")[2]: n for name, n in stats.items() if "samples_finished_" in name}
    assert finished["turns"] and finished["length"] and finished["stop"]
    assert sum(finished.values()) == stats["samples_done"] and not counters.tickets["dropped"]
    audit = audit_run(buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.failures["environment zero"] > 0


async def train(
    buffer: BufferProcess, server: ServerProcess, processes: set[int]
) -> tuple[list[Group], RunCounters, EvalResult]:
    """Trains all steps; between them, the process that starts environments and one of them are killed.

    `processes`: gets the processes of environments that were seen.
    """
    groups: list[Group] = []
    async with training(buffer) as trainer:
        evaluation = await trainer.call(
            RequestEval(eval_id=0, num_prompts=4, min_version=0), timeout_s=WAIT_LIMIT_S
        )
        for step, victim in enumerate([0, -1, 0]):
            while not (pids := environment_processes(server.process.pid)):
                await asyncio.sleep(0.05)
            processes.update(pids)
            with contextlib.suppress(ProcessLookupError):  # a mishap may have ended the worker
                os.kill(pids[victim], signal.SIGKILL)
            groups += await trainer.train(step, timeout_s=WAIT_LIMIT_S)
            await trainer.call(CommitStep(step=step))
        return groups, await trainer.call(GetRunCounters()), evaluation


def status_of(server: ServerProcess) -> dict[str, Any]:
    endpoint = json.loads((server.paths.endpoints / "rollout-0.json").read_text())
    with urllib.request.urlopen(f"http://{endpoint['http']}/status") as page:
        status: dict[str, Any] = json.loads(page.read())
        return status


def check_groups(groups: list[Group]) -> None:
    """Each sample is trained once, and has the rewards and tokens of its turns."""
    assert len({group.ticket_id for group in groups}) == len(groups) == NUM_STEPS * GROUPS
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert len(trajectories) == NUM_STEPS * GROUPS * SIZE
    assert {trajectory.num_turns for trajectory in trajectories} == {1, 2, 3}
    for trajectory in trajectories:
        assert trajectory.num_sampled > 0 and trajectory.num_turns <= MAX_TURNS
        assert trajectory.reward == pytest.approx(sum(reward for _, reward in trajectory.turns))
        assert all(trajectory.loss_mask[end - 1] for end, _ in trajectory.turns)
