"""Real jobs whose agents know only the addresses of routers, while servers and a router are killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from areal_like.client.areal_like_client import ClaimedSession, claim
from areal_like.paths import read_endpoint
from areal_like.shards import Shard
from launch.audit.run import audit_run
from tests.chaos.agents import kinds_of
from tests.chaos.session_job import (
    check_books,
    end,
    external_job,
    kill,
    open_ids,
    recorded,
    sample_of,
    trajectories_of,
)
from tests.support.launching import launcher_log, num_steps_done, wait_for_steps, wait_until
from tests.support.waiting import HANG_LIMIT_S

NUM_AGENTS = 8
NUM_SHARDS = 2


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
            kill(root, name)
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
        wait_until(kill(root, "router-0"), what="another router", process=process)
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        assert any(
            line.startswith("router-0 ended (killed by SIGKILL): starting") for line in launcher_log(root)
        )
        agents.kill()  # else they hear from the router that it is ending
        end(process, root)
        check_books(root, agents)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_each_of_two_routers_continues_a_session(tmp_path: Path) -> None:
    """Sessions of both shards of the buffer, made with the `openai` package: claimed at one router, continued
    through the other one, and through either after the death of their server."""
    settings = (
        f"buffer.num_shards={NUM_SHARDS}",
        "sessions.idle_timeout_s=120",
        "rollout.max_running=8",
        "rollout.queue_samples=8",
    )
    plan = {"num_agents": 1, "pause_s": 1.0}
    jobs = external_job(tmp_path, *settings, plan=plan, num_processes=0, num_routers=2)
    with jobs as (process, agents, root):
        sessions = claimed_of_each_shard(agents.urls[0])
        for session in sessions:
            work_through(session, agents.urls, root)
        samples = {sample_of(session.id) for session in sessions}
        wait_until(
            lambda: samples <= {sample_of(id) for id in recorded(root)}, what="the samples", process=process
        )
        end(process, root)
        made = {sample_of(id): one for id, one in trajectories_of(root)}
        for id in samples:
            assert (made[id].num_turns, made[id].reward, made[id].segments) == (4, 0.5, ())
        audit = audit_run(root)
        assert audit.is_clean, "\n".join(audit.lines())


def claimed_of_each_shard(url: str) -> list[ClaimedSession]:
    """A session of each shard; what else was claimed is left to its idle time."""
    found: dict[int, ClaimedSession] = {}
    while len(found) < NUM_SHARDS:
        session = claim(url, wait_s=HANG_LIMIT_S, restart_s=HANG_LIMIT_S)
        assert session is not None
        found.setdefault(Shard.of(session.group, count=NUM_SHARDS).index, session)
    return list(found.values())


def work_through(session: ClaimedSession, urls: list[str], root: Path) -> None:
    """Four turns by way of two routers, at which the session's server is killed after the second one."""
    messages: list[Any] = [{"role": "user", "content": "go"}]
    here, there = (at(session, url) for url in urls)
    with client_of(here) as one, client_of(there) as other:
        for client, again in ((one, other), (other, one)):
            answer = client.chat.completions.create(model="policy", messages=messages)
            headers = {"x-stainless-retry-count": "1"}
            same = again.chat.completions.create(model="policy", messages=messages, extra_headers=headers)
            assert (same.id, same.choices) == (answer.id, answer.choices), "it was sampled again"
            messages += [answer.choices[0].message, {"role": "user", "content": "and then"}]
        is_back = kill(root, holder_of(session, root))
        for client in (other, one):
            answer = client.chat.completions.create(model="policy", messages=messages)
            messages += [answer.choices[0].message, {"role": "user", "content": "and then"}]
    here.reward(0.5)
    assert there.end()
    wait_until(is_back, what="the other process of the server")


def at(session: ClaimedSession, url: str) -> ClaimedSession:
    """The session by way of another address."""
    return replace(session, base_url=f"{url}/sessions/{session.id}/v1")


def client_of(session: ClaimedSession) -> OpenAI:
    """The package's client, as it is by default but for the number of retries."""
    return OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=10)


def holder_of(session: ClaimedSession, root: Path) -> str:
    """The name of the server that has the session, by the word of a server."""
    urls = {
        str((read_endpoint(root / "endpoints" / f"{name}.json") or {})["sessions"]): name
        for name in ("rollout-0", "rollout-1")
    }
    found = at(session, next(iter(urls))).find(list(urls))
    return urls[found.base_url.removesuffix(f"/sessions/{session.id}/v1")]
