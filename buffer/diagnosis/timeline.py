"""The buffer's rows in a trace: the open step, and the numbers of tickets by state."""

from __future__ import annotations

import time

from areal_like.spans import recorder
from buffer.ledger.state import LedgerState
from buffer.tickets import State

_STATES = (State.QUEUED, State.LEASED, State.READY, State.BATCHED)


class Timeline:
    """Looks at the ledger at every tick; records what has changed."""

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
        for name, value in values.items():
            if self._values.get(name) != value:
                recorder.count(name, value)
        self._values = values
