"""A sample as the optimizer step gets it: a trajectory with its advantage, group and lag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSample:
    """One trajectory with its advantage, its group's position in the step, and its lag."""

    trajectory: Trajectory
    advantage: float | NDArray[np.float64]
    """One number for all its tokens, or a float64 array [num_tokens]."""
    group: int
    """Position of its group in the step, counted over all ranks."""
    lag: int | NDArray[np.int64] = 0
    """Optimizer steps since the weights that sampled its tokens: a number, or an int64 array [num_tokens]."""
    beyond: NDArray[np.bool_] | None = None
    """bool [num_tokens]: trained tokens that are beyond the staleness bound; None: none."""
    num_masked: int = 0
    """Sampled tokens that are context only, because they are beyond the staleness bound; they count in the
    divisors of normalizers."""
    is_continued: bool = False
    """It is a part of a sample that is too long for a micro-batch, and the next part follows."""


MicroBatch = tuple[TrainingSample, ...]
"""Samples that run through the model together; `collate` turns them into a PackedBatch."""
