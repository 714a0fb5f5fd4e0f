"""What this server owes the buffer: samples of leases, and answers that are not acknowledged. Pure: no sockets, no tasks, no clock.

    sample:  missing -> (finish) -> unacknowledged -> (ack) -> forgotten
    lease:   granted -> named in every heartbeat while one of its samples is missing or unacknowledged -> forgotten
             dropped at any moment by an abort of the buffer, or returned when draining

The buffer owns the tickets; losing all of this costs work, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from areal_like.wire.messages.producer import Lease, SampleAck, SampleDone, SampleFailed

Answer = SampleDone | SampleFailed


@dataclass(kw_only=True, slots=True)
class _Unacknowledged:
    answer: Answer
    sent_s: float


@dataclass(kw_only=True, slots=True)
class _Held:
    missing: set[int]
    unacknowledged: dict[int, _Unacknowledged] = field(default_factory=dict)


class LeaseDesk:
    """Leases in, answers out. `now_s` is any steadily growing clock."""

    def __init__(self, *, capacity_samples: int) -> None:
        """`capacity_samples`: how many samples may be missing at a time before no credit is left."""
        self._capacity_samples = capacity_samples
        self._held: dict[int, _Held] = {}
        self.holding_samples = 0
        """Samples of received leases that are not finished."""

    @property
    def free_samples(self) -> int:
        """Credit: samples that can be taken beyond those held."""
        return max(0, self._capacity_samples - self.holding_samples)

    @property
    def lease_ids(self) -> list[int]:
        """Leases to be renewed."""
        return list(self._held)

    @property
    def num_unacknowledged(self) -> int:
        """Answers that the buffer has not confirmed."""
        return sum(len(held.unacknowledged) for held in self._held.values())

    def grant(self, lease: Lease) -> bool:
        """A lease came; False for one that is held already."""
        if lease.lease_id in self._held or not lease.sample_indices:
            return False
        self._held[lease.lease_id] = _Held(missing=set(lease.sample_indices))
        self.holding_samples += len(set(lease.sample_indices))
        return True

    def finish(self, answer: Answer, *, now_s: float) -> bool:
        """A sample is done or has failed: to be sent now, and kept until it is acknowledged. False if nobody wants it any more."""
        held = self._held.get(answer.lease_id)
        if held is None or answer.sample_index not in held.missing:
            return False
        held.missing.remove(answer.sample_index)
        held.unacknowledged[answer.sample_index] = _Unacknowledged(answer=answer, sent_s=now_s)
        self.holding_samples -= 1
        return True

    def acknowledge(self, ack: SampleAck) -> None:
        """The buffer has them (or refused them for good)."""
        held = self._held.get(ack.lease_id)
        if held is not None:
            for sample_index in ack.sample_indices:
                held.unacknowledged.pop(sample_index, None)
            if not held.missing and not held.unacknowledged:
                del self._held[ack.lease_id]

    def drop(self, lease_ids: Iterable[int]) -> list[int]:
        """Nothing is owed for these any more; returns those that were held."""
        dropped = [lease_id for lease_id in dict.fromkeys(lease_ids) if lease_id in self._held]
        for lease_id in dropped:
            self.holding_samples -= len(self._held.pop(lease_id).missing)
        return dropped

    def drop_unfinished(self) -> list[int]:
        """Drops every lease with a missing sample and returns them; answers of finished leases stay until acknowledged."""
        return self.drop([lease_id for lease_id, held in self._held.items() if held.missing])

    def to_resend(self, *, now_s: float, older_than_s: float) -> list[Answer]:
        """Answers sent before `now_s - older_than_s` and not acknowledged; they count as sent now."""
        due = [
            waiting
            for held in self._held.values()
            for waiting in held.unacknowledged.values()
            if waiting.sent_s <= now_s - older_than_s
        ]
        for waiting in due:
            waiting.sent_s = now_s
        return [waiting.answer for waiting in due]
