"""Pads packed rows to rectangles of similar lengths, for computations on single sequences.

Shape suffixes: T rows (tokens), N sequences, n sequences of one block, L longest of them, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Sequences of similar lengths as a padded rectangle."""

    sequences_n: Tensor
    """int64 indices into N."""
    places_nL: Tensor
    """int64 indices into T; 0 in the padding."""
    real_nL: Tensor
    """bool: not padding."""
    is_dense: bool
    """True: the rectangle is all T rows in order, without padding."""

    @cached_property
    def pairs_nLL(self) -> Tensor:
        """bool: neither token is padding."""
        return self.real_nL[:, :, None] & self.real_nL[:, None, :]

    def pad(self, value_TD: Tensor) -> Tensor:
        """[n, L, D] from [T, D]; the padding repeats row 0."""
        if self.is_dense:
            return value_TD.view(*self.places_nL.shape, -1)
        return value_TD.index_select(0, self.places_nL.flatten()).view(*self.places_nL.shape, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentRows:
    """The sequence of each row of a layer's input. Sequences are contiguous and in order."""

    segment_T: Tensor
    """int64 in 0..N-1."""
    lengths: list[int]
    """Number of rows of each sequence."""
    blocks: tuple[Block, ...]

    @classmethod
    def of(
        cls, lengths: Sequence[int], *, device: torch.device | str = "cpu", like: Sequence[int] | None = None
    ) -> SegmentRows:
        """Rows of sequences with these lengths (0 allowed).

        `like`: lengths by which blocks are formed; default `lengths`.
        """
        lengths_N, chosen_N = np.asarray(lengths), np.asarray(like or lengths)
        starts_N = np.cumsum(lengths_N) - lengths_N
        # Gram matrices cost the square of the length, so a block's lengths are within a factor of root two.
        classes_N = np.ceil(2 * np.log2(np.maximum(chosen_N, 1)))
        blocks = []
        for wanted in np.unique(classes_N):
            sequences_n = np.flatnonzero(classes_N == wanted)
            offsets_L = np.arange(max(int(lengths_N[sequences_n].max()), 1))
            real_nL = offsets_L < lengths_N[sequences_n, None]
            places_nL = np.where(real_nL, starts_N[sequences_n, None] + offsets_L, 0)
            blocks.append(
                Block(
                    sequences_n=torch.from_numpy(sequences_n).to(device),
                    places_nL=torch.from_numpy(places_nL).to(device),
                    real_nL=torch.from_numpy(real_nL).to(device),
                    is_dense=bool(real_nL.all()) and places_nL.size == lengths_N.sum(),
                )
            )
        segment_T = torch.from_numpy(np.repeat(np.arange(len(lengths_N)), lengths_N)).to(device)
        return cls(segment_T=segment_T, lengths=list(lengths), blocks=tuple(blocks))

    def sum_ND(self, value_TD: Tensor) -> Tensor:
        """[N, D] sum of [T, D] over each sequence's rows."""
        return value_TD.new_zeros(len(self.lengths), value_TD.shape[1]).index_add_(
            0, self.segment_T, value_TD
        )
