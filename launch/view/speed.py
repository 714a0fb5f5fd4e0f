"""Rates and means over the newest steps of a run."""

from __future__ import annotations

import time
from collections import deque

from launch.formatting import duration
from launch.observation.observer import Observation, find_table


class Eta:
    """Steps per second over a window of steps, and the time that the rest of the run will take."""

    def __init__(self, *, num_steps: int, window: int = 60) -> None:
        self.num_steps = num_steps
        """Steps of the whole run."""
        self._seen: deque[tuple[float, int]] = deque(maxlen=window)
        self._step = -1

    def see(self, step: int) -> None:
        """Records the time at which `step` was first seen; -1: no step yet."""
        if step < self._step:  # a trainer has restarted from its checkpoint
            self._seen.clear()
        if step != self._step:
            self._step = step
            self._seen.append((time.monotonic(), step))

    @property
    def steps_per_s(self) -> float | None:
        """Rate over the window; None until two steps were seen."""
        if len(self._seen) < 2:
            return None
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def __str__(self) -> str:
        rate = self.steps_per_s
        return "-" if not rate else duration(max(0, self.num_steps - 1 - self._step) / rate)


def tokens_per_s_trained(seen: Observation) -> float | None:
    """Trained tokens per second over the newest steps, waiting time included; None before the second step.

    Without complete rows: the rate of the last minute, as counted by the buffer.
    """
    rows = [row for row in seen.steps if "time_unix_s" in row and "tokens_trained" in row]
    rows = [row for row in rows if row["time_unix_s"] > rows[-1]["time_unix_s"] - 60]  # not across a resume
    if len(rows) < 2 or rows[-1]["time_unix_s"] <= rows[0]["time_unix_s"]:
        counted = find_table(seen.buffer, "rates").get("tokens_trained_per_s")
        return float(counted) if isinstance(counted, (int, float)) else None
    seconds = rows[-1]["time_unix_s"] - rows[0]["time_unix_s"]
    return float(sum(row["tokens_trained"] for row in rows[1:]) / seconds)


def recent_mean(seen: Observation, key: str) -> float | None:
    """Mean of a column of metrics.jsonl over the newest rows; None when no row has it."""
    values = [float(row[key]) for row in seen.steps if isinstance(row.get(key), (int, float))]
    return sum(values) / len(values) if values else None
