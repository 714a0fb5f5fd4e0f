"""The staleness of one step's samples: counted on every rank, summed over all."""

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
        self._num_by_lag = torch.zeros(max_staleness + 1, dtype=torch.int64)
        self._steps: dict[int, int] = {}
        self._step = 0

    def counted(self, group: Group) -> list[Trajectory]:
        """Counts a group and returns its trajectories. Asserts that the buffer kept the staleness bound."""
        self._step = group.step
        self._steps |= {
            t.oldest_version: step for t, step in zip(group.trajectories, group.version_steps, strict=True)
        }
        for version_step in group.version_steps:
            lag = group.step - version_step
            assert 0 <= lag < len(self._num_by_lag), (
                f"ticket {group.ticket_id} has lag {lag} in step {group.step}"
            )
            self._num_by_lag[lag] += 1
        return group.trajectories

    def of_tokens(self, trajectory: Trajectory) -> NDArray[np.int64]:
        """Lag in steps of a counted trajectory's tokens, int64 [num_tokens]; 0 where not sampled.

        The buffer sends the step of the oldest version only. Each later version is taken to be one step
        newer, which is wrong only if the trainer was restarted or a push failed between the two.
        """
        oldest = trajectory.oldest_version
        steps = self._steps[oldest] + trajectory.versions.astype(np.int64) - oldest
        return np.where(trajectory.loss_mask == 1, np.maximum(self._step - steps, 0), 0)

    def reduced(self, ranks: Ranks) -> dict[str, Any]:
        """Metrics over all ranks. Collective."""
        counts = ranks.sum(self._num_by_lag).tolist()
        num_samples = max(1, sum(counts))
        return {
            "lag_mean": sum(lag * count for lag, count in enumerate(counts)) / num_samples,
            "lag_max": max((lag for lag, count in enumerate(counts) if count), default=0),
            "lag_histogram": {str(lag): count for lag, count in enumerate(counts)},
        }
