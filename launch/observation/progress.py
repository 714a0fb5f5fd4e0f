"""The steps of a run in bounded memory: the newest rows in full, and statistics over all rows.

A run may take days at ten steps per second, so the memory must not grow with it. The reward curve is stored
as means over stretches (equal numbers of consecutive steps); when there are too many stretches, adjacent ones
are merged and their length doubles. There are always more stretches than a screen has columns.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECENT_STEPS = 50
"""Number of steps over which rates and histograms are computed."""
MAX_STRETCHES = 2048
"""Even, because stretches are merged in pairs, and larger than the number of dots in the widest terminal."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The statistics of a run's steps that a view shows."""

    recent: tuple[dict[str, Any], ...] = ()
    """The newest rows of metrics.jsonl, ascending by step."""
    rewards: tuple[float, ...] = ()
    """Mean reward of each stretch of the whole run; all stretches but the last have the same length."""
    reward_low: float = 0.0
    """Lowest reward of a step, 0 or below."""
    reward_high: float = 1.0
    """Highest reward of a step, 1 or above."""
    lag_max: float = 0.0
    """Largest lag of a trained sample."""
    eval_reward: float | None = None
    """Newest held-out reward."""


class StepTally:
    """Summarizes rows of metrics.jsonl, added one after the other, as a `Progress`."""

    def __init__(self) -> None:
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self._rewards = StretchMeans()
        self._low, self._high = 0.0, 1.0
        self._lag_max = 0.0
        self._eval_reward: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Adds the next step's row; missing columns are skipped."""
        self._recent.append(row)
        if isinstance(reward := row.get("reward_mean"), (int, float)):
            self._rewards.add(float(reward))
            self._low, self._high = min(self._low, reward), max(self._high, reward)
        if isinstance(lag := row.get("lag_max"), (int, float)):
            self._lag_max = max(self._lag_max, lag)
        if isinstance(reward := row.get("eval_reward"), (int, float)):
            self._eval_reward = float(reward)

    @property
    def progress(self) -> Progress:
        """The progress over all rows added so far."""
        return Progress(
            recent=tuple(self._recent),
            rewards=self._rewards.means,
            reward_low=self._low,
            reward_high=self._high,
            lag_max=self._lag_max,
            eval_reward=self._eval_reward,
        )


class StretchMeans:
    """Means over stretches of equal length: at most MAX_STRETCHES full ones and one that is not full."""

    def __init__(self) -> None:
        self._full: list[float] = []
        self._length = 1
        self._sum, self._num = 0.0, 0

    def add(self, value: float) -> None:
        """Adds the next number."""
        self._sum, self._num = self._sum + value, self._num + 1
        if self._num < self._length:
            return
        if len(self._full) == MAX_STRETCHES:
            self._full = [(a + b) / 2 for a, b in zip(self._full[::2], self._full[1::2], strict=True)]
            self._length *= 2
            return  # `_sum` is the first half of the next stretch, which is twice as long
        self._full.append(self._sum / self._num)
        self._sum, self._num = 0.0, 0

    @property
    def means(self) -> tuple[float, ...]:
        """The means in order, that of the unfinished stretch last."""
        return (*self._full, *([self._sum / self._num] if self._num else []))


class MetricsTail:
    """Reads the rows appended to metrics.jsonl since the last call of `read`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._tally = StepTally()

    def read(self) -> Progress:
        """Reads the new rows; returns the progress over all rows so far, which are in order of steps."""
        # OSError: there is no file yet, or its file system does not respond now.
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # a resumed trainer has replaced the file
                self._inode, self._offset, self._tally = inode, 0, StepTally()
            file.seek(self._offset)
            # Line by line, because the file of a resumed run may be too large for one read.
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._add(line)
        return self._tally.progress

    def _add(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            int(row["step"])
            self._tally.add(row)
