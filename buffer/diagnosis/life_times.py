"""How long tickets and leases stay in their states, as histograms."""

from __future__ import annotations

from collections.abc import Callable

from areal_like.runtime.metrics import SECONDS, Metrics
from areal_like.spans import recorder
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.state import LedgerState
from buffer.tickets import LeaseRecord, State, Ticket


class LifeTimes:
    """The histograms of one buffer. What was alive before it started is not in them."""

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        """`clock`: that by which leases are granted."""
        self._clock = clock
        self._since_s: dict[int, float] = {}
        """Train ticket -> when it became READY or BATCHED."""
        self._queue = metrics.histogram(
            "ticket_queue_seconds",
            "Time that a whole group waited: ready for a place in a step, batched until the trainer got it",
            buckets=SECONDS,
            label="state",
            values=(State.READY, State.BATCHED),
        )
        self._leases = metrics.histogram(
            "lease_seconds", "Time from a lease's grant to its last sample or its loss", buckets=SECONDS
        )
        write = metrics.histogram(
            "ledger_write_seconds",
            "Time of a write of the ledger, with what buffer.durability demands (fsync)",
            buckets=SECONDS,
        )
        recorder.listen("ledger", write.observe)

    def watch(self, state: LedgerState) -> None:
        """Observes this ledger from now on."""
        state.tickets.on_move = self._moved
        state.steps.on_served = self._served
        state.leases.on_end = self._lease_ended

    def _moved(self, ticket: Ticket, before: State, after: State) -> None:
        if ticket.purpose is not Purpose.TRAIN or before is after:
            return
        now_s = self._clock()
        since_s = self._since_s.pop(ticket.ticket_id, None)
        if since_s is not None and (before, after) == (State.READY, State.BATCHED):
            self._queue.labels(before).observe(now_s - since_s)
        if after in (State.READY, State.BATCHED):
            self._since_s[ticket.ticket_id] = now_s

    def _served(self, ticket: Ticket) -> None:
        """The trainer gets a group; if it asks again, for the same step, that is not counted.

        Not the move to TRAINED: that is at the next checkpoint, maybe an hour after.
        """
        if (since_s := self._since_s.pop(ticket.ticket_id, None)) is not None:
            self._queue.labels(State.BATCHED).observe(self._clock() - since_s)

    def _lease_ended(self, lease: LeaseRecord) -> None:
        self._leases.observe(max(0.0, self._clock() - lease.granted_s))
