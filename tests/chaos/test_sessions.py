"""Real jobs whose samples are sessions, while agents and every process of the job are killed and stopped.

External agents (agents.py) and those of the job (agent_task.py) give the number of their turns as the
reward, so the ledger itself shows whether a sample has the turns that its agent saw: no more, where a request
was sent again, and no fewer.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.chaos.session_job import (
    IDLE_TIMEOUT_S,
    SETTINGS,
    SIGNALS,
    Strikes,
    check_books,
    check_rewards,
    end,
    external_job,
    open_ids,
    pids_of,
    recorded,
)
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import launcher, num_steps_done, wait_for_steps, wait_until

MISHAPS = {"silent": 0.03, "abandoned": 0.03, "repeated": 0.1}


def strike_external_job(directory: Path, *, num_strikes: int, pause_s: float, seed: int) -> None:
    roles = ("agents", "server", "engine", "buffer", "trainer")
    plan = {"num_agents": 32, "pause_s": 0.3, "mishaps": MISHAPS}
    with external_job(directory, plan=plan) as (process, agents, root):
        wait_for_steps(2, root, process=process)
        strikes = Strikes(root, agents, roles=roles, seed=seed)
        for number in range(num_strikes):
            # Each role is killed and stopped once; then chance decides.
            if number < 2 * len(roles):
                strikes.one(roles[number // 2], SIGNALS[number % 2])
            else:
                strikes.one()
            time.sleep(pause_s)
            assert process.poll() is None, process.communicate()
            assert all(one.poll() is None for one in agents.processes), "a process of agents has ended"
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        end(process, root)
        check_books(root, agents)
        print(dict(strikes.done))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_agents_from_outside_while_all_is_killed(tmp_path: Path, seed: int) -> None:
    strike_external_job(tmp_path, num_strikes=30, pause_s=5.0, seed=seed)


@pytest.mark.chaos
def test_all_agents_from_outside_are_killed_at_once(tmp_path: Path) -> None:
    """64 sessions of 32 groups are idle at the same time; the job goes on with the next agents."""
    settings = ("sampling.group_size=2", "rollout.max_episodes=64", "trainer.groups_per_step=16")
    plan = {"num_agents": 64, "pause_s": 1.0}
    with external_job(tmp_path, *settings, plan=plan, num_processes=1, num_servers=1) as (
        process,
        agents,
        root,
    ):
        for _ in range(3):
            wait_for_steps(num_steps_done(root) + 2, root, process=process)
            agents.kill()
            time.sleep(2 * IDLE_TIMEOUT_S)
            assert process.poll() is None, process.communicate()
            agents.start()
        wait_for_steps(num_steps_done(root) + 2, root, process=process)
        end(process, root)
        check_books(root, agents)
    # A row of failures of so many tickets would have ended the job, and the launcher would have begun again.
    assert audit_run(root).facts["rollbacks"] == 0


@pytest.mark.chaos
def test_a_buffer_is_restarted_under_64_open_sessions(tmp_path: Path) -> None:
    """The sessions go on; what their agents have ended is recorded, and none of them is made twice."""
    settings = ("rollout.max_episodes=64", "sessions.idle_timeout_s=30", "buffer.lease_timeout_s=15")
    plan = {"num_agents": 64, "pause_s": 1.0}
    with external_job(tmp_path, *settings, plan=plan, num_processes=1, num_servers=1) as (
        process,
        agents,
        root,
    ):
        for _ in range(3):
            wait_for_steps(num_steps_done(root) + 2, root, process=process)
            wait_until(lambda: len(open_ids(agents)) >= 50, what="open sessions", process=process)
            open_before = open_ids(agents)
            (pid,) = pids_of(root, "buffer")
            os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda before=open_before: not before & open_ids(agents),  # type: ignore[misc]
                what="the end of the sessions that were open",
                process=process,
            )
            events = agents.events
            ended = {event["id"] for event in events if event["kind"] == "ended"}
            assert open_before <= ended, [e for e in events if e.get("id") in open_before - ended]
            wait_until(
                lambda before=open_before: before <= set(recorded(root)),  # type: ignore[misc]
                what="the samples of the sessions that were open",
                timeout_s=30,
                process=process,
            )
        end(process, root)
        check_books(root, agents)
        made = Counter(id.rpartition("-")[0] for id in recorded(root))
        assert max(made.values()) == 1


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["recompute", "keep", "abort_resume", "drain"])
def test_pushes_while_sessions_are_open(tmp_path: Path, mode: str) -> None:
    """Requests are in flight at each push; the job is then drained under open sessions."""
    plan = {"num_agents": 64, "pause_s": 0.05, "mishaps": {"repeated": 0.05}}
    with external_job(tmp_path, f"weights.update_mode={mode}", plan=plan, num_servers=1) as (
        process,
        agents,
        root,
    ):
        wait_for_steps(40, root, process=process)
        end(process, root)
        check_books(root, agents)
        refused = [event for event in agents.events if event["kind"] in ("refused", "over", "lost")]
        assert len(refused) <= 64, "more than those of the drain"


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_agents_of_the_job_while_all_is_killed(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "x"
    build_chat_model(tmp_path / "model")
    roles = ("worker", "zygote", "server", "engine", "buffer")
    task = "task={_target_: tests.chaos.agent_task.SlowAgentTask, max_prompt_tokens: 64}"
    job = (
        *SETTINGS,
        task,
        f"model.path={tmp_path}/model",
        "rollout.num_servers=2",
        "rollout.max_episodes=48",
    )
    with launcher(*job, cwd=tmp_path) as process:
        wait_for_steps(2, root, process=process)
        strikes = Strikes(root, None, roles=roles, seed=3)
        for number in range(30):
            if number < 2 * len(roles):
                strikes.one(roles[number // 2], SIGNALS[number % 2])
            else:
                strikes.one()
            time.sleep(4.0)
            assert process.poll() is None, process.communicate()
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        end(process, root)
    check_rewards(root, {})
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    print(dict(strikes.done), *audit.lines(), sep="\n")
