"""The running mean and deviation of rewards as of each of the last steps, for the baselines of parts.

    mean = sum_s decay^(n-s) m_s / sum_s decay^(n-s)      m_s: mean reward of step s, n steps so far

A sample is compared with the statistics as of the step at which its group began, and not with the newest
ones: whether it was completed early or late must not decide what it is compared with, or the baseline would
depend on its own completion. The reward shapings' dual variables are kept with them for the same reason.

The history is a few numbers for each step, the same on every rank, and part of each checkpoint. So a resumed,
repeated or replayed step has the same baselines, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_KEPT = 256
"""Steps of which the statistics are kept. A late sample's group may have begun any number of steps earlier:
if that is before the oldest entry, the oldest one is used."""
_NUM_STATISTICS = 4
"""Numbers of a row before its dual variables."""
_LEAST_VARIANCE = 1e-12
"""Relative to the mean square: a smaller variance is rounding."""


@dataclass(frozen=True, kw_only=True)
class RewardStatistics:
    """Running statistics of rewards (after shaping) before a step."""

    mean: float = 0.0
    deviation: float = 1.0
    """Standard deviation; 1 if unknown, or if all rewards were equal."""
    is_known: bool = False
    """False before the first step."""
    duals: tuple[float, ...] = ()
    """Dual variables of the shapings."""


class RewardHistory:
    """`begin` before each step, `append` after it."""

    def __init__(self, *, decay: float) -> None:
        """`decay`: weight of a step's rewards relative to those of the next step."""
        self._decay = decay
        self._rows: list[list[float]] = []
        """[step, weight, weighted sum of means, weighted sum of mean squares, *duals], by step."""

    def begin(self, step: int, *, duals: Sequence[float]) -> None:
        """Starts the history at `step` if it is empty."""
        if not self._rows:
            self._rows.append([step, 0.0, 0.0, 0.0, *duals])

    def as_of(self, begin_step: int, *, step: int) -> RewardStatistics:
        """The statistics before step `begin_step`, or before the oldest step that is kept.

        `step`: the present one.
        """
        wanted = min(begin_step, step)
        row = next((row for row in reversed(self._rows) if row[0] <= wanted), self._rows[0])
        _, weight, total, squares, *duals = row
        if not weight:
            return RewardStatistics(duals=tuple(duals))
        mean, square = total / weight, squares / weight
        variance = square - mean * mean
        return RewardStatistics(
            mean=mean,
            deviation=math.sqrt(variance) if variance > _LEAST_VARIANCE * max(1.0, square) else 1.0,
            is_known=True,
            duals=tuple(duals),
        )

    def append(self, step: int, *, mean: float, square: float, duals: Sequence[float]) -> None:
        """Adds a completed step: its samples' mean reward and mean square, the dual variables after it."""
        _, weight, total, squares, *_ = self._rows[-1]
        row = [step + 1, weight * self._decay + 1, total * self._decay + mean, squares * self._decay + square]
        self._rows = [*self._rows, [*row, *duals]][-_NUM_KEPT:]

    def dump(self) -> list[list[float]]:
        """The state, for `restore`; JSON."""
        return [list(row) for row in self._rows]

    def restore(self, rows: Sequence[Sequence[float]], *, num_duals: int) -> None:
        """Sets the state; empty: the history starts again at the next step.

        If the rows do not have `num_duals` dual variables, because the shapings differ, all of them are 0.
        """
        self._rows = [
            list(row)
            if len(row) == _NUM_STATISTICS + num_duals
            else [*row[:_NUM_STATISTICS], *[0.0] * num_duals]
            for row in rows
        ]
