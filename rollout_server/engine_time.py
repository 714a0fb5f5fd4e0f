"""Measures how long a server had requests at its engine, to relate the engine's output to that time.

The engine's own busy time does not measure that, because an engine that is repeatedly stopped between two
steps counts that time as idle. Time in which the server itself did not run, or in which a weight push kept
the engine from decoding, is not counted. Pure: no clock.
"""

from __future__ import annotations


class EngineTime:
    """`busy_s`: seconds with a request at the engine; `request_s`: the same, added over the requests."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.request_s = 0.0
        self._seen = (0.0, 0.0)
        self._pending = (0.0, 0.0)
        """Times not counted yet because a push is running: how long it stalled the engine is known only at
        its end."""
        self._stall_s = 0.0
        self._num_pushes = 0

    def observe(
        self,
        *,
        busy_s: float,
        request_s: float,
        passed_s: float,
        late_s: float,
        is_pushing: bool,
        num_pushes: int,
        stall_s: float,
    ) -> None:
        """Takes the totals of the gate, of pushes and of their stalls, once per heartbeat.

        `passed_s`: seconds since the last call; `late_s`: those of them in which the server did not run.
        """
        share = max(0.0, 1 - late_s / passed_s) if passed_s > 0 else 1.0
        added = (share * (busy_s - self._seen[0]), share * (request_s - self._seen[1]))
        self._seen = (busy_s, request_s)
        self._pending = (self._pending[0] + added[0], self._pending[1] + added[1])
        if is_pushing and num_pushes == self._num_pushes:
            return
        pending_s, pending_request_s = self._pending
        if pending_s > 0:
            decoding = max(0.0, 1 - (stall_s - self._stall_s) / pending_s)
            self.busy_s += decoding * pending_s
            self.request_s += decoding * pending_request_s
        self._pending, self._stall_s, self._num_pushes = (0.0, 0.0), stall_s, num_pushes
