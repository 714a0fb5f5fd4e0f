"""Cuts a trajectory of several segments into the sequences that the model gets.

A segment is a separate sequence: it has its own positions, and its tokens do not attend to other segments.
The samples of the segments belong to the same group and have the trajectory's reward; in the divisors of
normalizers they count as one sample. The importance weight W of a segment is the product over its own tokens,
because the segments of a sample need not be in one micro-batch. A segment without tokens to train on (all its
sampled tokens belong to an earlier branch, or are beyond the staleness bound) is left out.

Shape suffixes: T tokens of a trajectory, S its tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.trajectory import Trajectory
from trainer.batching.packing import (
    PackedBatch,
    Packer,
    TrainingSample,
    in_lockstep,
    is_target,
    split_by_sequence,
)
from trainer.distributed.ranks import Ranks


def segments_of(trajectory: Trajectory) -> list[tuple[slice, Trajectory]]:
    """(position, its own trajectory) of each segment that is trained on; at least one."""
    if len(trajectory.segments) <= 1:
        return [(slice(0, trajectory.num_tokens), trajectory)]
    target_T = is_target(trajectory)
    slices = trajectory.segment_slices
    kept = [part for part in slices if target_T[part].any()] or slices[:1]
    return [(part, _cut(trajectory, part)) for part in kept]


def values_of_targets(
    trajectories: Sequence[Trajectory],
    compute: Callable[[PackedBatch], Tensor],
    ranks: Ranks,
    *,
    budget_tokens: int,
) -> list[NDArray[np.float64]]:
    """[S] of each trajectory, in order: the results of `compute` at its targets, without gradient.
    Collective.

    `compute`: returns a number for each sampled token of a micro-batch. `budget_tokens`: most tokens of one.
    """
    segments = [[segment for _, segment in segments_of(trajectory)] for trajectory in trajectories]
    samples = [TrainingSample(trajectory=s, advantage=0.0, group=0) for each in segments for s in each]
    values: list[NDArray[np.float64]] = []
    for batch, live in in_lockstep(Packer(budget_tokens=budget_tokens).microbatches([samples]), ranks):
        with torch.no_grad():
            value_S = compute(batch)
        if live:
            values += split_by_sequence(value_S, batch)
    remaining = iter(values)
    return [np.concatenate([next(remaining) for _ in each]) for each in segments]


def split_sample(sample: TrainingSample) -> list[TrainingSample]:
    """A sample for each segment, with its part of advantage and lag; the sample itself if it has only one."""
    if len(sample.trajectory.segments) <= 1:
        return [sample]
    segments = segments_of(sample.trajectory)
    counts = sample.resolved_counts
    of_others = counts._replace(num_masked=0, num_samples=0)
    return [
        replace(
            sample,
            trajectory=trajectory,
            advantage=_part(sample.advantage, part),
            lag=_part(sample.lag, part),
            beyond=_part(sample.beyond, part),
            counts=(of_others if index else counts) if len(segments) > 1 else sample.counts,
        )
        for index, (part, trajectory) in enumerate(segments)
    ]


def split_targets(value_S: NDArray[np.float64], trajectory: Trajectory) -> list[NDArray[np.float64]]:
    """A value [S] of the trajectory's targets, cut into one array for each of `segments_of`."""
    if len(trajectory.segments) <= 1:
        return [value_S]
    target_T = is_target(trajectory)
    counts = [int(target_T[part].sum()) for part, _ in segments_of(trajectory)]
    return np.split(value_S, np.cumsum(counts)[:-1])


def _cut(trajectory: Trajectory, part: slice) -> Trajectory:
    return replace(
        trajectory,
        tokens=trajectory.tokens[part],
        loss_mask=trajectory.loss_mask[part],
        logprobs=trajectory.logprobs[part],
        versions=trajectory.versions[part],
        segments=(),
        turns=(),
        arrays={
            name: array[part] if array.shape[:1] == (trajectory.num_tokens,) else array
            for name, array in trajectory.arrays.items()
        },
    )


def _part(value: Any, part: slice) -> Any:
    return value[part] if isinstance(value, np.ndarray) else value
