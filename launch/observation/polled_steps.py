"""Follows the steps of a run without its metrics.jsonl, from the trainer's heartbeats at the buffer.

Each heartbeat of rank 0 has some columns of its newest step. A step that is shorter than the polling interval
may be missed, so the curve has fewer points, and sums over steps are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.observation.observer import find_table, merged_peers
from launch.observation.progress import Progress, StepTally


class PolledSteps:
    """Collects steps from the /status of the buffers. Pure: responses and the time are arguments."""

    def __init__(self) -> None:
        self._tally = StepTally()
        self._step = -1
        self._lags: dict[str, int] = {}

    def see(self, statuses: Sequence[Mapping[str, Any]], *, unix_s: float) -> Progress:
        """Adds one poll; returns the progress over all polls so far."""
        rank0 = next((peer for peer in merged_peers(statuses) if peer["name"] == "trainer-0"), {})
        stats = rank0.get("stats") or {}
        step = stats.get("row_step")
        if step is not None and int(step) != self._step:
            if int(step) < self._step:  # a trainer has resumed at an earlier step
                self._tally = StepTally()
            self._step = int(step)
            lags = {lag: count for status in statuses for lag, count in _lags(status).items()}
            row = {**stats, "step": self._step, "time_unix_s": unix_s, "lag_histogram": self._new(lags)}
            if statuses and isinstance(statuses[0].get("max_staleness"), int):
                row["max_staleness"] = statuses[0]["max_staleness"]
            self._tally.add(row)
        return self._tally.progress

    def _new(self, lags: dict[str, int]) -> dict[str, int]:
        """Trained samples by lag since the last step that was seen."""
        before, self._lags = self._lags, lags
        return {lag: count - before.get(lag, 0) for lag, count in lags.items() if count > before.get(lag, 0)}


def _lags(status: Mapping[str, Any]) -> dict[str, int]:
    found = find_table(dict(status), "lag_histogram")
    return {lag: count for lag, count in found.items() if lag.isdecimal() and isinstance(count, int)}
