"""How stale the samples of one step are: counted by every rank, added up over all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import Group
from trainer.distributed.ranks import Ranks


class LagTally:
    """Samples of one step by lag: the step's index minus the step of their oldest masked-in token's weights."""

    def __init__(self, max_staleness: int) -> None:
        self._num_by_lag = torch.zeros(max_staleness + 1, dtype=torch.int64)
        self._steps: dict[int, int] = {}
        self._step = 0

    def counted(self, group: Group) -> list[Trajectory]:
        """Counts a group and passes its trajectories on. The buffer's promise is checked here, where it matters."""
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
        """Lag [num_tokens] of each token of a counted trajectory; 0 where none was sampled.

        The buffer says which step the oldest version belongs to. A version after it is taken to be one step younger, which is so unless
        the trainer was restarted or pushes failed between the two.
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
