"""Samples of several segments: which segments are trained on, and where a sample is cut that is too long.

A segment is a separate sequence: it has its own positions, and its tokens do not attend to other segments. To
an objective the segments of a sample are one sample all the same: `SampledTokens` has one row for each
sample, so ratios, masks, norms, baselines and divisors of "a sequence" are over the tokens of all segments of
the sample, and each sample has one vote. For that, the segments of a sample stay in one micro-batch
(`packing.py`, `balancer.py`). A sample that does not fit is set aside and cut between segments, and the step
computes its losses from all parts together (`trainer/step/long_samples.py`). Losses of single tokens
(`level=token`, PPO's clip) are the same however a sample is cut.

A segment without tokens to train on (all its sampled tokens belong to an earlier branch, or are beyond the
staleness bound) is left out.

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
from trainer.batching.packing import PackedBatch, Packer, in_lockstep, is_target, num_targets
from trainer.batching.routes import routes_of
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks


def segments_of(trajectory: Trajectory) -> list[tuple[slice, Trajectory]]:
    """(position, its own trajectory) of each segment that is trained on; at least one.

    They have no routes: critic and reference model, which get them, choose experts by their own routers.
    """
    without = trajectory if trajectory.routes is None else replace(trajectory, routes=None)
    return [(part, _taken(without, [part])) for part in _trained_slices(trajectory)]


def values_of_targets(
    trajectories: Sequence[Trajectory],
    compute: Callable[[PackedBatch], Tensor],
    ranks: Ranks,
    *,
    budget_tokens: int,
    shares_prefixes: bool = True,
) -> list[NDArray[np.float64]]:
    """[S] of each trajectory, in order: the results of `compute` at its targets, without gradient.
    Collective.

    `compute`: returns a number for each sampled token of a micro-batch. `budget_tokens`: most tokens of one.
    `shares_prefixes`: see `collate`.
    """
    segments = [[segment for _, segment in segments_of(trajectory)] for trajectory in trajectories]
    samples = [TrainingSample(trajectory=s, advantage=0.0, group=0) for each in segments for s in each]
    computed: list[tuple[Tensor, list[int]]] = []
    packer = Packer(budget_tokens=budget_tokens, shares_prefixes=shares_prefixes)
    for batch, live in in_lockstep(packer.microbatches([samples]), ranks, shares_prefixes=shares_prefixes):
        with torch.no_grad():
            value_S = compute(batch)
        if live:
            computed.append((value_S, [num_targets(sample.trajectory) for sample in batch.samples]))
    # Not before the last micro-batch is queued: the host would wait for a GPU after each.
    values = [
        np.split(value_S.double().cpu().numpy(), np.cumsum(counts)[:-1]) for value_S, counts in computed
    ]
    remaining = iter(value_S for of_batch in values for value_S in of_batch)
    return [np.concatenate([next(remaining) for _ in each]) for each in segments]


def trained_segments(sample: TrainingSample) -> TrainingSample:
    """The sample without the segments that have no token to train on; at least one stays."""
    kept = _trained_slices(sample.trajectory)
    return sample if len(kept) == len(sample.trajectory.segment_slices) else _part(sample, kept)


def cut(sample: TrainingSample, packer: Packer) -> list[TrainingSample]:
    """The sample as parts of consecutive segments, each of which fits into a micro-batch of a packer.

    Raises ConfigError if a segment does not fit.
    """
    slices = sample.trajectory.segment_slices
    remaining = iter(slices)
    whole = [_part(sample, [part]) for part in slices]
    parts = [[next(remaining) for _ in microbatch] for microbatch in packer.microbatches([whole])]
    return [
        replace(
            _part(sample, part),
            num_masked=0 if number else sample.num_masked,
            is_continued=number < len(parts) - 1,
        )
        for number, part in enumerate(parts)
    ]


def split_targets(value_S: NDArray[np.float64], trajectory: Trajectory) -> list[NDArray[np.float64]]:
    """A value [S] of the trajectory's targets, cut into one array for each of `segments_of`."""
    if len(trajectory.segments) <= 1:
        return [value_S]
    target_T = is_target(trajectory)
    counts = [int(target_T[part].sum()) for part in _trained_slices(trajectory)]
    return np.split(value_S, np.cumsum(counts)[:-1])


def _trained_slices(trajectory: Trajectory) -> list[slice]:
    slices = list(trajectory.segment_slices)
    if len(slices) == 1:
        return slices
    target_T = is_target(trajectory)
    return [part for part in slices if target_T[part].any()] or slices[:1]


def _part(sample: TrainingSample, slices: Sequence[slice]) -> TrainingSample:
    """The sample with these segments only."""
    return replace(
        sample,
        trajectory=_taken(sample.trajectory, slices),
        advantage=_at(sample.advantage, slices),
        lag=_at(sample.lag, slices),
        beyond=_at(sample.beyond, slices),
    )


def _taken(trajectory: Trajectory, slices: Sequence[slice]) -> Trajectory:
    if len(trajectory.segments) <= 1:
        return trajectory
    of_tokens = ("tokens", "loss_mask", "logprobs", "versions")
    lengths = tuple(part.stop - part.start for part in slices)
    return replace(
        trajectory,
        **{name: _at(getattr(trajectory, name), slices) for name in of_tokens},
        segments=lengths if len(lengths) > 1 else (),
        turns=(),
        routes=routes_of(trajectory, slices),
        arrays={
            name: _at(array, slices) if array.shape[:1] == (trajectory.num_tokens,) else array
            for name, array in trajectory.arrays_without_steps.items()
        },
    )


def _at(value: Any, slices: Sequence[slice]) -> Any:
    """The entries of these tokens, if the value has one for each token."""
    return np.concatenate([value[part] for part in slices]) if isinstance(value, np.ndarray) else value
