"""Real jobs whose samples are sessions, while agents and every process of the job are killed and stopped.

Agents from outside (agents.py) post the number of their turns as the reward, so the ledger itself shows
whether a sample has the turns that its agent saw: no more, where a request was sent again, and no fewer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.audit.run import audit_run
from tests.chaos.agents import Plan, dumps, events_of, kinds_of
from tests.chaos.test_environments import victims_of
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import (
    ROOT,
    finish,
    launcher,
    launcher_log,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

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
PARTS = {"buffer": "--name buffer", "trainer": "-m trainer --config"}
"""Role -> a part of the command line, of those that victims_of does not know."""
CALM_S = 60.0
"""No daemon is killed three times within this time: the launcher would stop restarting it and end the job."""
STOPPED_S = 8.0
"""Longer than a lease and than the idle time of a session."""


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
            return int(first)


class OutsideAgents:
    """Processes of agents from outside."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan
        self.processes: list[subprocess.Popen[bytes]] = []
        self.files: list[Path] = []

    def start(self) -> None:
        """One more process."""
        file = self._directory / f"agents-{len(self.files)}.jsonl"
        plan = Plan(**{**vars(self._plan), "seed": len(self.files)})
        command = [sys.executable, "-m", "tests.chaos.agents", dumps(plan), str(file)]
        self.processes.append(subprocess.Popen(command, cwd=ROOT))
        self.files.append(file)

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


def recorded(root: Path) -> dict[str, float]:
    """Rewards of the accepted samples, by the ids of their sessions."""
    with contextlib.closing(
        sqlite3.connect(f"file:{root}/ledger/ledger.sqlite3?mode=ro", uri=True)
    ) as ledger:
        rows = ledger.execute("SELECT ticket_id, sample_index, lease_id, reward FROM samples")
        return {f"{ticket}-{sample}-{lease}": reward for ticket, sample, lease, reward in rows}
