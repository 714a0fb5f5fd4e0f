"""A buffer and a rollout server whose samples are sessions: of `agent()`, and of external agents."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from areal_like.client.areal_like_client import JobOverError, SessionOverError, claim
from areal_like.wire.messages.consumer import CommitStep, EvalResult, Group, RequestEval
from launch.audit.run import audit_run
from tests.jobs.test_environment_job import environment_processes, status_of
from tests.support.agent_tasks import post, said
from tests.support.buffer_harness import running_buffer, training
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S, wait_until
from tests.support.rollout_harness import ServerProcess

NUM_STEPS, GROUPS, SIZE = 2, 4, 4
SETTINGS: dict[str, Any] = {
    "max_staleness": NUM_STEPS,
    "sampling": {"group_size": SIZE, "max_new_tokens": 8},
    "episode": {"max_turns": 5, "memory_mb": 512},
    "sessions": {"idle_timeout_s": 30.0},
    "trainer": {"num_steps": NUM_STEPS, "groups_per_step": GROUPS},
    "eval": {"num_prompts": 4},
    "rollout": {"max_running": 16, "queue_samples": 16, "max_context": 200},
}


@contextlib.contextmanager
def agents_from_outside(url: str, *, num: int) -> Iterator[None]:
    """Threads that claim sessions and play one or two turns each, until the end of the block."""
    num_claimed = itertools.count()
    is_over = threading.Event()

    def play() -> None:
        while not is_over.is_set():
            try:
                session = claim(url, wait_s=0.5)
            except JobOverError:
                return
            if session is None:
                continue
            index = session.example["index"]
            if next(num_claimed) == 3:  # this agent is lost before its first request
                continue
            with contextlib.suppress(RuntimeError, SessionOverError):  # idle for too long on a slow machine
                for turn in range(1 + index % 2):
                    body = {"messages": [said(f"example {index}"), said(f"turn {turn}")]}
                    post("chat/completions", body, base_url=session.base_url, api_key=session.api_key)
                session.reward(0.25)
                session.end()

    threads = [threading.Thread(target=play) for _ in range(num)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def run_job(
    tmp_path: Path, task: dict[str, Any], *, num_outside: int = 0, **more: Any
) -> tuple[list[Group], EvalResult, dict[str, Any]]:
    """Trains all steps; the groups, an evaluation, and the server's status."""
    model = tmp_path / "model"
    build_chat_model(model)
    settings = SETTINGS | more | {"task": task | {"max_prompt_tokens": 64}}
    settings["model"] = {"path": str(model), "renderer": "tests.support.line_chat.LineChat"}
    with ExitStack() as stack, ExitStack() as outside:
        buffer = stack.enter_context(running_buffer(tmp_path, **settings))
        config = buffer.peers_config
        server = ServerProcess(config)
        stack.callback(server.close)
        endpoint = server.paths.endpoints / "rollout-0.json"
        if num_outside:
            wait_until(lambda: endpoint.exists() and "sessions" in endpoint.read_text(), what="the sessions")
            url = json.loads(endpoint.read_text())["sessions"]
            outside.enter_context(agents_from_outside(str(url), num=num_outside))

        async def train() -> tuple[list[Group], EvalResult]:
            async with training(buffer) as trainer:
                request = RequestEval(eval_id=0, num_prompts=4, min_version=0)
                evaluation = await trainer.call(request, timeout_s=WAIT_LIMIT_S)
                groups: list[Group] = []
                for step in range(NUM_STEPS):
                    groups += await trainer.train(step, timeout_s=WAIT_LIMIT_S)
                    await trainer.call(CommitStep(step=step))
                return groups, evaluation

        groups, evaluation = asyncio.run(train())
        outside.close()
        status = status_of(server)
        processes = environment_processes(server.process.pid)
        server.process.kill()
        wait_until(lambda: not any(map(environment_processes, processes)), what="the end of its processes")
        buffer.terminate()
    audit = audit_run(buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert len({group.ticket_id for group in groups}) == len(groups) == NUM_STEPS * GROUPS
    assert all(len(group.trajectories) == SIZE for group in groups)
    return groups, evaluation, status


@pytest.mark.timeout(TEST_LIMIT_S)
def test_agents_of_a_job_and_no_sample_is_lost(tmp_path: Path) -> None:
    task = {"_target_": "tests.support.agent_tasks.ChatterAgentTask"}
    groups, evaluation, status = run_job(tmp_path, task)
    assert evaluation.num_evaluated == 4
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert {len(trajectory.segments) for trajectory in trajectories} >= {0, 2}
    assert {trajectory.reward for trajectory in trajectories} <= {0.0, 1.0}
    stats = status["stats"]
    assert stats["samples_failed_environment"] > 0 and stats["environments_open"] < 64


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.chaos
def test_agents_from_outside_make_the_samples(tmp_path: Path) -> None:
    limits = {"sessions": {"idle_timeout_s": 3.0}}  # a loaded machine makes each turn slow
    groups, evaluation, _ = run_job(tmp_path, {"name": "external"}, num_outside=6, **limits)
    assert evaluation.num_evaluated == 4
    rewards = {trajectory.reward for group in groups for trajectory in group.trajectories}
    assert rewards == {0.25}
