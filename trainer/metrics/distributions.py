"""Computes distributions over a step's samples and tokens, on all ranks.

Lengths of samples are few and are gathered. There may be millions of tokens: |log pi/mu| is counted in fixed
buckets on the device, and the counts are summed with the other totals of the step.

Shape suffixes: S sampled tokens, K buckets, B samples of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LOWEST, _DECADES, _PER_DECADE = 1e-7, 9, 32
NUM_BUCKETS = _DECADES * _PER_DECADE + 2
"""The first bucket is 0 to 1e-7; then 32 for each power of ten, so 7.5 % wide, up to 100; the last is
above."""
PERCENTILES = (10, 50, 90, 99)


class MagnitudeHistogram:
    """Counts of magnitudes by size, kept on the device until the end of the step."""

    def __init__(self) -> None:
        self.counts_K: Tensor | None = None
        self._max: Tensor | None = None

    def add(self, values_S: Tensor, weights_S: Tensor) -> None:
        """Counts |values| with their weights, which may be 0."""
        sizes_S = values_S.abs().float()
        decades_S = torch.log10(sizes_S.clamp_min(1e-30)) - math.log10(_LOWEST)
        # Numbers that are not finite belong to the last bucket.
        at_S = (decades_S.nan_to_num(nan=1e9) * _PER_DECADE).floor().clamp(-1, NUM_BUCKETS - 2).long() + 1
        if self.counts_K is None:
            self.counts_K = torch.zeros(NUM_BUCKETS, dtype=torch.float64, device=values_S.device)
            self._max = torch.zeros((), dtype=torch.float32, device=values_S.device)
        # Not bincount, which synchronizes with a GPU to find the largest index.
        self.counts_K.index_add_(0, at_S, weights_S.double())
        assert self._max is not None
        largest = torch.where(weights_S > 0, sizes_S, 0.0).nan_to_num(nan=torch.inf)
        self._max = torch.maximum(self._max, torch.cat([largest, self._max[None]]).amax())

    @property
    def on_host_K(self) -> Tensor:
        """The counts, float64 on the CPU; zeros if nothing was added."""
        counts_K = self.counts_K
        return torch.zeros(NUM_BUCKETS, dtype=torch.float64) if counts_K is None else counts_K.cpu()

    @property
    def largest(self) -> float:
        return 0.0 if self._max is None else float(self._max)


def percentile_of_counts(counts_K: NDArray[np.float64], percent: float) -> float:
    """A percentile of the magnitudes in a MagnitudeHistogram: the upper end of its bucket.

    Infinite above 100. `counts_K` must not be all zero.
    """
    reached_K = np.cumsum(counts_K)
    bucket = int(np.searchsorted(reached_K, reached_K[-1] * percent / 100))
    if bucket >= NUM_BUCKETS - 1:
        return math.inf
    return _LOWEST * 10 ** (bucket / _PER_DECADE)


def length_metrics(response_B: NDArray[np.float64], prompt_B: NDArray[np.float64]) -> dict[str, Any]:
    """Percentiles and largest values of the lengths of a step's samples; nothing for no samples."""
    if len(response_B) == 0:
        return {}
    found = {
        f"response_length_p{percent}": value
        for percent, value in zip(PERCENTILES, np.percentile(response_B, PERCENTILES).tolist(), strict=True)
    }
    return found | {
        "response_length_max": float(response_B.max()),
        "prompt_tokens_max": float(prompt_B.max()),
    }


def as_parts(vectors: Sequence[Tensor]) -> Tensor:
    """Joins several vectors, preceded by their lengths, into one float64 CPU vector, for a single gather."""
    lengths = torch.tensor([len(vector) for vector in vectors], dtype=torch.float64)
    return torch.cat([lengths, *(vector.double().cpu() for vector in vectors)])


def joined_parts(gathered: Tensor, *, num_vectors: int) -> list[Tensor]:
    """Splits the gathered `as_parts` of all ranks: returns each vector, concatenated over the ranks."""
    parts: list[list[Tensor]] = [[] for _ in range(num_vectors)]
    at = 0
    while at < len(gathered):
        lengths = [int(length) for length in gathered[at : at + num_vectors].tolist()]
        at += num_vectors
        for part, length in zip(parts, lengths, strict=True):
            part.append(gathered[at : at + length])
            at += length
    return [torch.cat(part) for part in parts]
