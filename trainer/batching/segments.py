"""Cuts a trajectory of several segments into the sequences that the model gets.

A segment is a sequence of its own: it has its own positions, and its tokens attend to no other segment. The
samples of the segments belong to the same group and have the trajectory's reward. A segment of which nothing
is trained on (all its sampled tokens belong to an earlier branch) is left out.

Shape suffixes: T tokens of a trajectory, S its tokens that are trained on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory
from trainer.batching.packing import TrainingSample, is_target


def segments_of(trajectory: Trajectory) -> list[tuple[slice, Trajectory]]:
    """(position, trajectory of its own) of each segment that is trained on; at least one."""
    if len(trajectory.segments) <= 1:
        return [(slice(0, trajectory.num_tokens), trajectory)]
    target_T = is_target(trajectory)
    slices = trajectory.segment_slices
    kept = [part for part in slices if target_T[part].any()] or slices[:1]
    return [(part, _cut(trajectory, part)) for part in kept]


def split_sample(sample: TrainingSample) -> list[TrainingSample]:
    """A sample for each segment, with its part of advantage and lag; the sample itself if it has only one."""
    if len(sample.trajectory.segments) <= 1:
        return [sample]
    return [
        replace(
            sample,
            trajectory=trajectory,
            advantage=_part(sample.advantage, part),
            lag=_part(sample.lag, part),
        )
        for part, trajectory in segments_of(sample.trajectory)
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
