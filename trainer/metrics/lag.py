"""Counts the staleness of one step's samples on every rank, and sums it over all ranks."""

from __future__ import annotations

from typing import Any

import torch

from areal_like.wire.messages.consumer import Group
from trainer.batching.positions import Position
from trainer.distributed.ranks import Ranks


class LagTally:
    """Counts the samples of one step by lag: the step minus the weights' step of their oldest token.

    Of groups that were recorded with `buffer.overdue=close`, only tokens within the bound count, because only
    those are trained on.
    """

    def __init__(self, max_staleness: int) -> None:
        self._num_by_lag = [0] * (max_staleness + 1)

    def counted(self, group: Group) -> Position:
        """Counts a group and returns its samples.

        Asserts that the buffer respected the staleness bound: the job's, and that of the group itself.
        """
        position = Position.of(group)
        is_by_token = bool(group.closed) or group.begin_step >= 0
        largest = len(self._num_by_lag) - 1
        if group.max_staleness >= 0:
            largest = min(largest, group.max_staleness)
        for record, version_step, lag_T in zip(
            group.records, group.version_steps, position.lags, strict=True
        ):
            lag = group.step - version_step
            if is_by_token:  # older tokens are not trained on
                within = lag_T[lag_T <= group.max_staleness]
                lag = int(within.max()) if len(within) else 0
            assert 0 <= lag <= largest, (
                f"ticket {record.ticket_id} has lag {lag} in step {group.step}, beyond its bound of {largest}"
            )
            self._num_by_lag[lag] += 1
        return position

    def reduced(self, ranks: Ranks) -> dict[str, Any]:
        """Metrics over all ranks. Collective."""
        return lag_metrics(ranks.sum(torch.tensor(self._num_by_lag)).tolist())


def lag_metrics(num_by_lag: list[int]) -> dict[str, Any]:
    """The metrics of the lags of a step's samples, from the number of samples of each lag, from 0 on."""
    num_samples = max(1, sum(num_by_lag))
    return {
        "lag_mean": sum(lag * count for lag, count in enumerate(num_by_lag)) / num_samples,
        "lag_max": max((lag for lag, count in enumerate(num_by_lag) if count), default=0),
        "lag_histogram": {str(lag): count for lag, count in enumerate(num_by_lag)},
    }
