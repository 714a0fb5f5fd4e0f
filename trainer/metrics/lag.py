"""Counts the staleness of one step's samples on every rank, and sums it over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import Group
from trainer.distributed.ranks import Ranks


class LagTally:
    """Counts the samples of one step by lag: the step minus the weights' step of their oldest trained
    token."""

    def __init__(self, max_staleness: int) -> None:
        self._num_by_lag = [0] * (max_staleness + 1)
        self._steps: dict[int, int] = {}
        self._step = 0

    def counted(self, group: Group) -> list[Trajectory]:
        """Counts a group and returns its trajectories. Asserts that the buffer respected the staleness
        bound."""
        self._step = group.step
        for record, version_step in zip(group.records, group.version_steps, strict=True):
            self._steps[record.oldest_version] = version_step
            lag = group.step - version_step
            assert 0 <= lag < len(self._num_by_lag), (
                f"ticket {group.ticket_id} has lag {lag} in step {group.step}"
            )
            self._num_by_lag[lag] += 1
        return group.trajectories

    def of_tokens(self, trajectory: Trajectory) -> NDArray[np.int64]:
        """Lag in steps of a counted trajectory's tokens, int64 [num_tokens]; 0 where not sampled.

        The buffer sends the step of the oldest version only. Each later version is assumed to be one step
        newer, which is wrong only if the trainer was restarted or a push failed between the two.
        """
        oldest = trajectory.oldest_version
        lag_T = np.subtract(self._step - self._steps[oldest] + oldest, trajectory.versions, dtype=np.int64)
        np.maximum(lag_T, 0, out=lag_T)
        lag_T *= trajectory.loss_mask
        return lag_T

    def reduced(self, ranks: Ranks) -> dict[str, Any]:
        """Metrics over all ranks. Collective."""
        counts = ranks.sum(torch.tensor(self._num_by_lag)).tolist()
        num_samples = max(1, sum(counts))
        return {
            "lag_mean": sum(lag * count for lag, count in enumerate(counts)) / num_samples,
            "lag_max": max((lag for lag, count in enumerate(counts) if count), default=0),
            "lag_histogram": {str(lag): count for lag, count in enumerate(counts)},
        }
