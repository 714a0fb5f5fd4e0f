"""64 sessions of ten real minutes, whose agents wait for slow tools, while servers and the router are killed.

A server is killed every minute, and the router once. Other agents, with short sessions, keep the trainer at
work meanwhile: the weights change some twenty times within each of the 64 sessions. Each of these must be a
trained sample, with every turn that its agent has seen and none twice, and each of its tokens must have been
sampled by the weights whose version it has.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from areal_like.trajectory import Trajectory
from launch.audit.run import audit_run
from tests.chaos.agents import Plan, kinds_of
from tests.chaos.session_job import (
    OutsideAgents,
    check_books,
    check_ended,
    end,
    external_job,
    kill,
    lease_of,
    open_ids,
    outside_agents,
    recorded,
    rows_of,
    sample_of,
    trajectories_of,
)
from tests.support.launching import TEST_LIMIT_S, launcher_log, wait_until
from tests.support.scripted_policy import check_logprobs

NUM_SESSIONS = 64
NUM_TURNS = 16
"""Of a long session, at least."""
TOOL_S = 43.0
"""Mean time of one of its tools."""
KILL_EVERY_S = 60.0
KILLS_BEFORE_ROUTER = 4
"""The router is killed after so many servers."""
FEWEST_KILLS, FEWEST_VERSIONS = 8, 8
OUTAGE_S = 60.0
"""How long the agents' clients repeat a request."""
SETTINGS = (
    "rollout.max_episodes=300",
    "rollout.max_context=768",
    "episode.max_turns=32",
    "sessions.idle_timeout_s=120",
    "max_staleness=32",
    "trainer.groups_per_step=4",
    "trainer.lr=1e-3",
    "trainer.warmup_steps=1",
    "trainer.checkpoint_interval=1",
    "trainer.keep_checkpoints=1000",
    "buffer.overdue=wait",
)


@pytest.mark.chaos
@pytest.mark.timeout(2 * TEST_LIMIT_S)
def test_sessions_of_ten_minutes_lose_nothing(tmp_path: Path) -> None:
    work_for_long(tmp_path, tool_s=TOOL_S, kill_every_s=KILL_EVERY_S)


def work_for_long(directory: Path, *, tool_s: float, kill_every_s: float) -> None:
    """The whole job. `tool_s`: mean time of a tool of the long sessions."""
    plan: dict[str, Any] = {
        "num_agents": NUM_SESSIONS // 2,
        "num_sessions": 1,
        "pause_s": tool_s,
        "min_turns": NUM_TURNS,
        "max_turns": NUM_TURNS + 2,
        "mishaps": {"repeated": 0.1},
        "apis": ["chat", "responses", "messages"],
        "outage_s": OUTAGE_S,
    }
    (directory / "others").mkdir()
    with external_job(directory, *SETTINGS, plan=plan, num_routers=1) as (process, agents, root):
        wait_until(
            lambda: len(open_ids(agents)) == NUM_SESSIONS,
            what="64 open sessions",
            run_root=root,
            process=process,
        )
        others = Plan(
            urls=agents.urls,
            num_agents=12,
            pause_s=tool_s / 2.5,
            min_turns=2,
            max_turns=3,
            mishaps={"repeated": 0.1, "silent": 0.02, "abandoned": 0.02, "unrewarded": 0.02},
            has_groups=True,
            outage_s=OUTAGE_S,
            seed=100,
        )
        with outside_agents(directory / "others", others, num_processes=1) as short:
            num_kills = kill_in_turn(root, agents, process, every_s=kill_every_s)
            assert agents.finish() == [0, 0]
            tickets = {int(id.split("-")[0]) for id in claimed_by(agents)}
            wait_until(
                lambda: states_of(root, tickets) == {"trained"},
                what=f"the training of {len(tickets)} groups",
                run_root=root,
                process=process,
            )
            short.kill()  # else they hear from the router that it is ending
            end(process, root)
            check_books(root, short)
            check_others(root, short)
        check_books(root, agents)
        check_sessions(root, agents, directory / "model")
        assert num_kills >= FEWEST_KILLS
        assert audit_run(root).facts["rollbacks"] == 0


