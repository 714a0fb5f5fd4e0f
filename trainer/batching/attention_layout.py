"""Arranges the rows of a micro-batch for attention; computed on the host.

Two arrangements; `trainer/attention/` chooses one for each call (linear attention has bounds of its own):

    rectangles   rows padded to [sequences, longest], for attention with equal lengths: CPUs, any dtype
    varlen       rows end to end with the bounds of the sequences, for a kernel that takes these: CUDA

A sequence whose prefix is computed by an earlier sequence (`shared_prefixes.py`) has queries only for its own
rows; its keys and values are those of both. In a rectangle the prefix is padded on the left and the own rows
on the right, so that a query's own key is in the same column for all sequences:

    prefix of 3, own rows of 2    p p p | o o .
    prefix of 2, own rows of 3    . p p | o o o

Sequences of very different lengths go into several rectangles, one for each power of two, so that padding
at most doubles the work.

Shape suffixes: U rows (packed tokens, shared ones once), T packed tokens, N sequences (of a rectangle), L
longest number of own rows of them, M of keys, P padded positions of queries in all rectangles, K of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batching.device_copies import copied
from trainer.batching.shared_prefixes import SharedRows

_LONG = 1024
"""Sequences with more keys than this share a rectangle only if their prefixes are equally long, so that one
mask serves all of them. Each block of this many queries has a mask, which is kept for the backward."""
_FEW_KEYS = 4096
"""Up to this many keys, padding of shared prefixes may double their number, for the sake of fewer calls."""
_LEAST_BLOCK = 256
"""Least number of queries in a block that attends to a sliding window of keys."""


class AttentionLayout:
    """The arrangements of one micro-batch's sequences, each made when it is first used."""

    # Not a dataclass: of those among a module's inputs FSDP2 makes copies, so each layer would have its own.
    def __init__(
        self,
        *,
        lengths: tuple[int, ...],
        device: torch.device,
        shared: SharedRows | None,
        row_T: Tensor | None,
    ) -> None:
        """`lengths`: [N] number of tokens of each sequence, in packed order. `shared`: its rows; None: one
        for each token. `row_T`: `shared.row_T` on the device."""
        self.lengths = lengths
        self.device = device
        self.shared = shared
        self.row_T = row_T
        self.users: list[nn.Module] = []
        """The attention layers that have used it since the beginning of a model's forward."""

    @cached_property
    def rectangles(self) -> RectangleLayout:
        return RectangleLayout.of(self.lengths, device=self.device, shared=self.shared)

    @cached_property
    def linear(self) -> LinearLayout:
        """For layers with a state; no sequence may have a shared prefix."""
        assert self.shared is None
        bounds = np.cumsum([0, *self.lengths], dtype=np.int64)
        index_U = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        of_sequences, of_rows = copied([bounds, index_U], self.device)
        return LinearLayout(bounds=of_sequences, index_1U=of_rows[None])

    @cached_property
    def varlen(self) -> VarlenLayout:
        own = self.lengths if self.shared is None else self.shared.own_lengths
        bounds = [np.cumsum([0, *lengths], dtype=np.int32) for lengths in (own, self.lengths)]
        of_queries, of_keys = copied(bounds, self.device)
        return VarlenLayout(
            query_bounds=of_queries,
            key_bounds=of_keys,
            most_queries=max(own),
            most_keys=max(self.lengths),
            row_T=self.row_T,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class VarlenLayout:
    """The sequences end to end: queries are the rows, keys those of each packed token."""

    query_bounds: Tensor
    """int32 [N + 1]: start of each sequence's own rows, then the end of the last."""
    key_bounds: Tensor
    """int32 [N + 1]: the same for its keys, which are its tokens."""
    most_queries: int
    most_keys: int
    """Largest number of tokens of a sequence."""
    row_T: Tensor | None
    """int64: the row of each key. None: keys are the rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearLayout:
    """The sequences end to end, for the kernels of linear attention."""

    bounds: Tensor
    """int64 [N + 1]: start of each sequence, then the end of the last."""
    index_1U: Tensor
    """int32 [1, U]: the sequence of each row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rectangle:
    """Sequences whose own rows are padded to one length, for one call of attention."""

    num_sequences: int
    """N"""
    num_queries: int
    """L: longest number of own rows."""
    longest_prefix: int
    """Number of columns of keys before the own rows; 0: no sequence has a shared prefix."""
    prefix_N: Tensor | None
    """int64: length of each sequence's prefix; None: all are equal."""
    _masks: dict[tuple[int | None, torch.dtype, tuple[int, ...]], Tensor] = field(default_factory=dict)

    @property
    def num_keys(self) -> int:
        """M: number of columns of keys."""
        return self.longest_prefix + self.num_queries

    def is_plain(self, window: int | None) -> bool:
        """True if the causal mask of a square is the only one needed."""
        return not self.longest_prefix and (window is None or self.num_queries <= window)

    def parts(
        self, *, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields (queries, keys, mask [N or 1, 1, queries, keys]) of parts that cover the rectangle.

        `window`: a query attends to this many keys, its own key last. The part of the keys is then as long as
        the window and the queries together. The mask is added to the scores.
        """
        block = _LONG if window is None else min(max(window, _LEAST_BLOCK), _LONG)
        for start in range(0, self.num_queries, block):
            queries = slice(start, min(start + block, self.num_queries))
            column = self.longest_prefix + start
            first_key = 0 if window is None else max(column - window + 1, 0)
            keys = slice(first_key, self.longest_prefix + queries.stop)
            yield queries, keys, self._mask(queries, keys, window=window, dtype=dtype, device=device)

    def _mask(
        self, queries: slice, keys: slice, *, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The mask of a part; cached for the other layers, whose backward keeps it anyway, and for equal
        parts."""
        column = self.longest_prefix + queries.start
        place: tuple[int, ...] = (column - keys.start, queries.stop - queries.start, keys.stop - keys.start)
        if self.prefix_N is not None:
            place = (*place, keys.start)
        if (kept := self._masks.get((window, dtype, place))) is not None:
            return kept
        size = (1, queries.stop - queries.start, keys.stop - keys.start)
        diagonal = column - keys.start  # of each query's own key
        mask_NLM = torch.full(size, -torch.inf, dtype=dtype, device=device).triu_(diagonal + 1)
        if window is not None:
            mask_NLM += torch.full_like(mask_NLM, -torch.inf).tril_(diagonal - window)
        if self.prefix_N is not None:
            padding_N1 = (self.longest_prefix - self.prefix_N)[:, None]
            is_padding_NM = torch.arange(keys.start, keys.stop, device=device) < padding_N1
            mask_NLM = mask_NLM.masked_fill(is_padding_NM[:, None], -torch.inf)
        mask_N1LM = mask_NLM[:, None]
        self._masks[window, dtype, place] = mask_N1LM
        return mask_N1LM


@dataclass(frozen=True, kw_only=True, eq=False)
class RectangleLayout:
    """The sequences of one micro-batch in rectangles."""

    rectangles: tuple[Rectangle, ...]
    query_row_P: Tensor
    """int64: the row in each position of the rectangles' queries, one rectangle after another. The padding
    repeats a sequence's last row."""
    position_U: Tensor
    """int64: the position of each row in `query_row_P`."""
    key_row_K: Tensor | None
    """int64: the row in each position of the rectangles' keys. None: the same as the queries."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        shared: SharedRows | None = None,
    ) -> RectangleLayout:
        """The layout of sequences of these lengths, packed in this order. `shared`: their rows."""
        lengths_N = np.asarray(lengths)
        own_N = lengths_N if shared is None else np.asarray(shared.own_lengths)
        classes_N = _classes(lengths_N, own_N)
        ends_N, row_ends_N = np.cumsum(lengths_N), np.cumsum(own_N)
        rectangles, query_rows, key_rows = [], [], []
        position_U = np.empty(int(row_ends_N[-1]), dtype=np.int64)
        num_positions = 0
        for wanted in np.unique(classes_N):
            at_n = np.flatnonzero(classes_N == wanted)
            own_n1, length_n1 = own_N[at_n, None], lengths_N[at_n, None]
            prefix_n1 = length_n1 - own_n1
            rectangle = _rectangle(prefix_n1[:, 0], int(own_n1.max()), device=device)
            rectangles.append(rectangle)
            offset_L = np.arange(rectangle.num_queries)
            query_row_nL = (row_ends_N[at_n, None] - own_n1) + np.minimum(offset_L, own_n1 - 1)
            real_P = np.flatnonzero(offset_L < own_n1)
            position_U[query_row_nL.ravel()[real_P]] = num_positions + real_P
            num_positions += query_row_nL.size
            query_rows.append(query_row_nL.ravel())
            if shared is not None:
                # The position in its sequence of the token in each column; clamped where the column is
                # padding.
                place_nM = np.arange(-rectangle.longest_prefix, rectangle.num_queries) + prefix_n1
                token_nM = (ends_N[at_n, None] - length_n1) + np.clip(place_nM, 0, length_n1 - 1)
                key_rows.append(shared.row_T[token_nM].ravel())

        indices = [np.concatenate(query_rows), position_U]
        query_row_P, position_U_, *key_row_K = copied(
            [*indices, np.concatenate(key_rows)] if key_rows else indices, device
        )
        return cls(
            rectangles=tuple(rectangles),
            query_row_P=query_row_P,
            position_U=position_U_,
            key_row_K=key_row_K[0] if key_row_K else None,
        )


def _rectangle(prefix_n: NDArray[np.int64], num_queries: int, *, device: torch.device | str) -> Rectangle:
    is_even = bool((prefix_n == prefix_n[0]).all())
    return Rectangle(
        num_sequences=len(prefix_n),
        num_queries=num_queries,
        longest_prefix=int(prefix_n.max()),
        prefix_N=None if is_even else copied([prefix_n], device)[0],
    )


def _classes(lengths_N: NDArray[np.int64], own_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] a number for each sequence; equal ones share a rectangle."""
    prefix_N = lengths_N - own_N
    classes_N = np.empty(len(lengths_N), dtype=np.int64)
    is_long_N = (prefix_N > 0) & (lengths_N > _LONG)
    for first, is_in_N in ((0, prefix_N == 0), (1 << 20, (prefix_N > 0) & ~is_long_N)):
        own_n, lengths_n = own_N[is_in_N], lengths_N[is_in_N]
        if not len(own_n):
            continue
        num_keys = len(own_n) * int(lengths_n.max())
        # Padded keys are copied in every layer, which the budget of a micro-batch does not count.
        most_padding = 2.0 if not first or num_keys <= _FEW_KEYS else 1.25
        is_one = len(own_n) * int(own_n.max()) <= 2 * int(own_n.sum())
        if is_one and num_keys <= most_padding * int(lengths_n.sum()):
            classes_N[is_in_N] = first
        else:
            quarters_n = np.ceil(4 * np.log2(prefix_N[is_in_N] + 1)).astype(np.int64)
            classes_N[is_in_N] = first + 256 * _power_of_two(own_n) + quarters_n
    classes_N[is_long_N] = (prefix_N * 64 + _power_of_two(own_N) + (1 << 32))[is_long_N]
    return classes_N


def _power_of_two(value_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.ceil(np.log2(value_N)).astype(np.int64)
