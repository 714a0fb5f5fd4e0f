"""Rules by which a simulated job starts samples and trains on them: the ledger, and two baselines."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from areal_like.config import from_mapping
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from areal_like.wire.messages.producer import SampleDone, ServerHeartbeat, ServerState
from areal_like.wire.records import Record
from benchmarks.simulation_world import Job, Sample, Server, Simulation
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.memory import MemoryStore

_COMMIT_EVERY = 8
_BEATS_A_LEASE = 3
_FORGET_EVERY = 100
"""Steps after which the cached records are made anew."""


class LedgerRule(Simulation):
    """The buffer's ledger, with its leases, admission, order of steps and removal of lost servers."""

    title = "wait"
    overdue = "wait"
    """`buffer.overdue`"""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.cpu_s = 0.0
        """CPU time inside the ledger."""
        settings = LedgerSettings.from_config(from_mapping({}))
        self._lease_timeout_s = settings.buffer.lease_timeout_s
        self._ledger = recover(
            dataclasses.replace(
                settings,
                staleness_cap=job.max_staleness,
                overdue=self.overdue,
                close_after=job.close_after,
                groups_per_step=job.groups_per_step,
                group_size=job.group_size,
                num_steps=10**9,
                durable=False,
                max_tokens=sys.maxsize,
                max_segment_tokens=sys.maxsize,
            ),
            MemoryStore(),
            now_s=0.0,
        )
        self._ledger.state.prompts.set_num_train_prompts(10**9)
        self._ledger.trainer.start_training(incarnation=1, step=0, stream={})
        self._by_name = {server.name: server for server in self.servers}
        self._done: dict[str, list[SampleDone]] = {}
        self._samples: dict[tuple[int, int], Sample] = {}
        """Complete samples that are not trained on yet, by ticket and index."""
        self._next = 0
        self._ready: list[Sample] = []
        self._version = self._ledger.trainer.alloc_version(incarnation=1, step=0)
        self._versions = {0: self._version}
        """Step -> version of its weights."""
        self._records: dict[tuple[int, ...], Record] = {}
        """Versions that sampled a token -> a record with one token of each."""
        for server in self.servers:
            self._register(server)
            self.at(self._random.uniform(0, self._beat_s), self._beat_again, server)

    @property
    def num_tickets(self) -> int:
        """Tickets that were issued."""
        return self._ledger.state.tickets.num_issued

    @property
    def _beat_s(self) -> float:
        return self._lease_timeout_s / _BEATS_A_LEASE

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started_s = time.process_time()
        yield
        self.cpu_s += time.process_time() - started_s

    def _register(self, server: Server) -> None:
        with self._timed():
            version = self._versions[server.weights_step]
            self._ledger.dispatcher.register_server(
                server.name, incarnation=server.life, weights_version=version, now_s=self.now_s
            )
        self._beat(server)

    def _beat(self, server: Server) -> None:
        known = self._ledger.servers[server.name]
        held = known.owed_samples
        beat = ServerHeartbeat(
            state=ServerState.SERVING,
            free_samples=self.job.slots + self.job.queue - held,
            holding_samples=held,
            weights_version=self._versions[server.weights_step],
            leases=list(known.leases),
        )
        with self._timed():
            self._ledger.dispatcher.heartbeat(server.name, beat, now_s=self.now_s)

    def _beat_again(self, server: Server) -> None:
        if server.is_up:
            self._beat(server)
        self.at(self._beat_s, self._beat_again, server)

    def dispatch(self) -> Iterable[tuple[Server, Any]]:
        """The samples that the ledger leases."""
        with self._timed():
            verdicts = [
                (one.record, verdict)
                for name, done in self._done.items()
                for one, verdict in zip(done, self._ledger.intake.samples_done(name, done), strict=True)
            ]
            self._done.clear()
            self._ledger.dispatcher.expire(now_s=self.now_s)
            aborts = self._ledger.state.leases.take_aborts()
            granted = self._ledger.dispatcher.grant(now_s=self.now_s)
        assert self.overdue == "drop" or not aborts, "a lease of a living server was lost"
        for record, verdict in verdicts:
            if verdict.refusal:
                assert self.overdue == "drop", verdict
                self.drop(self._samples.pop((record.ticket_id, record.sample_index)))
        for name, lease_ids in aborts.items():
            self.abort(self._by_name[name], _is_of(frozenset(lease_ids)))
        for name, leases in granted.items():
            for lease in leases:
                for index in lease.sample_indices:
                    yield self._by_name[name], (lease, index)

    def ended(self, server: Server, sample: Sample) -> None:
        """Keeps the sample for the ledger until the next turn."""
        lease, index = sample.work
        versions = tuple(self._versions[step] for step, _ in sample.runs)
        if versions not in self._records:
            self._records[versions] = _record(versions)
        record = dataclasses.replace(self._records[versions], ticket_id=lease.ticket_id, sample_index=index)
        self._done.setdefault(server.name, []).append(SampleDone(lease_id=lease.lease_id, record=record))
        self._samples[lease.ticket_id, index] = sample

    def lost(self, server: Server, work: list[Any]) -> None:
        """Does nothing: the ledger detects a lost server when its leases expire."""
        for done in self._done.pop(server.name, []):
            self.lost_s += self._samples.pop((done.record.ticket_id, done.record.sample_index)).seconds

    def returned(self, server: Server) -> None:
        """Registers the server's new process."""
        self._register(server)

    def pushed(self, server: Server) -> None:
        """Reports the new weights with a heartbeat."""
        self._beat(server)

    def take(self) -> list[Sample] | None:
        """The samples of the step, in the order of their positions."""
        while self._next < self.job.groups_per_step:
            with self._timed():
                group = self._ledger.trainer.fetch(step=self.step, position=self._next)
            if group is None:
                return None
            self._next += 1
            self._ready += [
                self._samples.pop((record.ticket_id, record.sample_index)) for record in group.records
            ]
        samples, self._ready, self._next = self._ready, [], 0
        return samples

    def trained(self) -> None:
        """Completes the step, and commits it at intervals."""
        with self._timed():
            self._ledger.trainer.complete_step(incarnation=1, step=self.step - 1)
            self._version = self._ledger.trainer.alloc_version(incarnation=1, step=self.step)
            if self.step % _COMMIT_EVERY == 0:
                self._ledger.trainer.commit(incarnation=1, step=self.step - 1)
        self._versions[self.step] = self._version
        self._versions.pop(self.step - 1000, None)
        if self.step % _FORGET_EVERY == 0:
            self._records.clear()
        if self.overdue != "wait":
            self._drop_the_dropped()

    def _drop_the_dropped(self) -> None:
        """Counts the samples that the ledger has dropped."""
        live = self._ledger.state.tickets.live
        placed = {part for ticket in live.values() for part in ticket.parts}
        for ticket_id, index in self._samples.keys() - placed:
            ticket = live.get(ticket_id)
            if ticket is None or index in ticket.failed:
                self.drop(self._samples.pop((ticket_id, index)))

    def results(self) -> dict[str, Any]:
        """The results, with the ledger's own counts."""
        drops = {reason.value: count for reason, count in self._ledger.state.drops.items() if count}
        return super().results() | {
            "tickets": self.num_tickets,
            "drops": drops,
            "cpu_us_a_ticket": round(1e6 * self.cpu_s / self.num_tickets, 1),
        }


