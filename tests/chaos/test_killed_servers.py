"""Both rollout servers of a real job are killed in turn under 64 agents of all APIs, until its last step.

The agents use chat completions, Responses and Messages, with and without the calculator of the tool job. Some
of them claim groups, some leave their sessions (agents.py). Each kill waits for progress, not for a time. In
the end each session that was claimed is a sample, or its failure was logged, or its agent was told why it is
none and what to do.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conversations import CONVERSATIONS
from launch.audit.run import audit_run
from tests.chaos.session_job import (
    OutsideAgents,
    check_books,
    check_ended,
    external_job,
    kill,
    lease_of,
    recorded,
)
from tests.support.launching import (
    TEST_LIMIT_S,
    finish,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

NUM_AGENTS = 64
NUM_STEPS = 180
STEPS_BETWEEN = 24
"""Steps of 32 samples between two kills, at least: some 20 s."""
MOST_KILLS, FEWEST_KILLS = 6, 3
"""Of a server that is killed more than three times the launcher might believe that it is broken."""
FEWEST_OPEN = 8
"""Sessions that are open at a server when it is killed."""
LAST_STEPS = 20
"""Steps after the last kill."""
IDLE_TIMEOUT_S = 20.0
SLACK_S = 30.0
"""For a server to notice that a session is idle."""
OUTCOMES = ("ended", "over", "lost", "refused", "silent", "abandoned", "unrewarded", "hung")
MISHAPS = ("silent", "abandoned", "unrewarded")
LEADS_ON = re.compile("claim another|claim again|^the job has ended:")
PLAN = {
    "num_agents": NUM_AGENTS // 2,
    "pause_s": 0.5,
    "max_turns": 4,
    "mishaps": {"silent": 0.01, "abandoned": 0.01, "unrewarded": 0.01, "repeated": 0.1},
    "apis": list(CONVERSATIONS),
    "has_tools": True,
    "has_groups": True,
    "gives_up_s": 60.0,
}
SETTINGS = (
    "episode.max_turns=6",
    f"rollout.max_episodes={NUM_AGENTS}",
    f"sessions.idle_timeout_s={IDLE_TIMEOUT_S}",
    f"trainer.num_steps={NUM_STEPS}",
    "buffer.lease_timeout_s=15",
)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The end of a server."""

    url: str
    at_s: float
    """Of the monotonic clock."""


@pytest.mark.chaos
@pytest.mark.timeout(2 * TEST_LIMIT_S)
def test_servers_are_killed_under_agents_of_all_apis(tmp_path: Path) -> None:
    with external_job(tmp_path, *SETTINGS, plan=PLAN, calls_tools=True) as (process, agents, root):
        urls = agents.urls
        wait_until(
            lambda: sum(map(num_open, urls)) >= NUM_AGENTS,
            what="64 open sessions",
            run_root=root,
            process=process,
        )
        kills = kill_servers(root, urls, process)
        for step in range(num_steps_done(root), NUM_STEPS, 10):
            wait_for_steps(step - 1, root, process=process)
        code, out, err = finish(process, root)
        over_s = time.monotonic()
        codes = agents.finish()
        assert (code, err) == (0, ""), out + err
        assert len(kills) >= FEWEST_KILLS, "the job was over too early: raise NUM_STEPS"
        check_books(root, agents)
        check_sessions(root, agents, kills, over_s=over_s)
        assert codes == [0, 0]
        wait_until(lambda: not processes_of(root), what="the end of all processes", timeout_s=20)


