"""Real jobs whose samples are sessions: external agents, strikes at processes, the books at the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from areal_like.paths import RunPaths, read_endpoint
from areal_like.shards import Shard
from areal_like.trajectory import Trajectory
from areal_like.wire.records import RecordLocation, read_record
from launch.audit.run import audit_run
from tests.chaos.agents import Plan, dumps, events_of, kinds_of
from tests.chaos.test_environments import victims_of
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import (
    ROOT,
    finish,
    launcher,
    processes_of,
    wait_until,
)
from tests.support.ports import free_ports

IDLE_TIMEOUT_S = 3.0
SETTINGS = (
    "name=x",
    "model.renderer=tests.support.line_chat.LineChat",
    "sampling.group_size=4",
    "sampling.max_new_tokens=16",
    "rollout.max_context=256",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "rollout.generate_timeout_s=15",
    "episode.max_turns=4",
    f"sessions.idle_timeout_s={IDLE_TIMEOUT_S}",
    "trainer.groups_per_step=8",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=10",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    "weights.push_deadline_s=10",
    "buffer.lease_timeout_s=5",
    "buffer.retain_trajectories=true",
    "max_staleness=2",
)
PARTS = {"buffer": "--name buffer", "trainer": "-m trainer --config", "router": "-m rollout_server.router"}
"""Role -> a part of the command line, of those that victims_of does not know."""
CALM_S = 60.0
"""No daemon is killed three times within this time: the launcher would stop restarting it and end the job."""
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
STOPPED_S = 8.0
"""Longer than a lease and than the idle time of a session."""


class OutsideAgents:
    """Processes of external agents."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan
        self.urls = plan.urls
        self.processes: list[subprocess.Popen[bytes]] = []
        self.files: list[Path] = []

    def start(self) -> None:
        """One more process."""
        file = self._directory / f"agents-{len(self.files)}.jsonl"
        plan = Plan(**{**vars(self._plan), "seed": len(self.files)})
        command = [sys.executable, "-m", "tests.chaos.agents", dumps(plan), str(file)]
        self.processes.append(subprocess.Popen(command, cwd=ROOT))
        self.files.append(file)

    def replace_dead(self) -> None:
        """Starts one process for each that was killed."""
        for process in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
                self.processes.remove(process)
                self.start()

    def finish(self) -> list[int]:
        """Waits until they have ended by themselves; returns their exit codes."""
        wait_until(lambda: all(one.poll() is not None for one in self.processes), what="the agents' end")
        return [one.returncode for one in self.processes]

    def kill(self) -> None:
        """All of them."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()

    @property
    def events(self) -> list[dict[str, Any]]:
        return events_of(self.files)

    def num(self, kind: str) -> int:
        return kinds_of(self.events)[kind]


@contextlib.contextmanager
def outside_agents(directory: Path, plan: Plan, *, num_processes: int) -> Iterator[OutsideAgents]:
    """Running agents, killed at the end."""
    agents = OutsideAgents(directory, plan)
    try:
        for _ in range(num_processes):
            agents.start()
        yield agents
    finally:
        agents.kill()


def pids_of(root: Path, role: str) -> list[int]:
    """The job's processes of a role."""
    if role in PARTS:
        return [pid for pid, command in processes_of(root).items() if PARTS[role] in command]
    return victims_of(root)[role]


def end(process: subprocess.Popen[str], root: Path) -> None:
    """Drains the job. It ends in time and with exit code 0, and no process of it is left."""
    asked_s = time.monotonic()
    process.terminate()
    code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert time.monotonic() - asked_s < 30.0 + 10.0, "longer than daemon.drain_timeout_s"
    wait_until(lambda: not processes_of(root), what="the end of all processes", timeout_s=20)


def rows_of(root: Path, query: str) -> list[tuple[Any, ...]]:
    """What the ledgers of the job respond to a query."""
    found: list[tuple[Any, ...]] = []
    for directory in RunPaths(root).ledgers:
        file = f"file:{directory}/ledger.sqlite3?mode=ro"
        with contextlib.closing(sqlite3.connect(file, uri=True)) as ledger:
            found += ledger.execute(query)
    return found