def _is_of(lease_ids: frozenset[int]) -> Callable[[Any], bool]:
    return lambda work: work[0].lease_id in lease_ids


class LedgerDropRule(LedgerRule):
    """The ledger, which drops groups that become too old."""

    title = "drop"
    overdue = "drop"


class LedgerCloseRule(LedgerRule):
    """The ledger, which closes groups; the bound holds for each token."""

    title = "close"
    overdue = "close"
    masks = True


def _record(versions: tuple[int, ...]) -> Record:
    """The record of a sample of one token of each version; the ledger only reads its metadata."""
    num = len(versions)
    trajectory = Trajectory(
        tokens=np.ones(1 + num, dtype=np.int32),
        loss_mask=np.array([0] + [1] * num, dtype=np.uint8),
        logprobs=np.array([0.0] + [-0.5] * num, dtype=np.float32),
        versions=np.array([NOT_SAMPLED, *versions], dtype=np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )
    return Record.of(0, 0, trajectory)


@dataclass(kw_only=True)
class _Group:
    number: int
    missing: int
    samples: list[Sample] = field(default_factory=list)
    """Complete samples."""

    @property
    def oldest(self) -> int:
        return min(sample.weights_step for sample in self.samples)


class _Central(Simulation):
    """A controller that hands out samples of whole groups, and restarts a lost sample."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._num_begun = 0
        self._queue: deque[_Group] = deque()
        """One group for each sample that waits for a slot."""
        self._complete: list[_Group] = []
        self._with_room = deque(self.servers)

    def may_begin(self) -> bool:
        """True if one more group may start."""
        raise NotImplementedError

    def dispatch(self) -> Iterable[tuple[Server, Any]]:
        """Fills servers in turn."""
        for _ in range(len(self._with_room)):
            server = self._with_room[0]
            self._with_room.rotate(-1)
            for _ in range(server.free if server.is_up else 0):
                if not self._queue:
                    if not self.may_begin():
                        return
                    self._num_begun += 1
                    group = _Group(number=self._num_begun, missing=self.job.group_size)
                    self._queue.extend([group] * self.job.group_size)
                yield server, self._queue.popleft()

    def ended(self, server: Server, sample: Sample) -> None:
        """Adds the sample to its group, which may complete it."""
        group = sample.work
        group.samples.append(sample)
        group.missing -= 1
        if not group.missing:
            self._complete.append(group)

    def lost(self, server: Server, work: list[Any]) -> None:
        """Restarts the samples elsewhere."""
        self._queue.extendleft(work)


class GateRule(_Central):
    """AReaL's gate (arXiv 2505.24298): (groups begun - 1) // batch <= version + max_staleness.

    The oldest complete groups are trained on first, regardless of their age."""

    title = "a gate at the begin"

    def may_begin(self) -> bool:
        """Decides by the number of groups that have started."""
        return self._num_begun // self.job.groups_per_step <= self.step + self.job.max_staleness

    def take(self) -> list[Sample] | None:
        """Takes the oldest groups."""
        if len(self._complete) < self.job.groups_per_step:
            return None
        self._complete.sort(key=lambda group: group.number)
        taken = self._complete[: self.job.groups_per_step]
        del self._complete[: self.job.groups_per_step]
        return [sample for group in taken for sample in group.samples]


class DropRule(_Central):
    """Every slot is always filled; groups that are too old when they would be trained on are dropped."""

    title = "drop at the end"

    def may_begin(self) -> bool:
        """Always true."""
        return True

    def take(self) -> list[Sample] | None:
        """Takes the groups in the order in which they were completed, without those that are too old."""
        kept = []
        for group in self._complete:
            if self.step - group.oldest <= self.job.max_staleness:
                kept.append(group)
            else:
                for sample in group.samples:
                    self.drop(sample)
        self._complete = kept
        if len(kept) < self.job.groups_per_step:
            return None
        taken, self._complete = kept[: self.job.groups_per_step], kept[self.job.groups_per_step :]
        return [sample for group in taken for sample in group.samples]


RULES = (LedgerRule, GateRule, DropRule)
CLOSE_RULES = (LedgerRule, GateRule, LedgerDropRule, LedgerCloseRule)