def kill_in_turn(root: Path, agents: OutsideAgents, process: subprocess.Popen[str], *, every_s: float) -> int:
    """Kills a server each time so much time has passed, and the router once, until the agents have ended;
    returns how many servers were killed."""

    def have_ended() -> bool:
        return all(one.poll() is not None for one in agents.processes)

    due_s = time.monotonic()
    for num_kills, name in enumerate(itertools.cycle(("rollout-0", "rollout-1"))):
        due_s = max(due_s + every_s, time.monotonic())
        wait_until(
            lambda due_s=due_s: have_ended() or time.monotonic() >= due_s,  # type: ignore[misc]
            what=f"kill {num_kills}",
            process=process,
        )
        if have_ended():
            break
        wait_until(kill(root, name), what=f"another {name}", run_root=root, process=process)
        if num_kills + 1 == KILLS_BEFORE_ROUTER:
            wait_until(kill(root, "router-0"), what="another router", run_root=root, process=process)
            assert any(
                line.startswith("router-0 ended (killed by SIGKILL): starting") for line in launcher_log(root)
            )
    return num_kills


def claimed_by(agents: OutsideAgents) -> list[str]:
    """The samples that these agents have claimed, each time, as `ticket-sample`."""
    return [sample_of(event["id"]) for event in agents.events if event["kind"] == "claimed"]


def states_of(root: Path, tickets: set[int]) -> set[str]:
    """The states of these tickets."""
    states = dict(rows_of(root, "SELECT ticket_id, state FROM tickets"))
    return {states[ticket] for ticket in tickets}


def check_sessions(root: Path, agents: OutsideAgents, model: Path) -> None:
    """Each of the long sessions was claimed once and ended by its agent, and is a sample with exactly its
    turns."""
    events = agents.events
    claimed = Counter(claimed_by(agents))
    assert len(claimed) == NUM_SESSIONS == claimed.total(), "a sample was given to two agents"
    assert kinds_of(events) == {"claimed": NUM_SESSIONS, "ended": NUM_SESSIONS}, kinds_of(events)
    ended = {sample_of(event["id"]): event for event in events if event["kind"] == "ended"}
    begun_s = {sample_of(event["id"]): event["at_s"] for event in events if event["kind"] == "claimed"}
    made = {sample_of(id): one for id, one in trajectories_of(root) if sample_of(id) in claimed}
    assert made.keys() == claimed.keys()
    for id, one in made.items():
        assert one.num_turns == one.reward == ended[id]["num_turns"], (
            id,
            one.num_turns,
            one.reward,
            ended[id],
        )
    check_versions(root, model, list(made.values()))
    lasted_s = sorted(ended[id]["at_s"] - begun_s[id] for id in ended)
    num_versions = sorted(len(set(one.versions[one.loss_mask == 1].tolist())) for one in made.values())
    num_turns = sum(one.num_turns for one in made.values())
    print(f"{len(made)} sessions of {lasted_s[0]:.0f} to {lasted_s[-1]:.0f} s with {num_turns} turns")
    print(f"{num_versions[0]} to {num_versions[-1]} versions in each")
    assert num_versions[0] >= FEWEST_VERSIONS


def check_versions(root: Path, model: Path, trajectories: list[Trajectory]) -> None:
    """Each log-prob is that of the weights of its token's version: the model's, or those of a checkpoint."""
    steps = {0: 0, **dict(rows_of(root, "SELECT version, step FROM versions"))}
    versions = sorted({version for one in trajectories for version in one.versions.tolist() if version >= 0})
    for step, same in itertools.groupby(versions, key=lambda version: steps[version]):
        weights = root / "checkpoints" / f"step_{step:06d}" if step else model
        reference = AutoModelForCausalLM.from_pretrained(weights)
        for version, trajectory in itertools.product(same, trajectories):
            if version in trajectory.versions:
                check_logprobs(trajectory, reference, version=version)
    # The weights differ by more than the comparison allows.
    first = AutoModelForCausalLM.from_pretrained(model)
    for version in versions[len(versions) // 2 :]:
        with pytest.raises(AssertionError):
            for trajectory in trajectories:
                check_logprobs(trajectory, first, version=version)


def check_others(root: Path, agents: OutsideAgents) -> None:
    """What became of the short sessions that are no samples under their own lease."""
    made = set(recorded(root))
    claimed = [event for event in agents.events if event["kind"] == "claimed"]
    num_remade = check_ended(root, [event for event in claimed if lease_of(event) not in made])
    print(f"{len(claimed)} short sessions, {num_remade} of them continued or made again")
