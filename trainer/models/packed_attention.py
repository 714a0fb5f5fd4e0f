"""Attention inside each sequence of a packed batch, registered with transformers as `areal_packed`.

A mask of T x T would be correct and waste nearly all work: a pack of 2,000 tokens holds about a hundred
sequences. So, for the attention only, the flat tokens are laid out as [sequences, longest] and gathered back
afterwards. Plain causal attention is correct there: padding is at the end, where no real query attends to it.
Sequences of very different lengths go into several such rectangles, one for each power of two, so that
padding at most doubles the work. The layout is computed on the host, once per micro-batch.

The gathers have a hand-written backward: both directions are permutations, and autograd's own backward
(index_put with accumulation) costs more than the attention on a CPU.

Shape suffixes: T packed tokens, N sequences, L longest of them, H heads, D head size, P = N * L padded
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from areal_like.errors import ConfigError

ATTENTION_NAME = "areal_packed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rectangle:
    """Sequences that are padded to one length, for one call of attention."""

    shape: tuple[int, int]
    """(N, L)"""
    source_P: Tensor
    """int64: index of the packed token in each padded position (padding repeats a sequence's last)."""
    tokens_T: Tensor
    """int64: indices of this rectangle's packed tokens, in packed order."""
    padded_positions_T: Tensor
    """int64: the padded position of each of `tokens_T`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLayout:
    """The arrangement of one micro-batch's sequences for attention."""

    rectangles: tuple[Rectangle, ...]
    order_T: Tensor | None
    """int64: puts the rectangles' concatenated tokens back in packed order; None for one rectangle."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> PackedLayout:
        """The layout of sequences of these lengths, packed in this order."""
        lengths_N = np.asarray(lengths)
        starts_N = np.cumsum(lengths_N) - lengths_N
        if len(lengths_N) * int(lengths_N.max()) <= 2 * int(lengths_N.sum()):
            classes_N = np.zeros(len(lengths_N), dtype=np.int64)
        else:
            classes_N = np.ceil(np.log2(lengths_N)).astype(np.int64)
        rectangles = tuple(
            _rectangle(starts_N[classes_N == c], lengths_N[classes_N == c], device=device)
            for c in np.unique(classes_N)
        )
        if len(rectangles) == 1:
            return cls(rectangles=rectangles, order_T=None)
        return cls(rectangles=rectangles, order_T=torch.cat([r.tokens_T for r in rectangles]).argsort())


def _rectangle(
    starts_N: NDArray[np.int64], lengths_N: NDArray[np.int64], *, device: torch.device | str
) -> Rectangle:
    longest = int(lengths_N.max())
    offsets_L = np.arange(longest)
    source_NL = starts_N[:, None] + np.minimum(offsets_L, lengths_N[:, None] - 1)
    real_P = (offsets_L < lengths_N[:, None]).ravel()
    return Rectangle(
        shape=(len(lengths_N), longest),
        source_P=torch.from_numpy(source_NL.ravel()).to(device),
        tokens_T=torch.from_numpy(source_NL.ravel()[real_P]).to(device),
        padded_positions_T=torch.from_numpy(np.flatnonzero(real_P)).to(device),
    )


class _Pad(torch.autograd.Function):
    """[T, H, D] -> [P, H, D]. Padding gets no gradient, so the backward reads real positions only."""

    @staticmethod
    def forward(ctx: Any, flat_THD: Tensor, rectangle: Rectangle) -> Tensor:
        ctx.rectangle, ctx.num_tokens = rectangle, len(flat_THD)
        return flat_THD.index_select(0, rectangle.source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_PHD,) = grads
        real_THD = grad_PHD.index_select(0, ctx.rectangle.padded_positions_T)
        if len(real_THD) == ctx.num_tokens:
            return real_THD, None
        flat_THD = grad_PHD.new_zeros((ctx.num_tokens, *grad_PHD.shape[1:]))
        return flat_THD.index_copy_(0, ctx.rectangle.tokens_T, real_THD), None


class _Unpad(torch.autograd.Function):
    """[P, H, D] -> [T', H, D], the tokens of one rectangle."""

    @staticmethod
    def forward(ctx: Any, padded_PHD: Tensor, rectangle: Rectangle) -> Tensor:
        ctx.rectangle, ctx.num_positions = rectangle, len(padded_PHD)
        return padded_PHD.index_select(0, rectangle.padded_positions_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_THD,) = grads
        padded_PHD = grad_THD.new_zeros((ctx.num_positions, *grad_THD.shape[1:]))
        return padded_PHD.index_copy_(0, ctx.rectangle.padded_positions_T, grad_THD), None


class _Reorder(torch.autograd.Function):
    """Applies a permutation of tokens."""

    @staticmethod
    def forward(ctx: Any, flat_THD: Tensor, order_T: Tensor) -> Tensor:
        ctx.order_T = order_T
        return flat_THD.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_THD,) = grads
        return torch.empty_like(grad_THD).index_copy_(0, ctx.order_T, grad_THD), None


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
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    parts = []
    for rectangle in packed_layout.rectangles:
        num_seqs, longest = rectangle.shape
        padded = [_apply(_Pad, x, rectangle) for x in flat]
        q, k, v = (x.view(num_seqs, longest, *x.shape[1:]).transpose(1, 2) for x in padded)
        windowed = sliding_window is not None and longest > sliding_window
        out_NHLD = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window_mask(longest, sliding_window, device=q.device) if windowed else None,
            is_causal=not windowed,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(_apply(_Unpad, out_NHLD.transpose(1, 2).flatten(0, 1), rectangle))
    if packed_layout.order_T is None:
        return parts[0][None], None
    return _apply(_Reorder, torch.cat(parts), packed_layout.order_T)[None], None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _window_mask(longest: int, window: int | None, *, device: torch.device) -> Tensor:
    assert window is not None
    query_L1, key_L = torch.arange(longest, device=device)[:, None], torch.arange(longest, device=device)
    return (key_L <= query_L1) & (key_L > query_L1 - window)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