def recorded(root: Path) -> dict[str, float]:
    """Rewards of the samples that did not fail, by the ids of their sessions."""
    rows = rows_of(root, "SELECT ticket_id, sample_index, lease_id, reward FROM samples WHERE failure = ''")
    return {f"{ticket}-{sample}-{lease}": reward for ticket, sample, lease, reward in rows}


def check_books(root: Path, agents: OutsideAgents) -> None:
    """No request has hung, the books are right, and each sample has the turns of its session."""
    events = agents.events
    kinds = kinds_of(events)
    assert kinds["ended"] and not kinds["hung"], kinds
    # 503: the session continues at another server. These agents do not ask again.
    failed = [event["message"] for event in events if 500 <= event.get("status", 0) != 503]
    assert all("the engine failed" in message for message in failed), failed
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    claims = Counter(event["id"] for event in events if event["kind"] == "claimed")
    assert max(claims.values()) == 1, "a session was given to two agents"
    ended = {lease_of(event): float(event["num_turns"]) for event in events if event["kind"] == "ended"}
    groups = {event["id"] for event in events if event["kind"] == "claimed" and event["is_group"]}
    lost = {sample_of(event["id"]) for event in events if event["kind"] == "lost" and event["id"] in groups}
    num_samples = check_rewards(root, ended, lost=lost)
    assert num_samples > 0.9 * len(ended), "sessions that were ended are no samples"
    print(dict(kinds), *audit.lines(), sep="\n")


def check_rewards(root: Path, ended: dict[str, float], *, lost: Collection[str] = ()) -> int:
    """Each sample has as many turns as its agent has counted. Returns the number of samples.

    `lost`: samples of groups whose server did not respond any more. Their agents have posted 0 for them when
    they rewarded and ended the group, in which another server may have continued them.
    """
    rewards = recorded(root)
    turns = {id: trajectory.num_turns for id, trajectory in trajectories_of(root)}
    for id, reward in rewards.items():
        if sample_of(id) in lost and reward == 0.0:
            continue
        # An agent that was killed after it had ended its session has not written so.
        assert reward == turns[id] == ended.get(id, reward), (id, reward, turns[id], ended.get(id))
    return len(rewards)


def check_ended(root: Path, unmade: list[dict[str, Any]]) -> int:
    """Of sessions that are no samples, because their servers died or the job was over: the sample was made in
    another session, or is not needed. Returns the former's number."""
    states = dict(rows_of(root, "SELECT ticket_id, state FROM tickets"))
    samples = set(rows_of(root, "SELECT ticket_id, sample_index FROM samples"))
    num_remade = 0
    for event in unmade:
        ticket, sample = map(int, event["id"].split("-")[:2])
        is_made = (ticket, sample) in samples
        assert is_made or states[ticket] in ("queued", "leased", "closed", "dropped"), (event, states[ticket])
        num_remade += is_made
    return num_remade


def lease_of(event: dict[str, Any]) -> str:
    """Ticket, sample and lease of a session, without the number of those that were abandoned before it."""
    return "-".join(event["id"].split("-")[:3])


def trajectories_of(root: Path) -> Iterator[tuple[str, Trajectory]]:
    """The accepted samples by the ids of their sessions, from the records on disk."""
    names = "ticket_id, sample_index, lease_id, segment, offset, num_bytes, crc32"
    num_ledgers = len(RunPaths(root).ledgers)
    for ticket, sample, lease, *place in rows_of(root, f"SELECT {names} FROM samples"):
        directory = root / Shard.of(ticket, count=num_ledgers).ledger
        record = read_record(directory, RecordLocation(*place), ticket_id=ticket, sample_index=sample)
        yield f"{ticket}-{sample}-{lease}", record.trajectory()


