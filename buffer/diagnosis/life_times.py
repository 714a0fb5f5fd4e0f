"""Tickets and leases over time: histograms of the times they spend in a state, and the rows of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from areal_like.runtime.metrics import SECONDS, Metrics
from areal_like.spans import recorder
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.state import LedgerState
from buffer.tickets import LeaseRecord, State, Ticket


class LifeTimes:
    """The histograms of one buffer, without tickets and leases that existed before it started."""

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        """`clock`: the clock by which leases are granted."""
        self._clock = clock
        self._since_s: dict[int, float] = {}
        """Train ticket -> when it became READY or BATCHED."""
        self._queue = metrics.histogram(
            "ticket_queue_seconds",
            "Time that a whole group waited: ready for a step position, batched until the trainer got it",
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
        state.tickets.on_move = self._moved
        state.steps.on_served = self._served
        state.leases.on_end = self._lease_ended

    def _moved(self, ticket: Ticket, before: State, after: State) -> None:
        if ticket.purpose is not Purpose.TRAIN or before is after:
            return
        now_s = self._clock()
        since_s = self._since_s.pop(ticket.ticket_id, None)
        # A position of parts is recorded as soon as it is made.
        is_whole = not ticket.parts
        if is_whole and since_s is not None and (before, after) == (State.READY, State.BATCHED):
            self._queue.labels(before).observe(now_s - since_s)
        if after in (State.READY, State.BATCHED):
            self._since_s[ticket.ticket_id] = now_s

    def _served(self, ticket: Ticket) -> None:
        """Counts a group that the trainer gets; a repeated request in the same step is not counted. The move
        to TRAINED would be too late: it happens at the next checkpoint, perhaps an hour later.
        """
        if (since_s := self._since_s.pop(ticket.ticket_id, None)) is not None:
            self._queue.labels(State.BATCHED).observe(self._clock() - since_s)

    def _lease_ended(self, lease: LeaseRecord) -> None:
        self._leases.observe(max(0.0, self._clock() - lease.granted_s))


_STATES = (State.QUEUED, State.LEASED, State.READY, State.CLOSED, State.BATCHED)


def is_held_back(state: LedgerState) -> bool:
    """True if the trainer's step lacks groups, and the complete samples of groups that are not recorded
    would fill its free positions: waiting for whole groups costs the time."""
    step, tickets = state.steps.current, state.tickets
    if state.scheduler.num_full_steps > step or step >= state.settings.num_steps:
        return False
    size = state.settings.group_size + state.settings.num_greedy
    num_ready = tickets.count(Purpose.TRAIN, State.READY)
    num_complete = tickets.num_partial + num_ready * size + state.parts.num_loose
    return num_complete >= state.scheduler.num_free_before(step + 1) * size


class Timeline:
    """Reads the ledger at every tick and records changes."""

    def __init__(self) -> None:
        self._open_step = -1
        self._since_s = time.monotonic()
        self._values: dict[str, float] = {}

    def look(self, state: LedgerState) -> None:
        """Records counters that have changed and, when the open step has, how long it took to fill."""
        open_step = state.scheduler.step
        if open_step != self._open_step:
            now_s = time.monotonic()
            if 0 <= self._open_step < open_step:
                last = open_step - 1
                name = f"step {last}" if last == self._open_step else f"steps {self._open_step} to {last}"
                recorder.record("steps being recorded", name, start_s=self._since_s, end_s=now_s)
            self._open_step, self._since_s = open_step, now_s
        num_by_state = state.tickets.num_by_state()
        values: dict[str, float] = {f"tickets {one.value}": num_by_state[one] for one in _STATES}
        values["groups in the open step"] = state.scheduler.position
        values["samples of closed groups that wait"] = state.parts.num_loose
        values["samples of closed groups that are generated"] = state.parts.num_late
        for name, value in values.items():
            if self._values.get(name) != value:
                recorder.count(name, value)
        self._values = values
