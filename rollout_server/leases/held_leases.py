"""The leases that a rollout server holds, with their missing samples and unacknowledged results.

    sample:  missing -> finish() -> unacknowledged -> acknowledge() -> removed
                                    `-> to_resend()
             while missing: ENGINE -> moved() -> TOOL -> ENGINE ... -> REWARD
    lease:   grant() -> renewed by each heartbeat while a sample is missing or unacknowledged -> removed
             drop() at any moment: aborted by the buffer, or given back to it

Pure: no sockets, no tasks, no clock. The buffer owns the tickets; losing this state loses work, but not
correctness.

Two limits determine the credit for new samples. At most `engine_samples` may be at the engine or wait for it,
so that the engine has work but no long queue. At most `max_episodes` may be held in all, including those that
wait for a tool or a reward. So slow tools and rewards take no slots from the engine until `max_episodes` is
reached. A sample that comes back from a tool to a full engine waits there.

A result that was not acknowledged is sent again, but not while it may still be on its way: results with
routes have many megabytes. Its wait grows with the bytes that were unacknowledged when it was sent
(`_SLOW_BYTES_PER_S`), doubles with each repetition, and is at most _LONGEST_WAIT_S. A connection keeps the
order of messages, so a result is lost, and waits no longer than the shortest time, once the buffer has
acknowledged one that was sent after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.wire.messages.producer import Lease, SampleAck, SampleDone, SampleFailed

SampleResult = SampleDone | SampleFailed
"""Result message of a leased sample. The buffer retries a failed sample (`buffer.max_sample_retries`)."""


_SLOW_BYTES_PER_S = 1 << 20
"""Slowest connection on which a result is not sent again while it is on its way."""
_LONGEST_WAIT_S = 120.0
"""Longest wait for an acknowledgement."""


class Place(StrEnum):
    """Where a missing sample is."""

    ENGINE = "engine"
    """Waits for its prompt or for the engine, or is being sampled."""
    TOOL = "tool"
    """Waits for its environment, and will come back to the engine."""
    REWARD = "reward"
    """Waits for its reward, or for its teacher, after which it is finished."""


@dataclass(kw_only=True, slots=True)
class _Sent:
    """A result that is not acknowledged."""

    result: SampleResult
    first_sent_s: float
    """When it was first sent on the present connection."""
    sent_s: float
    """When it was last sent."""
    in_flight_bytes: int
    """Bytes of all unacknowledged results then, including its own."""
    num_repeats: int = 0

    def wait_s(self, shortest_s: float) -> float:
        """Seconds for an acknowledgement, unless a result that was sent later has one."""
        doubled_s = shortest_s * 2.0 ** min(self.num_repeats, 10)
        longest_s = max(shortest_s, _LONGEST_WAIT_S)
        return min(doubled_s + self.in_flight_bytes / _SLOW_BYTES_PER_S, longest_s)


@dataclass(kw_only=True, slots=True)
class _HeldLease:
    missing: dict[int, Place]
    unacknowledged: dict[int, _Sent] = field(default_factory=dict)
    """By sample index."""


class HeldLeases:
    """The table of held leases, and the credit for new ones. `now_s`: seconds on any monotonic clock."""

    def __init__(self, *, engine_samples: int, max_episodes: int) -> None:
        """`engine_samples`: maximum number of missing samples at the engine or waiting for it;
        `max_episodes`: maximum number of missing samples. At either limit the credit is 0."""
        self.engine_samples = engine_samples
        self.max_episodes = max_episodes
        self._held: dict[int, _HeldLease] = {}
        self.num_at: Counter[Place] = Counter()
        """Number of missing samples of held leases, by place."""
        self.holding_samples = 0
        """Number of missing samples of held leases."""
        self._in_flight_bytes = 0
        """Bytes of unacknowledged results."""
        self._answered_s = -math.inf
        """Newest `first_sent_s` of an acknowledged result."""

    @property
    def free_samples(self) -> int:
        """Credit: number of samples that the server can take in addition to those it holds.

        Negative if samples came back from tools to a full engine: new ones are granted only after that many
        have ended.
        """
        return min(self.engine_samples - self.num_at[Place.ENGINE], self.max_episodes - self.holding_samples)

    @property
    def capacity_samples(self) -> int:
        """Number of samples held if all credit is used. The buffer uses this number between two heartbeats; a
        sample that leaves the engine raises it by one, and its result lowers it again."""
        return self.free_samples + self.holding_samples

    @property
    def lease_ids(self) -> list[int]:
        """Leases to renew."""
        return list(self._held)

    @property
    def num_unacknowledged(self) -> int:
        """Number of results that the buffer has not confirmed."""
        return sum(len(held.unacknowledged) for held in self._held.values())

    def grant(self, lease: Lease) -> bool:
        """Adds a lease; False if it is empty or held already."""
        if lease.lease_id in self._held or not lease.sample_indices:
            return False
        self._held[lease.lease_id] = held = _HeldLease(
            missing=dict.fromkeys(lease.sample_indices, Place.ENGINE)
        )
        self.num_at[Place.ENGINE] += len(held.missing)
        self.holding_samples += len(held.missing)
        return True

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        """Records a sample's new place. Ignored if its lease was dropped or the sample is not missing."""
        held = self._held.get(lease_id)
        if held is not None and sample_index in held.missing:
            self.num_at[held.missing[sample_index]] -= 1
            self.num_at[place] += 1
            held.missing[sample_index] = place

    def finish(self, result: SampleResult, *, now_s: float) -> bool:
        """Records the result of a missing sample; the caller then sends it.

        The result is kept until it is acknowledged. Returns False if the lease was dropped or the sample is
        not missing: do not send the result.
        """
        held = self._held.get(result.lease_id)
        if held is None or result.sample_index not in held.missing:
            return False
        self.num_at[held.missing.pop(result.sample_index)] -= 1
        self.holding_samples -= 1
        self._in_flight_bytes += _size(result)
        held.unacknowledged[result.sample_index] = _Sent(
            result=result, first_sent_s=now_s, sent_s=now_s, in_flight_bytes=self._in_flight_bytes
        )
        return True

    def acknowledge(self, ack: SampleAck) -> None:
        """Removes results that the buffer has stored or permanently refused."""
        held = self._held.get(ack.lease_id)
        if held is not None:
            for sample_index in ack.sample_indices:
                if (sent := held.unacknowledged.pop(sample_index, None)) is not None:
                    self._in_flight_bytes -= _size(sent.result)
                    self._answered_s = max(self._answered_s, sent.first_sent_s)
            if not held.missing and not held.unacknowledged:
                del self._held[ack.lease_id]

    def drop(self, lease_ids: Iterable[int]) -> list[int]:
        """Removes leases with all their samples and results; returns the leases that were held."""
        dropped = [lease_id for lease_id in dict.fromkeys(lease_ids) if lease_id in self._held]
        for lease_id in dropped:
            held = self._held.pop(lease_id)
            self.num_at.subtract(held.missing.values())
            self.holding_samples -= len(held.missing)
            self._in_flight_bytes -= sum(_size(sent.result) for sent in held.unacknowledged.values())
        return dropped

    def drop_unfinished(self) -> list[int]:
        """Drops the leases with a missing sample and returns them; results of finished leases stay."""
        return self.drop([lease_id for lease_id, held in self._held.items() if held.missing])

    def to_resend(self, *, now_s: float, shortest_s: float) -> list[SampleResult]:
        """Returns the unacknowledged results that are to be sent again, and marks them as sent now.

        `shortest_s`: the shortest wait for an acknowledgement; 0: all are lost with their connection.
        """
        due = []
        for held in self._held.values():
            for sent in held.unacknowledged.values():
                may_come = shortest_s > 0 and sent.sent_s >= self._answered_s
                if now_s - sent.sent_s < (sent.wait_s(shortest_s) if may_come else shortest_s):
                    continue
                sent.sent_s, sent.in_flight_bytes = now_s, self._in_flight_bytes
                sent.num_repeats += 1
                if not shortest_s:
                    sent.first_sent_s, sent.num_repeats = now_s, 0
                due.append(sent.result)
        return due


def _size(result: SampleResult) -> int:
    return result.record.num_bytes if isinstance(result, SampleDone) else 0