def sample_of(id: str) -> str:
    """Ticket and sample in a session's id, without the lease: a server that continues a session records it
    under its own."""
    return "-".join(id.split("-")[:2])


def kill(root: Path, name: str) -> Callable[[], bool]:
    """Kills a daemon; returns a function that says whether another process serves sessions in its place."""
    file = root / "endpoints" / f"{name}.json"
    killed = read_endpoint(file)
    assert killed is not None
    os.kill(int(killed["pid"]), signal.SIGKILL)
    print(f"killed {name}", flush=True)

    def is_back() -> bool:
        found = read_endpoint(file) or {}
        return "sessions" in found and found["pid"] != killed["pid"]

    return is_back


class Strikes:
    """Kills and stops processes of a job, and of its agents, at random."""

    def __init__(
        self, root: Path, agents: OutsideAgents | None, *, roles: tuple[str, ...], seed: int
    ) -> None:
        self._root = root
        self._agents = agents
        self._roles = roles
        self._rng = random.Random(seed)
        self.done: Counter[tuple[str, str]] = Counter()
        self._at_s: dict[str, list[float]] = {role: [] for role in roles}

    def one(self, role: str = "", number: signal.Signals | None = None) -> None:
        """One process of a role that may be struck now; what was stopped goes on after STOPPED_S."""
        now_s = time.monotonic()
        may = [
            one
            for one in self._roles
            if one in ("agents", "worker", "zygote")
            or sum(now_s - at_s < CALM_S for at_s in self._at_s[one]) < 2
        ]
        role, number = role or self._rng.choice(may), number or self._rng.choice(SIGNALS)
        if role == "agents":
            assert self._agents is not None
            pids = [process.pid for process in self._agents.processes]
        else:
            pids = pids_of(self._root, role)
        if not pids:
            return
        pid = self._rng.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self._at_s[role].append(now_s)
            self.done[role, number.name] += 1
            if number is signal.SIGSTOP and role not in ("worker", "zygote"):
                time.sleep(STOPPED_S)
                os.kill(pid, signal.SIGCONT)
            elif role == "agents" and self._agents is not None:
                self._agents.replace_dead()


@contextlib.contextmanager
def external_job(
    directory: Path,
    *settings: str,
    plan: dict[str, Any],
    num_processes: int = 2,
    num_servers: int = 2,
    num_routers: int = 0,
    calls_tools: bool = False,
) -> Iterator[tuple[subprocess.Popen[str], OutsideAgents, Path]]:
    """A job of external agents, with some of them; both run. `num_routers`: with any, the agents know only
    their addresses. `calls_tools`: its model has learned to."""
    port, root = free_ports(num=num_servers + num_routers)[0], directory / "runs" / "x"
    urls = [f"http://127.0.0.1:{port + index}" for index in range(num_servers + num_routers)]
    urls = urls[num_servers:] or urls
    config: tuple[str, ...] = ()
    if calls_tools:
        config = ("--config", str(ROOT / "configs" / "jobs" / "agents.yaml"))
        model = "model.renderer=rollout_server.rendering.tiny.TinyRenderer", "task.external=true"
    else:
        build_chat_model(directory / "model")
        model = f"model.path={directory}/model", "task={name: external}"
    job = (
        *config,
        *SETTINGS,
        *model,
        f"sessions.port={port}",
        f"rollout.num_servers={num_servers}",
        f"sessions.num_routers={num_routers}",
        f"sessions.router_port={port + num_servers}",
        *settings,
    )
    with (
        launcher(*job, cwd=directory) as process,
        outside_agents(directory, Plan(urls=urls, **plan), num_processes=num_processes) as agents,
    ):
        yield process, agents, root


def open_ids(agents: OutsideAgents) -> set[str]:
    """Sessions that agents work on."""
    last = {event["id"]: event["kind"] for event in agents.events if "id" in event}
    return {id for id, kind in last.items() if kind == "claimed"}


def num_open(agents: OutsideAgents) -> int:
    return len(open_ids(agents))
