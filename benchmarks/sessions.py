"""Measures the cost of the proxy: 256 sessions of slow external agents on one rollout server, with a trainer.

    python -m benchmarks.sessions [--seconds 60] [--agents 256] [--pause 2.5] [--apis chat,responses,messages]

A real job (launcher, buffer, trainer, one rollout server with the embedded engine, an untrained tiny model).
Its agents are two processes with 128 connections each (session_agents.py), which use one API: there is a job
for each of --apis. After a warm-up, over --seconds:

    idle though pending   the time in which at least one request to the model was pending, as its client saw
                          it (sent and without a response, the union over all agents), less that in which the
                          engine had a runnable sequence. Both are intervals between events, not samples; the
                          first contains the way from and to the client, so this is an upper bound.
    beyond the engine     the time of a turn at its client, of a single agent (`serial`)
    CPU                   of the rollout server's process (/proc/PID/task/*/schedstat), without the engine's

The same turns are then made by environments (a process each, which pauses as the agents do): the difference
of the server's CPU time per turn is the additional cost of the proxy. `serial` measures the turns of a single
agent of an otherwise idle server: the CPU time of each turn, and so its median.

`router` and `router_serial` are `sessions` and `serial` with agents that know only the address of a router,
with the CPU time of the router for each turn (between two turns of a single agent it reads the buffer's
status once a second, which the median leaves out).

At the end the job is drained and audited. Writes benchmarks/results/sessions.json, and sessions_router.json
with the parts through a router.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conversations import CONVERSATIONS, apis_of
from benchmarks.report import ROOT, table, write
from benchmarks.session_agents import Connection, Plan
from launch.audit.run import audit_run
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Example, Split, Task
from trainer.models.tiny import build_tiny_model, character_tokenizer

NUM_TURNS = 4
NUM_PROCESSES = 2
NUM_SERIAL = 300
IDLE_WINDOW_S = 5.0
WARM_UP_S = 20.0
START_LIMIT_S = 300.0
MAX_STALENESS = 4
SETTINGS = (
    "name=x",
    "model.renderer=tests.support.line_chat.LineChat",
    "sampling.group_size=8",
    "sampling.max_new_tokens=64",
    "rollout.max_context=512",
    "rollout.max_running=64",
    f"episode.max_turns={NUM_TURNS}",
    "trainer.groups_per_step=16",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=1000",
    "eval.num_prompts=0",
    f"max_staleness={MAX_STALENESS}",
)


class SlowTool(Environment):
    """Pauses after each turn, as the agents do."""

    def __init__(self, prompt: str, *, pause_s: float) -> None:
        self.prompt = prompt
        self.pause_s = pause_s

    async def reset(self) -> list[Message]:
        self.num_steps = 0
        return [{"role": "user", "content": self.prompt}]

    async def step(self, reply: Reply) -> Step:
        # Distributed like the agents' pauses, by the sample's seed.
        await asyncio.sleep(self.pause_s * (0.5 + (self.seed + 37 * self.num_steps) % 101 / 101))
        self.num_steps += 1
        message: Message = {"role": "user", "content": f"tool {self.num_steps - 1}"}
        return Step(messages=[message], reward=1.0, done=self.num_steps == NUM_TURNS)


@dataclass(frozen=True, kw_only=True)
class SlowToolTask(Task):
    """`SlowTool` environments."""

    pause_s: float = 2.5

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=str(index), answer=None)

    def environment(self, example: Example) -> Environment | None:
        return SlowTool(str(example.prompt), pause_s=self.pause_s)


def build_model(directory: Path) -> None:
    """An untrained model whose turns end at one in sixteen characters."""
    build_tiny_model(directory, seed=0, warm_start_steps=0, swap_prob=0.5)
    path = directory / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [2, *range(4, len(character_tokenizer()), 16)]}))


@dataclass(kw_only=True)
class Job:
    """A running job."""

    root: Path
    process: subprocess.Popen[bytes]
    clients: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        """The /status of the rollout server."""
        found: dict[str, Any] = json.loads(self._page("status"))
        return found

    def engine_idle_s(self) -> float:
        """Time in which the engine had no runnable sequence, up to now."""
        for line in self._page("metrics/engine").decode().splitlines():
            name, _, value = line.rpartition(" ")
            if not name.startswith("#") and "idle_seconds" in name:
                return float(value)
        raise RuntimeError("the engine's page has no idle_seconds")

    def sample(self) -> dict[str, float]:
        """The current counters."""
        pid = self.server_pid
        stats = self.status()["stats"]
        return {
            "at_s": time.monotonic(),
            "idle_s": self.engine_idle_s(),
            "server_cpu_s": cpu_s(pid),
            "engine_cpu_s": cpu_s(int(self.status()["engine_pid"])),
            "router_cpu_s": cpu_s(self.pid_of("router-0")) if self.has_router else 0.0,
            "rss_bytes": rss_bytes(pid),
            "samples_done": stats["samples_done"],
            "tokens": stats["tokens_generated"],
        }

    @property
    def server_pid(self) -> int:
        return self.pid_of("rollout-0")

    @property
    def has_router(self) -> bool:
        return (self.root / "endpoints" / "router-0.json").exists()

    def pid_of(self, name: str) -> int:
        """The process of a daemon."""
        return int(json.loads((self.root / "endpoints" / f"{name}.json").read_text())["pid"])

    def _page(self, name: str) -> bytes:
        endpoint = json.loads((self.root / "endpoints" / "rollout-0.json").read_text())
        with urllib.request.urlopen(f"http://{endpoint['http']}/{name}", timeout=30) as page:
            content: bytes = page.read()
            return content


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def rss_bytes(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def running_job(directory: Path, *settings: str, num_agents: int) -> Iterator[Job]:
    """A job that is ready to make samples; killed at the end if it still runs."""
    build_model(directory / "model")
    command = [sys.executable, "-m", "launch", "run", *SETTINGS, f"model.path={directory}/model", *settings]
    command += [f"runs_dir={directory}/runs", f"rollout.max_episodes={num_agents}"]
    with (directory / "out").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    job = Job(root=directory / "runs" / "x", process=process)
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if job.status()["state"] == "serving":
                    break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the job does not start:\n{(directory / 'out').read_text()[-2000:]}")
            time.sleep(0.2)
        yield job
    finally:
        for one in (*job.clients, process):
            if one.poll() is None:
                one.kill()
            one.wait()


def drained(job: Job) -> dict[str, Any]:
    """Ends the job; returns figures from its ledger."""
    job.process.send_signal(signal.SIGTERM)
    code = job.process.wait(timeout=90)
    audit = audit_run(job.root)
    with contextlib.closing(
        sqlite3.connect(f"file:{job.root}/ledger/ledger.sqlite3?mode=ro", uri=True)
    ) as db:
        (max_lag,) = db.execute(
            "SELECT max(step - oldest_step) FROM tickets JOIN samples USING (ticket_id) "
            "WHERE state = 'trained'"
        ).fetchone()
    return {
        "exit_code": code,
        "audit_is_clean": audit.is_clean,
        "max_trained_lag": max_lag,
        "bound": MAX_STALENESS,
        "tickets": audit.tickets,
        "drops": audit.drops,
        "failures": audit.failures,
    }


def measured_sessions(
    directory: Path,
    *,
    api: str,
    num_agents: int,
    pause_s: float,
    seconds: float,
    through_router: bool = False,
) -> dict[str, Any]:
    """Measures the external agents, with one API."""
    port = free_port()
    with running_job(directory, *address(port, through_router=through_router), num_agents=num_agents) as job:
        rss_before = job.sample()["rss_bytes"]
        files = [directory / f"agents-{index}.jsonl" for index in range(NUM_PROCESSES)]
        for index, file in enumerate(files):
            plan = Plan(
                url=f"http://127.0.0.1:{port}",
                num_agents=num_agents // NUM_PROCESSES,
                num_turns=NUM_TURNS,
                pause_s=pause_s,
                seed=index,
                api=api,
            )
            command = [sys.executable, "-m", "benchmarks.session_agents", plan.dumps(), str(file)]
            job.clients.append(subprocess.Popen(command, cwd=ROOT))
        time.sleep(WARM_UP_S)
        before = job.sample()
        time.sleep(seconds)
        after = job.sample()
        for client in job.clients:
            client.terminate()
        for client in job.clients:
            client.wait(timeout=60)
        ledger = drained(job)
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    window = (before["at_s"], after["at_s"])
    turns = [event for event in events if event["kind"] == "turn" and within(event, window)]
    sessions = [event for event in events if event["kind"] == "session" and within(event, window)]
    latencies_ms = [1e3 * (turn["ended_s"] - turn["begun_s"]) for turn in turns]
    pending_s = union_s([(e["begun_s"], e["ended_s"]) for e in events if e["kind"] == "turn"], window)
    elapsed_s = window[1] - window[0]
    active_s = elapsed_s - (after["idle_s"] - before["idle_s"])
    recorded = recorded_ids(job.root)
    ended = [event["id"] for event in events if event["kind"] == "session" and event["status"] == 200]
    return {
        **rates(before, after, num_turns=len(turns)),
        "sessions_per_s": round(len(sessions) / elapsed_s, 2),
        "statuses": sorted({event["status"] for event in events}),
        "turn_p50_ms": round(float(np.percentile(latencies_ms, 50)), 1),
        "turn_p99_ms": round(float(np.percentile(latencies_ms, 99)), 1),
        "pending_s": round(pending_s, 3),
        "engine_active_s": round(active_s, 3),
        "idle_though_pending_s": round(pending_s - active_s, 3),
        "idle_though_pending_share": round((pending_s - active_s) / elapsed_s, 4),
        "server_kb_per_open_session": round((after["rss_bytes"] - rss_before) / num_agents / 1024, 1),
        "sessions_ended": len(ended),
        "sessions_not_recorded": len(set(ended) - recorded),
        "ledger": ledger,
    }


def measured_environments(
    directory: Path, *, num_agents: int, pause_s: float, seconds: float
) -> dict[str, Any]:
    """Measures the same turns without the proxy."""
    task = f"task={{_target_: benchmarks.sessions.SlowToolTask, pause_s: {pause_s}, max_prompt_tokens: 64}}"
    with running_job(directory, task, "episode.step_timeout_s=60", num_agents=num_agents) as job:
        time.sleep(WARM_UP_S)
        before = job.sample()
        time.sleep(seconds)
        after = job.sample()
        ledger = drained(job)
    num_turns = NUM_TURNS * round(after["samples_done"] - before["samples_done"])
    return {**rates(before, after, num_turns=num_turns), "ledger": ledger}


def address(port: int, *, through_router: bool) -> list[str]:
    """Settings with which agents find sessions at this port."""
    if through_router:
        return ["task={name: external}", "sessions.num_routers=1", f"sessions.router_port={port}"]
    return ["task={name: external}", f"sessions.port={port}"]


def measured_serial(
    directory: Path, *, api: str, num_turns: int, through_router: bool = False
) -> dict[str, Any]:
    """Measures one agent alone: the CPU time of the server for each turn, and of the router if there is
    one."""
    port = free_port()
    settings = address(port, through_router=through_router)
    of_router: dict[str, float] = {}
    with running_job(directory, *settings, num_agents=256) as job:
        pids = [job.server_pid, *([job.pid_of("router-0")] if through_router else [])]
        begun_s = [cpu_s(pid) for pid in pids]
        time.sleep(IDLE_WINDOW_S)
        idle_ms_per_s, *idle_of_router = [
            1e3 * (cpu_s(pid) - begun) / IDLE_WINDOW_S for pid, begun in zip(pids, begun_s, strict=True)
        ]
        used_ms, took_ms = asyncio.run(serial_turns(port, api=api, pid=pids[0], num_turns=num_turns))
        for idle_ms in idle_of_router:
            through_ms, _ = asyncio.run(serial_turns(port, api=api, pid=pids[1], num_turns=num_turns))
            of_router = {
                "router_cpu_ms_per_idle_s": round(idle_ms, 1),
                "router_cpu_p10_ms": round(float(np.percentile(through_ms, 10)), 2),
                "router_cpu_p50_ms": round(statistics.median(through_ms), 2),
                "router_cpu_p90_ms": round(float(np.percentile(through_ms, 90)), 2),
            }
        ledger = drained(job)
    return {
        **of_router,
        "turns": len(used_ms),
        "server_cpu_ms_per_idle_s": round(idle_ms_per_s, 1),
        "server_cpu_p10_ms": round(float(np.percentile(used_ms, 10)), 2),
        "server_cpu_p50_ms": round(statistics.median(used_ms), 2),
        "server_cpu_p90_ms": round(float(np.percentile(used_ms, 90)), 2),
        "turn_p50_ms": round(statistics.median(took_ms), 2),
        "audit_is_clean": ledger["audit_is_clean"],
    }


async def serial_turns(port: int, *, api: str, pid: int, num_turns: int) -> tuple[list[float], list[float]]:
    """CPU time of the server and latency of each turn, in milliseconds."""
    connection = Connection("127.0.0.1", port)
    used_ms: list[float] = []
    took_ms: list[float] = []
    while len(used_ms) < num_turns:
        status, session = await connection.post("/sessions", {"wait_s": 20.0})
        assert status == 200, session
        path, key = f"/sessions/{session['id']}/v1", session["api_key"]
        conversation = CONVERSATIONS[api](str(session["example"]["index"]))
        for turn in range(NUM_TURNS):
            await asyncio.sleep(0.02)  # the remaining work of the previous turn is done
            begun_s, begun_cpu_s = time.monotonic(), cpu_s(pid)
            body = conversation.body()
            status, answer = await connection.post(f"{path}/{conversation.route}", body, api_key=key)
            took_ms.append(1e3 * (time.monotonic() - begun_s))
            await asyncio.sleep(0.01)
            used_ms.append(1e3 * (cpu_s(pid) - begun_cpu_s))
            assert status == 200, answer
            conversation.take(answer)
            conversation.say(f"tool {turn}")
        await connection.post(f"{path}/reward", {"reward": 1.0}, api_key=key)
        await connection.post(f"{path}/end", {}, api_key=key)
    connection.close()
    return used_ms, took_ms


def rates(before: dict[str, float], after: dict[str, float], *, num_turns: int) -> dict[str, Any]:
    """The number of turns, and the CPU time of each."""
    elapsed_s = after["at_s"] - before["at_s"]
    return {
        "seconds": round(elapsed_s, 1),
        "turns": num_turns,
        "turns_per_s": round(num_turns / elapsed_s, 1),
        "tokens_per_turn": round((after["tokens"] - before["tokens"]) / num_turns, 1),
        "server_cpu_ms_per_turn": round(
            1e3 * (after["server_cpu_s"] - before["server_cpu_s"]) / num_turns, 2
        ),
        "engine_cpu_ms_per_turn": round(
            1e3 * (after["engine_cpu_s"] - before["engine_cpu_s"]) / num_turns, 2
        ),
        "router_cpu_ms_per_turn": round(
            1e3 * (after["router_cpu_s"] - before["router_cpu_s"]) / num_turns, 2
        ),
    }


def within(event: dict[str, Any], window: tuple[float, float]) -> bool:
    """True if it ended within the window."""
    return window[0] <= float(event["ended_s"]) < window[1]


def union_s(spans: list[tuple[float, float]], window: tuple[float, float]) -> float:
    """Time within the window that at least one of the spans covers."""
    total_s, end_s = 0.0, window[0]
    for begun_s, ended_s in sorted(spans):
        begun_s, ended_s = max(begun_s, end_s), min(ended_s, window[1])
        if ended_s > begun_s:
            total_s += ended_s - begun_s
            end_s = ended_s
    return total_s


def recorded_ids(root: Path) -> set[str]:
    """Sessions whose samples are in the ledger."""
    with contextlib.closing(
        sqlite3.connect(f"file:{root}/ledger/ledger.sqlite3?mode=ro", uri=True)
    ) as ledger:
        rows = ledger.execute("SELECT ticket_id, sample_index, lease_id FROM samples")
        return {f"{ticket}-{sample}-{lease}" for ticket, sample, lease in rows}


def free_port() -> int:
    """A port on which no process listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> None:
    """Measures sessions and one agent alone, with each API, and environments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--agents", type=int, default=256)
    parser.add_argument("--pause", type=float, default=2.5)
    parser.add_argument("--turns", type=int, default=NUM_SERIAL, help="of a single agent")
    parser.add_argument("--only", default="sessions,environments,serial,router,router_serial")
    parser.add_argument("--apis", type=apis_of, default=list(CONVERSATIONS), help="chat,responses,messages")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"load_before": load, "was_quiet": load < 0.5, **vars(args)}
    of_router = dict(result)
    asked = {"num_agents": args.agents, "pause_s": args.pause, "seconds": args.seconds}
    for name in args.only.split(","):
        for api in args.apis if name != "environments" else [""]:
            with tempfile.TemporaryDirectory() as scratch:
                through_router = name.startswith("router")
                if name.endswith("serial"):
                    measured = measured_serial(
                        Path(scratch), api=api, num_turns=args.turns, through_router=through_router
                    )
                elif name == "environments":
                    measured = measured_environments(Path(scratch), **asked)
                else:
                    measured = measured_sessions(
                        Path(scratch), api=api, through_router=through_router, **asked
                    )
            print(name, api, json.dumps(measured), flush=True)
            if through_router:
                of_router.setdefault(name, {})[api] = measured
            elif api:
                result.setdefault(name, {})[api] = measured
            else:
                result[name] = measured
    if any(not name.startswith("router") for name in args.only.split(",")):
        write("sessions", result)
        print(costs(result), serial_costs(result), sep="\n\n")
    if "router" in args.only:
        write("sessions_router", of_router)
        print(router_costs(of_router))


def costs(result: dict[str, Any]) -> str:
    """A row for the sessions of each API, and one for the environments."""
    rows = [(f"sessions, {CONVERSATIONS[api].title}", one) for api, one in result.get("sessions", {}).items()]
    if "environments" in result:
        rows.append(("environments", result["environments"]))
    keys = (
        "turns_per_s", "tokens_per_turn", "server_cpu_ms_per_turn", "engine_cpu_ms_per_turn", "turn_p50_ms",
        "turn_p99_ms", "idle_though_pending_share",
    )  # fmt: skip
    return table(
        ["turns made by", *keys], [[name, *(one.get(key, "") for key in keys)] for name, one in rows]
    )


def router_costs(result: dict[str, Any]) -> str:
    """A row for each API: the CPU time that a router adds to a turn, with many agents and with one."""
    many, one = result.get("router", {}), result.get("router_serial", {})
    keys = ("router_cpu_ms_per_turn", "server_cpu_ms_per_turn", "turn_p50_ms", "turn_p99_ms")
    of_one = (
        "router_cpu_p10_ms", "router_cpu_p50_ms", "server_cpu_p10_ms", "server_cpu_p50_ms", "turn_p50_ms"
    )  # fmt: skip
    rows = [
        [
            CONVERSATIONS[api].title,
            *(many.get(api, {}).get(key, "") for key in keys),
            *(one.get(api, {}).get(key, "") for key in of_one),
        ]
        for api in {**many, **one}
    ]
    return table(["through the router", *keys, *(f"alone: {key}" for key in of_one)], rows)


def serial_costs(result: dict[str, Any]) -> str:
    """A row for a single agent of each API."""
    keys = ("server_cpu_p50_ms", "server_cpu_p90_ms", "turn_p50_ms")
    rows = result.get("serial", {}).items()
    return table(
        ["a single agent", *keys],
        [[CONVERSATIONS[api].title, *(one[key] for key in keys)] for api, one in rows],
    )


if __name__ == "__main__":
    main()