def kill_servers(root: Path, urls: list[str], process: subprocess.Popen[str]) -> list[Kill]:
    """Kills one server after the other, each when the job has made progress and sessions are open there."""
    kills: list[Kill] = []
    while len(kills) < MOST_KILLS:
        index, wanted = len(kills) % len(urls), num_steps_done(root) + STEPS_BETWEEN
        url = urls[index]
        is_due = False

        def may_kill(url: str = url, wanted: int = wanted) -> bool:
            nonlocal is_due
            done = num_steps_done(root)
            is_due = done >= wanted and num_open(url) >= FEWEST_OPEN
            return is_due or done >= NUM_STEPS - LAST_STEPS

        wait_until(may_kill, what=f"kill {len(kills)}", run_root=root, process=process)
        if not is_due:
            break
        kill(root, f"rollout-{index}")
        kills.append(Kill(url=url, at_s=time.monotonic()))
        print(f"after step {num_steps_done(root)}", flush=True)
    return kills


def num_open(url: str) -> int:
    """Number of sessions that agents work on; 0 if the server does not respond."""
    with suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/sessions", timeout=5) as page:
        return int(json.load(page)["open"])
    return 0


def check_sessions(root: Path, agents: OutsideAgents, kills: list[Kill], *, over_s: float) -> None:
    """Each session that was claimed has one outcome, which is true, and each agent was told of the end."""
    events = agents.events
    claimed = {event["id"]: event for event in events if event["kind"] == "claimed"}
    outcomes = [event for event in events if event["kind"] in OUTCOMES]
    assert Counter(event["id"] for event in outcomes) == Counter(claimed.keys()), "each claim has one outcome"
    of_kind: dict[str, list[dict[str, Any]]] = {
        kind: [event for event in outcomes if event["kind"] == kind] for kind in OUTCOMES
    }
    assert not of_kind["hung"] and not of_kind["refused"], of_kind["hung"] + of_kind["refused"]
    for event in (*of_kind["over"], *of_kind["lost"]):
        assert LEADS_ON.search(event["message"]), event
    leases = {lease_of(event) for event in claimed.values()}
    made = set(recorded(root))
    assert made <= leases, made - leases
    num_remade = check_ended(root, [event for event in of_kind["ended"] if lease_of(event) not in made])
    assert num_remade <= 4 * len(kills), "what was ended was lost"
    num_named = check_mishaps(
        root, [event for kind in MISHAPS for event in of_kind[kind]], claimed, kills, over_s=over_s
    )
    assert num_named > 0
    assert audit_run(root).facts["committed_steps"] == NUM_STEPS
    num_ended = Counter(claimed[event["id"]]["api"] for event in of_kind["ended"])
    assert min(num_ended[api] for api in CONVERSATIONS) > 0, num_ended
    assert any(claimed[event["id"]]["is_group"] for event in of_kind["ended"]), "no group was made"
    assert any(event["kind"] == "call" for event in events), "no tool was called"
    assert of_kind["lost"] or of_kind["over"], "the kills have hit no session"
    ends = Counter(event["kind"] for event in events if event["kind"] in ("told", "gave up"))
    assert ends == {"told": NUM_AGENTS}, [event for event in events if event["kind"] == "gave up"]
    print(
        f"{len(kills)} kills", dict(num_ended), f"made again {num_remade}", f"named {num_named}", dict(ends)
    )


def check_mishaps(
    root: Path,
    left: list[dict[str, Any]],
    claimed: dict[str, dict[str, Any]],
    kills: list[Kill],
    *,
    over_s: float,
) -> int:
    """The servers have logged how each session failed that its agent has left, unless a server was killed, or
    the job was over, before it could notice. Returns how many were logged."""
    log = "".join(path.read_text() for path in sorted((root / "logs").glob("rollout-*.log*")))
    num_named = 0
    for event in left:
        id, at_s = event["id"], event["at_s"]
        limit_s = at_s + IDLE_TIMEOUT_S + SLACK_S
        is_named = f"session {id} had no request" in log or f"session {id}: its agent has ended it" in log
        is_killed = any(kill.url == claimed[id]["url"] and at_s < kill.at_s < limit_s for kill in kills)
        assert is_named or is_killed or over_s < limit_s, event
        num_named += is_named
    return num_named
