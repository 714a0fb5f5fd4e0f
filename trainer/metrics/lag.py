"""Computes the staleness of one step's samples over all ranks.

`LagTally` counts samples by lag. `PartTable`, for `buffer.overdue=close`, has one row for each sample,
gathered from all ranks at the end of the step, so that every number is computed from all samples at once:
shares of tokens by quartile of length, lags, early and late samples.

Shape suffix: B samples of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.wire.messages.consumer import Group
from trainer.batching.packing import is_target
from trainer.batching.positions import Position
from trainer.batching.training_sample import TrainingSample
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


class PartRow(NamedTuple):
    """One sample; all columns travel as float64."""

    ticket_id: int
    """Of its group."""
    sample_index: int
    """In the group."""
    num_early: int
    """Members that were complete when its group was closed; -1: a whole group."""
    is_late: bool
    has_others: bool
    """There are early members other than the sample itself."""
    reward: float
    """Of the task."""
    num_sampled: int
    """Sampled tokens that have a prefix."""
    lag: int
    """Lag of the oldest token that is trained on; -1: none is."""
    num_beyond: int = 0
    """Those beyond the bound."""
    num_masked: int = 0
    """Those that are masked whatever their ratio."""
    is_first_beyond: bool = False
    """The first of them is beyond the bound."""
    advantage_beyond: float = 0.0
    """Sum of the advantages of those beyond the bound."""


class PartTable:
    """Collects rows, then gives the metrics: note() for each position -> metrics()."""

    def __init__(self) -> None:
        self._rows: list[PartRow] = []

    def note(self, position: Position, samples: Sequence[TrainingSample]) -> None:
        """Adds the samples of a position, in its order."""
        assert position.origins is not None
        for index, (sample, origin) in enumerate(zip(samples, position.origins, strict=True)):
            trajectory, found = position.trajectories[index], position.beyond(index)
            sampled = trained = is_target(trajectory)
            if found is not None or index in position.left_out:
                trained = is_target(sample.trajectory)
            lags = position.lags[index][trained]
            row = PartRow(
                ticket_id=origin.ticket_id,
                sample_index=origin.sample_index,
                num_early=len(origin.early) if origin.is_closed else -1,
                is_late=origin.is_late,
                has_others=any(each.sample_index != origin.sample_index for each in origin.early),
                reward=trajectory.reward,
                num_sampled=int(np.count_nonzero(sampled)),
                lag=int(lags.max()) if len(lags) else -1,
            )
            if found is not None:
                beyond = found & sampled
                row = row._replace(
                    num_beyond=int(beyond.sum()),
                    num_masked=0 if index in position.left_out else int((sampled & ~trained).sum()),
                    is_first_beyond=bool(beyond[sampled][:1].any()),
                    advantage_beyond=float(np.broadcast_to(sample.advantage, sampled.shape)[beyond].sum()),
                )
            self._rows.append(row)

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """The metrics over all ranks. Collective.

        A mean over nothing (no token beyond the bound, no late sample, no closed group) is 0.
        """
        rows = torch.tensor(self._rows, dtype=torch.float64).flatten()
        table = ranks.gather(rows).view(-1, len(PartRow._fields)).numpy()
        column = dict(zip(PartRow._fields, table.T, strict=True))
        sampled_B, beyond_B = column["num_sampled"], column["num_beyond"]
        late_B, reward_B = column["is_late"] > 0, column["reward"]
        quartile_B = _quartiles(sampled_B, column["sample_index"], column["ticket_id"])
        early_of = dict(zip(column["ticket_id"].tolist(), column["num_early"].tolist(), strict=True))
        found = {
            "beyond_share": _ratio(beyond_B.sum(), sampled_B.sum()),
            "beyond_share_first": _mean(column["is_first_beyond"]),
            "masked_share": _ratio(column["num_masked"].sum(), sampled_B.sum()),
            "beyond_advantage": _ratio(column["advantage_beyond"].sum(), beyond_B.sum()),
            "late_share": _mean(late_B),
            "late_reward_gap": _mean(reward_B[~late_B]) - _mean(reward_B[late_B])
            if late_B.any() and not late_B.all()
            else 0.0,
            "late_without_baseline": float((late_B & (column["has_others"] == 0)).sum()),
            "early_members": _mean(np.array([num for num in early_of.values() if num >= 0])),
        }
        for quartile in range(4):
            of_quartile = quartile_B == quartile
            found[f"beyond_share_q{quartile + 1}"] = _ratio(
                beyond_B[of_quartile].sum(), sampled_B[of_quartile].sum()
            )
        lags = column["lag"].astype(np.int64)
        return found | lag_metrics(np.bincount(lags[lags >= 0], minlength=1).tolist())


def _quartiles(length_B: NDArray[np.float64], *ties: NDArray[np.float64]) -> NDArray[np.int64]:
    """[B] 0 for the shortest quarter to 3 for the longest, by rank.

    `ties`: order of equal lengths, by the last of these first.
    """
    rank_B = np.empty(len(length_B), dtype=np.int64)
    rank_B[np.lexsort((*ties, length_B))] = np.arange(len(length_B))
    return rank_B * 4 // max(len(length_B), 1)


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else 0.0


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0
