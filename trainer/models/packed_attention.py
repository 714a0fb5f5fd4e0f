"""Attention inside each sequence of a packed batch, registered with transformers as `areal_packed`.

A mask of T x T would be correct and waste nearly all work: a pack of 2,000 tokens holds about a hundred
sequences. So, for the attention only, the flat rows are laid out as [sequences, longest] and gathered back
afterwards. Plain causal attention is correct there: padding is at the end, where no real query attends to it.
Sequences of very different lengths go into several such rectangles, one for each power of two, so that
padding at most doubles the work. The layout is computed on the host, once per forward.

A sequence whose prefix an earlier one computes (`batching/shared_prefixes.py`) has queries only for its own
rows; its keys and values are gathered from the rows of both. There the prefix is padded on the left and the
own rows on the right, so that a query's own key is in the same column for all sequences:

    prefix of 3, own rows of 2    p p p | o o .
    prefix of 2, own rows of 3    . p p | o o o

The gathers of all rectangles are one for each of queries, keys, values and outputs. They have a hand-written
backward: without shared rows both directions are permutations, and autograd's own backward costs more than
the attention on a CPU.

Shape suffixes: U rows (packed tokens, shared ones once), N sequences of a rectangle, L longest number of own
rows of them, M of keys, P padded positions of queries in all rectangles, K of keys, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from areal_like.errors import ConfigError
from trainer.batching.shared_prefixes import SharedRows

ATTENTION_NAME = "areal_packed"
_LONG = 1024
"""Sequences with more keys than this share a rectangle only if their prefixes are equally long: then one mask
serves all of them, and it exists for this many queries at a time."""


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
    _masks: dict[tuple[int | None, torch.dtype], list[tuple[slice, slice, Tensor]]] = field(
        default_factory=dict
    )

    @property
    def num_keys(self) -> int:
        """M: number of columns of keys."""
        return self.longest_prefix + self.num_queries

    def masks(
        self, *, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """(queries, keys, mask [N or 1, 1, queries, keys]) of parts that cover the rectangle.

        The mask is added to the scores. One of a single part is kept for the other layers.
        """
        if (kept := self._masks.get((window, dtype))) is not None:
            yield from kept
            return
        for start in range(0, self.num_queries, _LONG):
            part = self._mask(start, window=window, dtype=dtype, device=device)
            if self.num_queries <= _LONG:
                self._masks[window, dtype] = [part]
            yield part

    def _mask(
        self, start: int, *, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[slice, slice, Tensor]:
        stop, longest = min(start + _LONG, self.num_queries), self.longest_prefix
        keys = slice(0 if window is None else max(longest + start - window + 1, 0), longest + stop)
        key_M = torch.arange(keys.start, keys.stop, device=device)
        query_L1 = torch.arange(longest + start, longest + stop, device=device)[:, None]
        allowed_LM = key_M <= query_L1
        if window is not None:
            allowed_LM &= key_M > query_L1 - window
        allowed_NLM = allowed_LM[None]
        if self.prefix_N is not None:
            allowed_NLM = allowed_NLM & (key_M >= longest - self.prefix_N[:, None])[:, None]
        mask_NLM = torch.zeros(allowed_NLM.shape, dtype=dtype, device=device)
        mask_NLM.masked_fill_(~allowed_NLM, -torch.inf)
        return slice(start, stop), keys, mask_NLM[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """The arrangement of one micro-batch's sequences for attention."""

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
    ) -> PackedLayout:
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
                # The place in its sequence of the token in each column; clamped where the column is padding.
                place_nM = np.arange(-rectangle.longest_prefix, rectangle.num_queries) + prefix_n1
                token_nM = (ends_N[at_n, None] - length_n1) + np.clip(place_nM, 0, length_n1 - 1)
                key_rows.append(shared.row_T[token_nM].ravel())

        def put(parts: Sequence[NDArray[np.int64]]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(device)

        return cls(
            rectangles=tuple(rectangles),
            query_row_P=put(query_rows),
            position_U=put([position_U]),
            key_row_K=put(key_rows) if key_rows else None,
        )


def _rectangle(prefix_n: NDArray[np.int64], num_queries: int, *, device: torch.device | str) -> Rectangle:
    is_even = bool((prefix_n == prefix_n[0]).all())
    return Rectangle(
        num_sequences=len(prefix_n),
        num_queries=num_queries,
        longest_prefix=int(prefix_n.max()),
        prefix_N=None if is_even else torch.from_numpy(prefix_n).to(device),
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
        is_one = len(own_n) * int(own_n.max()) <= 2 * int(own_n.sum())
        if is_one and len(own_n) * int(lengths_n.max()) <= 2 * int(lengths_n.sum()):
            classes_N[is_in_N] = first
        else:
            classes_N[is_in_N] = first + 64 * _power_of_two(own_n) + _power_of_two(prefix_N[is_in_N] + 1)
    classes_N[is_long_N] = (prefix_N * 64 + _power_of_two(own_N) + (1 << 32))[is_long_N]
    return classes_N


def _power_of_two(value_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] the exponent of the next power of two."""
    return np.ceil(np.log2(value_N)).astype(np.int64)


class _Pad(torch.autograd.Function):
    """[U, H, D] -> [P, H, D]. Padding gets no gradient, so the backward reads real positions only."""

    @staticmethod
    def forward(ctx: Any, row_UHD: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return row_UHD.index_select(0, layout.query_row_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.layout.position_U), None


class _Unpad(torch.autograd.Function):
    """[P, H, D] -> [U, H, D]"""

    @staticmethod
    def forward(ctx: Any, padded_PHD: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return padded_PHD.index_select(0, layout.position_U)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_UHD,) = grads
        padded_PHD = grad_UHD.new_zeros((len(ctx.layout.query_row_P), *grad_UHD.shape[1:]))
        return padded_PHD.index_copy_(0, ctx.layout.position_U, grad_UHD), None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Dropout is ignored: a policy's log-probs must be those of the engine. Raises ConfigError for architectures
    whose attention is more than softmax over a causal window.
    """
    if packed_layout is None or softcap is not None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot be trained packed: its attention uses soft-capping or sinks, "
            "or its model does not hand keyword arguments down to it. Choose another model"
        )
    assert attention_mask is None and len(query) == 1
    layout = packed_layout
    query_UHD, key_UHD, value_UHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    query_PHD = _apply(_Pad, query_UHD, layout)
    if layout.key_row_K is None:
        keys, values = _apply(_Pad, key_UHD, layout), _apply(_Pad, value_UHD, layout)
    else:
        # Autograd's backward adds up the gradients of a row's uses in the order of `key_row_K`.
        keys, values = (x.index_select(0, layout.key_row_K) for x in (key_UHD, value_UHD))
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    query_sizes = [r.num_sequences * r.num_queries for r in layout.rectangles]
    key_sizes = [r.num_sequences * r.num_keys for r in layout.rectangles]
    outs = []
    for rectangle, *qkv in zip(
        layout.rectangles,
        torch.split(query_PHD, query_sizes),
        torch.split(keys, key_sizes),
        torch.split(values, key_sizes),
        strict=True,
    ):
        q, k, v = (x.view(rectangle.num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)
        if rectangle.longest_prefix or (
            sliding_window is not None and rectangle.num_queries > sliding_window
        ):
            masks = rectangle.masks(window=sliding_window, dtype=q.dtype, device=q.device)
            parts = [
                F.scaled_dot_product_attention(
                    q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask, **settings
                )
                for rows, columns, mask in masks
            ]
            out_NHLD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        else:
            out_NHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
        outs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return _apply(_Unpad, outs[0] if len(outs) == 1 else torch.cat(outs), layout)[None], None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


AttentionInterface.register(ATTENTION_NAME, packed_attention)
