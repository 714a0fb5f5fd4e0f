"""Retries a failed sample, or drops its ticket after too many failures.

A sample fails if its reward raised or exceeded the time limit, if the engine refused it, or if the ledger
cannot use the trajectory that a server sent.
"""

from __future__ import annotations

from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.state import LedgerState
from buffer.tickets import Drop, Ticket


class FailedSamples:
    """Retries failed samples up to `buffer.max_sample_retries` times each, then drops their ticket.

    Too many failures in a row, over all tickets, fail the job: something is wrong with the task itself.
    """

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        self._lifecycle = lifecycle
        self._settings = state.settings
        self._store = state.store
        self._counters = state.counters
        self.job_failure_reason = ""
        """Why the job cannot continue (too many failed samples in a row); empty while it can."""
        self._num_failures_in_row = 0

    def retry_or_drop(self, ticket: Ticket, lease_id: int, sample_index: int, *, error: str) -> None:
        """Counts a failure of one sample, then leases the sample again or drops its ticket (FAILED)."""
        self._count_failure(error)
        self._lifecycle.remove_from_lease(ticket, lease_id, sample_index, arrived=False)
        ticket.num_failures[sample_index] = ticket.num_failures.get(sample_index, 0) + 1
        self._store.put_failure(ticket, sample_index)
        if ticket.num_failures[sample_index] > self._settings.max_sample_retries:
            self._lifecycle.drop(ticket, Drop.FAILED)
        else:
            self._lifecycle.requeue(ticket, [sample_index])

    def count_success(self) -> None:
        """A sample was accepted, which ends the current row of failures."""
        self._num_failures_in_row = 0

    def _count_failure(self, error: str) -> None:
        self._counters.count_failure()
        self._num_failures_in_row += 1
        has_failed_before = bool(self.job_failure_reason)
        if self._num_failures_in_row >= self._settings.max_consecutive_failures and not has_failed_before:
            self.job_failure_reason = (
                f"{self._num_failures_in_row} samples failed in a row; the last: {error}"
            )
