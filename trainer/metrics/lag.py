"""Counts the staleness of one step's samples on every rank, and sums it over all ranks."""

from __future__ import annotations

from typing import Any

import torch

from areal_like.wire.messages.consumer import Group
from trainer.batching.positions import Position
from trainer.distributed.ranks import Ranks


class LagTally:
    """Counts the samples of one step by lag: the step minus the weights' step of their oldest token that is
    within the bound."""

    def __init__(self, max_staleness: int) -> None:
        self._num_by_lag = [0] * (max_staleness + 1)

    def counted(self, group: Group) -> Position:
        """Counts a group and returns its samples.

        Asserts that the buffer respected the staleness bound, if that is one of whole samples.
        """
        position = Position.of(group)
        for record, version_step, lag_T in zip(
            group.records, group.version_steps, position.lags, strict=True
        ):
            lag = group.step - version_step
            if group.max_staleness >= 0:  # the bound is one of tokens, and older ones are not trained on
                within = lag_T[lag_T <= group.max_staleness]
                lag = int(within.max()) if len(within) else 0
            assert 0 <= lag < len(self._num_by_lag), (
                f"ticket {record.ticket_id} has lag {lag} in step {group.step}"
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
