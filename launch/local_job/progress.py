"""What the launcher keeps of a run's steps: the newest rows, and of all others only what is shown of them.

A run may go on for days at ten steps a second, so nothing here grows with it. The curve of rewards is kept as means over stretches of
equal length; when there are too many, neighbours are merged and the stretches are twice as long. A screen has fewer columns than that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

RECENT_STEPS = 50
"""Steps over which rates and histograms are taken."""
MAX_STRETCHES = 2048
"""Even, and more than the dots on a line of the widest terminal."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A run's steps as they are shown."""

    recent: tuple[dict[str, Any], ...] = ()
    """The newest rows of metrics.jsonl, ascending by step."""
    rewards: tuple[float, ...] = ()
    """The whole run's, each the mean of a stretch; the stretches are equal but for the last."""
    reward_low: float = 0.0
    """Lowest reward of a step, 0 or below."""
    reward_high: float = 1.0
    """Highest reward of a step, 1 or above."""
    lag_max: float = 0.0
    """Largest lag that was trained on."""
    eval_reward: float | None = None
    """Newest held-out reward."""


class StepTally:
    """Rows one after the other, to a `Progress`."""

    def __init__(self) -> None:
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self._rewards = Stretches()
        self._low, self._high = 0.0, 1.0
        self._lag_max = 0.0
        self._eval_reward: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        """The next step's; what it does not say is left out."""
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
        """So far."""
        return Progress(
            recent=tuple(self._recent),
            rewards=self._rewards.means,
            reward_low=self._low,
            reward_high=self._high,
            lag_max=self._lag_max,
            eval_reward=self._eval_reward,
        )


class Stretches:
    """Means of numbers over stretches of equal length; at most MAX_STRETCHES of them and one that is not full."""

    def __init__(self) -> None:
        self._full: list[float] = []
        self._length = 1
        self._sum, self._num = 0.0, 0

    def add(self, value: float) -> None:
        """The next one."""
        self._sum, self._num = self._sum + value, self._num + 1
        if self._num < self._length:
            return
        if len(self._full) == MAX_STRETCHES:
            self._full = [(a + b) / 2 for a, b in zip(self._full[::2], self._full[1::2], strict=True)]
            self._length *= 2
            return  # it is the first half of the next stretch
        self._full.append(self._sum / self._num)
        self._sum, self._num = 0.0, 0

    @property
    def means(self) -> tuple[float, ...]:
        """In order, that of the unfinished stretch last."""
        return (*self._full, *([self._sum / self._num] if self._num else []))
