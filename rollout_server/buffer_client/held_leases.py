"""The leases that a rollout server holds, with their missing samples and unacknowledged results.

    sample:  missing -> finish() -> unacknowledged -> acknowledge() -> removed
    lease:   grant() -> renewed by each heartbeat while a sample is missing or unacknowledged -> removed
             drop() at any moment: aborted by the buffer, or given back to it

Pure: no sockets, no tasks, no clock. The buffer owns the tickets; losing this state costs work, never
correctness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from areal_like.wire.messages.producer import Lease, SampleAck, SampleDone, SampleFailed

SampleResult = SampleDone | SampleFailed
"""The message for each leased sample. The buffer retries a failed sample (`buffer.max_sample_retries`)."""


@dataclass(kw_only=True, slots=True)
class _Unacknowledged:
    result: SampleResult
    sent_s: float


@dataclass(kw_only=True, slots=True)
class _HeldLease:
    missing: set[int]
    unacknowledged: dict[int, _Unacknowledged] = field(default_factory=dict)


class HeldLeases:
    """The table of held leases, and the credit for new ones. `now_s`: seconds on any monotonic clock."""

    def __init__(self, *, capacity_samples: int) -> None:
        """`capacity_samples`: most samples that may be missing at a time; at this number credit is 0."""
        self.capacity_samples = capacity_samples
        self._held: dict[int, _HeldLease] = {}
        self.holding_samples = 0
        """Samples of held leases that are missing."""

    @property
    def free_samples(self) -> int:
        """Credit: number of samples that the server can take in addition to those it holds."""
        return max(0, self.capacity_samples - self.holding_samples)

    @property
    def lease_ids(self) -> list[int]:
        """Leases to renew."""
        return list(self._held)

    @property
    def num_unacknowledged(self) -> int:
        """Results that the buffer has not confirmed."""
        return sum(len(held.unacknowledged) for held in self._held.values())

    def grant(self, lease: Lease) -> bool:
        """Adds a lease; False if it is empty or held already."""
        if lease.lease_id in self._held or not lease.sample_indices:
            return False
        self._held[lease.lease_id] = _HeldLease(missing=set(lease.sample_indices))
        self.holding_samples += len(set(lease.sample_indices))
        return True

    def finish(self, result: SampleResult, *, now_s: float) -> bool:
        """Records the result of a missing sample; the caller sends it now.

        The result is kept until it is acknowledged. Returns False if the lease was dropped or the sample is
        not missing: do not send the result.
        """
        held = self._held.get(result.lease_id)
        if held is None or result.sample_index not in held.missing:
            return False
        held.missing.remove(result.sample_index)
        held.unacknowledged[result.sample_index] = _Unacknowledged(result=result, sent_s=now_s)
        self.holding_samples -= 1
        return True

    def acknowledge(self, ack: SampleAck) -> None:
        """Removes results that the buffer has stored, or finally refused."""
        held = self._held.get(ack.lease_id)
        if held is not None:
            for sample_index in ack.sample_indices:
                held.unacknowledged.pop(sample_index, None)
            if not held.missing and not held.unacknowledged:
                del self._held[ack.lease_id]

    def drop(self, lease_ids: Iterable[int]) -> list[int]:
        """Removes leases with all their samples and results; returns the leases that were held."""
        dropped = [lease_id for lease_id in dict.fromkeys(lease_ids) if lease_id in self._held]
        for lease_id in dropped:
            self.holding_samples -= len(self._held.pop(lease_id).missing)
        return dropped

    def drop_unfinished(self) -> list[int]:
        """Drops the leases with a missing sample and returns them; results of finished leases stay."""
        return self.drop([lease_id for lease_id, held in self._held.items() if held.missing])

    def to_resend(self, *, now_s: float, older_than_s: float) -> list[SampleResult]:
        """Returns unacknowledged results sent before `now_s - older_than_s`, and marks them as sent now."""
        due = [
            waiting
            for held in self._held.values()
            for waiting in held.unacknowledged.values()
            if waiting.sent_s <= now_s - older_than_s
        ]
        for waiting in due:
            waiting.sent_s = now_s
        return [waiting.result for waiting in due]
