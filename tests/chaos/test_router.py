"""A real job whose agents know only the address of a router, while its servers and the router are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from areal_like.paths import read_endpoint
from tests.chaos.agents import kinds_of
from tests.chaos.session_job import check_books, end, external_job, open_ids, pids_of
from tests.support.launching import launcher_log, num_steps_done, wait_for_steps, wait_until

NUM_AGENTS = 8


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_agents_behind_a_router_lose_nothing(tmp_path: Path) -> None:
    """Two servers, a router, and 8 agents with three APIs. Each server is killed once in the middle of its
    sessions, which must all be ended by their agents; then the router is killed."""
    settings = ("rollout.max_episodes=16", "sessions.idle_timeout_s=30", "rollout.max_running=8")
    plan = {
        "num_agents": NUM_AGENTS,
        "pause_s": 1.0,
        "max_turns": 4,
        "apis": ["chat", "responses", "messages"],
        "gives_up_s": 60.0,
    }
    jobs = external_job(
        tmp_path, *settings, "rollout.queue_samples=8", plan=plan, num_processes=1, num_routers=1
    )
    with jobs as (process, agents, root):
        wait_for_steps(1, root, process=process)
        for name in ("rollout-0", "rollout-1"):
            endpoint = root / "endpoints" / f"{name}.json"

            def is_serving(endpoint: Path = endpoint) -> bool:
                return "sessions" in (read_endpoint(endpoint) or {})

            wait_until(is_serving, what=f"the sessions of {name}", process=process)
            wait_until(lambda: len(open_ids(agents)) >= NUM_AGENTS - 2, what="open sessions", process=process)
            before = open_ids(agents)
            server = read_endpoint(endpoint)
            assert server is not None
            os.kill(int(server["pid"]), signal.SIGKILL)
            wait_until(
                lambda before=before: not before & open_ids(agents),  # type: ignore[misc]
                what="the end of the sessions that were open",
                process=process,
            )
            ended = {event["id"] for event in agents.events if event["kind"] == "ended"}
            assert before <= ended, [one for one in agents.events if one.get("id") in before - ended]
            wait_for_steps(num_steps_done(root) + 1, root, process=process)
        kinds = kinds_of(agents.events)
        assert not kinds["lost"] and not kinds["refused"] and not kinds["over"], kinds
        assert {event["url"] for event in agents.events if "url" in event} == set(agents.urls)
        (pid,) = pids_of(root, "router")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pids_of(root, "router") not in ([], [pid]), what="the router", process=process)
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        assert any(
            line.startswith("router-0 ended (killed by SIGKILL): starting") for line in launcher_log(root)
        )
        agents.kill()  # else they hear from the router that it is ending
        end(process, root)
        check_books(root, agents)
