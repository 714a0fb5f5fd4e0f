"""This repository's buffer under load: the real daemon, the real messages, the whole lifecycle of a ticket.

Producers send hello and heartbeats, get leases, send samples and count acknowledgements. For each step the
consumer fetches the groups, completes the step and allocates a version; it commits every eighth step. Every
call that a run makes to the ledger is made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from areal_like.config import Config, SecurityConfig, from_mapping
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole
from areal_like.wire.channel import Link
from areal_like.wire.curve import CurveClient
from areal_like.wire.fingerprint import dataset_fingerprint
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, CompleteStep, Fetch, StartTraining
from areal_like.wire.messages.hello import Hello, Role
from areal_like.wire.messages.producer import (
    HeartbeatAck,
    Leases,
    SampleAcks,
    SampleDone,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.pump import set_io_threads
from areal_like.wire.records import Record
from benchmarks.report import ROOT
from benchmarks.stream_peers.load import Pacer, Plan, Served, Tally, trajectories

GROUP_SIZE = 8
GROUPS_PER_STEP = 64
MIN_STALENESS = 7
"""Smallest staleness bound, in steps. The producers change their version only every few steps."""
COMMIT_EVERY = 8
_BEAT_S = 0.05
_PACE_S = 0.002
_VERSIONS_PER_CHANGE = 4
"""Weight versions between two changes of the producers' samples. In a run the engine records versions; here
each change costs the producer CPU time."""


_MAX_TOKENS = 32_768
"""Largest sample that the buffer accepts."""


def groups_per_step(backlog: int) -> int:
    """GROUPS_PER_STEP, or fewer if the backlog would otherwise cover too few steps."""
    return min(GROUPS_PER_STEP, backlog // (GROUP_SIZE * (MIN_STALENESS + 1)))


def config_of(
    directory: Path, *, durability: str, backlog: int, io_threads: int = 1, keys: str = ""
) -> Config:
    """A job whose staleness bound is the backlog."""
    groups = groups_per_step(backlog)
    return from_mapping(
        {
            "name": "stream",
            "runs_dir": str(directory),
            "max_staleness": backlog // (GROUP_SIZE * groups) - 1,
            "sampling": {"group_size": GROUP_SIZE},
            "trainer": {
                "num_steps": 1_000_000_000,
                "groups_per_step": groups,
                "tokens_per_microbatch": _MAX_TOKENS,
            },
            "buffer": {"durability": durability},
            "daemon": {"io_threads": io_threads},
            "security": {"keys": keys},
        }
    )


@contextlib.contextmanager
def server(
    directory: Path, *, durability: str, backlog: int, io_threads: int = 1, keys: str = ""
) -> Iterator[Served]:
    """Runs the buffer daemon."""
    config = config_of(directory, durability=durability, backlog=backlog, io_threads=io_threads, keys=keys)
    paths = RunPaths.of(config)
    save_config(config, paths.config)
    endpoint = paths.endpoints / "buffer.json"
    process = subprocess.Popen([sys.executable, "-m", "buffer", "--config", str(paths.config)], cwd=ROOT)
    try:
        while not (endpoint.exists() and "stream" in (known := json.loads(endpoint.read_text()))):
            assert process.poll() is None, "the buffer did not start"
            time.sleep(0.05)
        yield Served(address=str(known["stream"]), pid=process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _link(plan: Plan, role: KeyRole, handler: Callable[[Any], None]) -> Link:
    curve = None
    if plan.keys:
        curve = CurveClient(Keyring.of(SecurityConfig(keys=plan.keys), role=role), role=KeyRole.BUFFER)
    return Link(plan.address, handler=handler, curve=curve)


def _hello(role: Role, name: str) -> Hello:
    return Hello(
        role=role,
        name=name,
        process=secrets.token_hex(16),
        job="stream",
        model="m",
        tokenizer="t",
        dataset=dataset_fingerprint(Config()),
        http_address="",
        num_train_prompts=1_000_000 if role is Role.ROLLOUT else 0,
    )


class _Producer:
    """One rollout server whose engine takes no time."""

    def __init__(self, plan: Plan, name: str, tally: Tally, pacer: Pacer) -> None:
        self._plan, self._name, self._tally, self._pacer = plan, name, tally, pacer
        self._link = _link(plan, KeyRole.ROLLOUT, self._on_message)
        self._work: deque[tuple[int, int, int]] = deque()
        self._sent_s: dict[tuple[int, int], float] = {}
        self._leases: dict[int, int] = {}
        self._version = 0
        self._samples = trajectories(plan.num_tokens)
        self._num_sent = 0

    async def run(self) -> None:
        await self._link.call(_hello(Role.ROLLOUT, self._name), timeout_s=20)
        due_s = 0.0
        while not self._tally.is_over:
            if time.monotonic() >= due_s:
                self._beat()
                due_s = time.monotonic() + _BEAT_S
            self.send()
            await asyncio.sleep(_BEAT_S)
        self._link.close()

    def _beat(self) -> None:
        holding = sum(self._leases.values())
        self._link.send(
            ServerHeartbeat(
                state=ServerState.SERVING,
                # Twice the window, so that leases are available when acknowledgements free the window.
                free_samples=max(0, 2 * self._plan.window - holding),
                holding_samples=holding,
                weights_version=self._version,
                leases=list(self._leases),
            )
        )

    def _on_message(self, message: Any) -> None:
        match message:
            case SampleAcks():
                for ack in message.acks:
                    assert not ack.refused, ack
                    for index in ack.sample_indices:
                        self._tally.acked(self._sent_s.pop((ack.lease_id, index)))
                    self._leases[ack.lease_id] -= len(ack.sample_indices)
                    if not self._leases[ack.lease_id]:
                        del self._leases[ack.lease_id]
                self.send()
            case Leases():
                for lease in message.leases:
                    self._leases[lease.lease_id] = len(lease.sample_indices)
                    self._work.extend(
                        (lease.lease_id, lease.ticket_id, index) for index in lease.sample_indices
                    )
                self.send()
            case HeartbeatAck() if message.newest_version >= self._version + _VERSIONS_PER_CHANGE:
                self._version = message.newest_version
                self._samples = trajectories(self._plan.num_tokens, count=4, version=self._version)
                self._beat()

    def send(self) -> None:
        """Sends all samples that fit into the window, batched."""
        finished = []
        while self._work and len(self._sent_s) < self._plan.window and self._pacer.may_send():
            lease_id, ticket_id, index = self._work.popleft()
            self._sent_s[lease_id, index] = time.monotonic()
            trajectory = self._samples[self._num_sent % len(self._samples)]
            finished.append(SampleDone(lease_id=lease_id, record=Record.of(ticket_id, index, trajectory)))
            self._num_sent += 1
            self._pacer.sent()
        for batch in Samples.batches(finished):
            self._link.send(batch)


async def _pace(producers: deque[_Producer], tally: Tally) -> None:
    """Calls `send` of every producer in turn, so that paced samples are sent when they are due."""
    while not tally.is_over:
        producers.rotate()
        for producer in producers:
            producer.send()
        await asyncio.sleep(_PACE_S)


async def _consume(plan: Plan, tally: Tally) -> None:
    link, groups = _link(plan, KeyRole.TRAINER, lambda _: None), groups_per_step(plan.backlog)

    async def fetched(step: int, position: int) -> None:
        group = await link.call(Fetch(step=step, position=position), timeout_s=60)
        tally.consumed(len(group.trajectories))

    def requested(step: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(fetched(step, position)) for position in range(groups)]

    await link.call(_hello(Role.TRAINER, "trainer-0"), timeout_s=20)
    await link.call(StartTraining(step=0), timeout_s=20)
    ahead, step = requested(0), 0
    while not tally.is_over:
        current, ahead = ahead, requested(step + 1)
        _, late = await asyncio.wait(current, timeout=max(0.0, plan.end_s - time.monotonic()))
        if late:
            break
        await link.call(CompleteStep(step=step), timeout_s=60)
        await link.call(AllocVersion(step=step + 1), timeout_s=60)
        if (step + 1) % COMMIT_EVERY == 0:
            await link.call(CommitStep(step=step, oldest_kept_step=step + 1), timeout_s=60)
        step += 1
    for task in (*current, *ahead):
        task.cancel()
    link.close()


async def main() -> None:
    """One process of the load."""
    plan = Plan.from_argv()
    set_io_threads(plan.io_threads)
    tally = Tally(plan=plan)
    if plan.role == "consumer":
        await _consume(plan, tally)
    else:
        pacer = Pacer(plan.rate_per_s)
        producers = deque(_Producer(plan, name, tally, pacer) for name in plan.names)
        running = [producer.run() for producer in producers]
        await asyncio.gather(*running, *([_pace(producers, tally)] if plan.rate_per_s else []))
    print(tally.dumps())


if __name__ == "__main__":
    asyncio.run(main())
