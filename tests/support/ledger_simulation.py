"""A simulated job around the pure ledger: servers, long-tailed response lengths, a trainer, a virtual clock.

A discrete-event simulation: `run` returns when the last step is committed, and raises when no event is left
(a deadlock).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from areal_like.config import BufferConfig, from_mapping
from areal_like.failures import FailureKind
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from areal_like.wire.messages.consumer import Group
from areal_like.wire.messages.producer import (
    Lease,
    Purpose,
    SampleDone,
    SampleFailed,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.records import Record
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.ledger.state import LedgerState
from buffer.settings import LedgerSettings
from buffer.storage.base import Store
from buffer.storage.memory import MemoryStore
from buffer.tickets import Verdict

_OF_BUFFER = {one.name for one in dataclasses.fields(BufferConfig)} - {"overdue"}


def trajectory(
    versions: list[int],
    *,
    reward: float = 0.0,
    finish: FinishReason = FinishReason.STOP,
    is_greedy: bool = False,
) -> Trajectory:
    """One prompt token and then one sampled token for each version given."""
    num_tokens = 1 + len(versions)
    return Trajectory(
        tokens=np.arange(num_tokens, dtype=np.int32),
        loss_mask=np.array([0] + [1] * len(versions), dtype=np.uint8),
        logprobs=np.full(num_tokens, -0.5, dtype=np.float32),
        versions=np.array([NOT_SAMPLED, *versions], dtype=np.int32),
        reward=reward,
        finish_reason=finish,
        is_greedy=is_greedy,
    )


def ledger_settings(**changes: Any) -> LedgerSettings:
    """Settings of a small job in memory, with these changes; `max_staleness` is the cap."""
    small: dict[str, Any] = {
        "staleness_cap": changes.pop("max_staleness", 1),
        "groups_per_step": 2,
        "group_size": 2,
        "num_steps": 4,
        "overdue": "wait",
        "durable": False,
        "max_tokens": sys.maxsize,
        "max_segment_tokens": sys.maxsize,
    }
    of_buffer = {name: value for name, value in changes.items() if name in _OF_BUFFER}
    small |= {name: value for name, value in changes.items() if name not in _OF_BUFFER}
    settings = LedgerSettings.from_config(from_mapping({}))
    return dataclasses.replace(settings, buffer=BufferConfig(**of_buffer), **small)


def empty_ledger(settings: LedgerSettings) -> Ledger:
    """A ledger in memory, without a trainer."""
    return Ledger(LedgerState(settings, MemoryStore()))


def new_ledger(*, store: Store | None = None, **settings: object) -> Ledger:
    """A ledger with a trainer (incarnation 1) at step 0 and 1,000 prompts."""
    ledger = recover(ledger_settings(**settings), store or MemoryStore(), now_s=0.0)
    ledger.state.prompts.set_num_train_prompts(1000)
    ledger.trainer.start_training(incarnation=1, step=0, stream={})
    return ledger


def heartbeat(
    *,
    free: int = 0,
    holding: int = 0,
    version: int = 0,
    leases: Iterable[int] = (),
    state: ServerState = ServerState.SERVING,
    **stats: float,
) -> ServerHeartbeat:
    """The heartbeat of a server: one that takes no samples, unless told otherwise."""
    return ServerHeartbeat(
        state=state,
        free_samples=free,
        holding_samples=holding,
        weights_version=version,
        leases=list(leases),
        stats=stats,
    )


def beat(
    ledger: Ledger,
    name: str,
    *,
    capacity: int,
    version: int = 0,
    now_s: float = 0.0,
    state: ServerState = ServerState.SERVING,
) -> None:
    """A heartbeat of a registered server that names all its leases."""
    server = ledger.servers[name]
    owed = server.owed_samples
    message = heartbeat(
        free=capacity - owed, holding=owed, version=version, leases=server.leases, state=state
    )
    ledger.dispatcher.heartbeat(name, message, now_s=now_s)


def add_server(
    ledger: Ledger, name: str, *, capacity: int, version: int = 0, now_s: float = 0.0, incarnation: int = 1
) -> None:
    """Registers a server and gives it credit."""
    ledger.dispatcher.register_server(name, incarnation=incarnation, weights_version=version, now_s=now_s)
    beat(ledger, name, capacity=capacity, version=version, now_s=now_s)


def done(
    lease: Lease,
    index: int,
    versions: list[int],
    *,
    reward: float = 0.0,
    failure: str = "",
    finish: FinishReason = FinishReason.STOP,
) -> SampleDone:
    """A finished sample of a lease."""
    is_greedy = index in lease.greedy_indices
    sample = trajectory(versions, reward=reward, is_greedy=is_greedy, finish=finish)
    record = Record.of(lease.ticket_id, index, sample)
    return SampleDone(lease_id=lease.lease_id, record=record, failure=failure)


def deliver(ledger: Ledger, name: str, sample: SampleDone) -> Verdict:
    """Delivers one sample in one message."""
    (verdict,) = ledger.intake.samples_done(name, [sample])
    return verdict


def failed(
    lease: Lease,
    index: int,
    error: str = "reward raised",
    *,
    kind: FailureKind = FailureKind.REWARD,
    num_tokens: int = 0,
) -> SampleFailed:
    """A failed sample of a lease."""
    return SampleFailed(
        lease_id=lease.lease_id,
        ticket_id=lease.ticket_id,
        sample_index=index,
        kind=kind,
        num_tokens=num_tokens,
        error=error,
    )


@dataclass
class SimulatedServer:
    """A server that decodes `max_running` samples at a time; the rest of its capacity waits."""

    name: str
    tokens_per_s: float
    max_running: int
    capacity: int
    version: int = 0
    alive: bool = True
    waiting: list[tuple[Lease, int]] = field(default_factory=list)
    running: int = 0


@dataclass
class SimulatedJob:
    """A trainer and servers that drive a ledger.

    `step_s`: the trainer's time for a step. `push_s`: mean time until a server has new weights.
    """

    ledger: Ledger
    servers: list[SimulatedServer]
    step_s: float = 1.0
    push_s: float = 0.2
    fail_probability: float = 0.0
    kill_at_s: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    now_s: float = 0.0
    groups: list[Group] = field(default_factory=list)
    """All groups that the trainer got, in order."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Schedules an event."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._ids), action))

    @property
    def order(self) -> list[tuple[int, int, int]]:
        """(step, position, ticket id) of each group that the trainer got."""
        return [(group.step, group.position, group.ticket_id) for group in self.groups]

    def run(self, *, limit_s: float = 10_000.0, num_steps: int | None = None) -> None:
        """Runs until all steps, or the first `num_steps`, are committed."""
        last_step = (num_steps or self.ledger.settings.num_steps) - 1
        for server in self.servers:
            add_server(self.ledger, server.name, capacity=server.capacity, now_s=0.0)
            self.at(0.5, lambda server=server: self._beat(server))  # type: ignore[misc]
        for name, kill_s in self.kill_at_s.items():
            self.at(kill_s, lambda name=name: self._kill(name))  # type: ignore[misc]
        self._start_step()
        self._grant()
        while self.ledger.state.steps.committed < last_step:
            self.now_s, _, action = heapq.heappop(self._events)
            assert self.now_s < limit_s, (
                f"stuck at step {self.ledger.state.steps.current}: {self.ledger.state.tickets.num_by_state()}"
            )
            action()
            assert not self.ledger.state.failure_reason, self.ledger.state.failure_reason
            self._grant()

    def _kill(self, name: str) -> None:
        next(server for server in self.servers if server.name == name).alive = False

    def _beat(self, server: SimulatedServer) -> None:
        if server.alive:
            beat(self.ledger, server.name, capacity=server.capacity, version=server.version, now_s=self.now_s)
            self.at(0.5, lambda: self._beat(server))
        self.ledger.dispatcher.expire(now_s=self.now_s)

    def _grant(self) -> None:
        by_name = {server.name: server for server in self.servers}
        for name, ids in self.ledger.state.leases.take_aborts().items():
            by_name[name].waiting = [
                (lease, index) for lease, index in by_name[name].waiting if lease.lease_id not in ids
            ]
        for name, leases in self.ledger.dispatcher.grant(now_s=self.now_s).items():
            for lease in leases:
                assert lease.purpose is Purpose.TRAIN
                by_name[name].waiting += [(lease, index) for index in lease.sample_indices]
            self._decode(by_name[name])

    def _decode(self, server: SimulatedServer) -> None:
        while server.waiting and server.running < server.max_running:
            lease, index = server.waiting.pop(0)
            server.running += 1
            num_tokens = min(400, int(self._rng.paretovariate(1.2) * 10))
            finish = functools.partial(self._finish, server, lease, index, server.version, num_tokens)
            self.at(num_tokens / server.tokens_per_s, finish)

    def _finish(
        self, server: SimulatedServer, lease: Lease, index: int, first_version: int, num_tokens: int
    ) -> None:
        if not server.alive:
            return
        server.running -= 1
        if self._rng.random() < self.fail_probability:
            self.ledger.intake.sample_failed(server.name, failed(lease, index))
        else:
            half = num_tokens // 2
            versions = [first_version] * (num_tokens - half) + [server.version] * half
            deliver(self.ledger, server.name, done(lease, index, versions, reward=self._rng.random()))
        self._decode(server)

    def _start_step(self) -> None:
        step, num_groups = self.ledger.state.steps.current, self.ledger.settings.groups_per_step
        groups = [self.ledger.trainer.fetch(step=step, position=position) for position in range(num_groups)]
        if any(group is None for group in groups):
            self.at(0.05, self._start_step)
        else:
            self.groups += [group for group in groups if group is not None]
            self.at(self.step_s, lambda: self._end_step(step))

    def _end_step(self, step: int) -> None:
        self.ledger.trainer.complete_step(incarnation=1, step=step)
        version = self.ledger.trainer.alloc_version(incarnation=1, step=step + 1)
        for server in self.servers:
            self.at(
                self.push_s * self._rng.uniform(0.5, 2.0), lambda server=server: self._push(server, version)
            )  # type: ignore[misc]
        self.ledger.trainer.commit(incarnation=1, step=step)
        if step + 1 < self.ledger.settings.num_steps:
            self._start_step()

    def _push(self, server: SimulatedServer, version: int) -> None:
        if server.alive and version > server.version:
            server.version = version
            beat(self.ledger, server.name, capacity=server.capacity, version=version, now_s=self.now_s)
