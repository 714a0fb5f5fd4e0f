"""Attention of a packed batch in rectangles of sequences, on any device and in any dtype.

The flat rows are laid out as [sequences, longest] and gathered back afterwards. Plain causal attention is
correct there: padding is at the end, where no real query attends to it. Sequences with a shared prefix need a
mask. With a sliding window, blocks of queries attend to the keys within reach, so that neither memory nor
work grows with the square of the length.

There is one gather for each of queries, keys, values and outputs, over all rectangles. The gathers have a
hand-written backward: without shared rows both directions are permutations, and autograd's backward costs
more than the attention itself on a CPU.

Shape suffixes: U rows, N sequences of a rectangle, L longest number of own rows of them, P padded positions
of queries in all rectangles, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.batching.attention_layout import RectangleLayout


class _Pad(torch.autograd.Function):
    """[U, H, D] -> [P, H, D]. Padding gets no gradient, so the backward reads real positions only."""

    @staticmethod
    def forward(ctx: Any, row_UHD: Tensor, layout: RectangleLayout) -> Tensor:
        ctx.layout = layout
        return row_UHD.index_select(0, layout.query_row_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.layout.position_U), None


class _Unpad(torch.autograd.Function):
    """[P, H, D] -> [U, H, D]"""

    @staticmethod
    def forward(ctx: Any, padded_PHD: Tensor, layout: RectangleLayout) -> Tensor:
        ctx.layout = layout
        return padded_PHD.index_select(0, layout.position_U)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_UHD,) = grads
        padded_PHD = grad_UHD.new_zeros((len(ctx.layout.query_row_P), *grad_UHD.shape[1:]))
        return padded_PHD.index_copy_(0, ctx.layout.position_U, grad_UHD), None


def rectangle_attention(
    query_UHD: Tensor,
    key_UHD: Tensor,
    value_UHD: Tensor,
    layout: RectangleLayout,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """[U, H, D] outputs. `window`: number of keys that a query attends to; None: all before it and its own.

    Keys and values may have fewer heads than queries.
    """
    query_PHD = _apply(_Pad, query_UHD, layout)
    if layout.key_row_K is None:
        keys, values = _apply(_Pad, key_UHD, layout), _apply(_Pad, value_UHD, layout)
    else:
        # Autograd's backward sums the gradients of a row's uses in the order of `key_row_K`.
        keys, values = (x.index_select(0, layout.key_row_K) for x in (key_UHD, value_UHD))
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": query_UHD.shape[1] != key_UHD.shape[1]}
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
        if rectangle.is_plain(window):
            out_NHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
        else:
            parts = [
                F.scaled_dot_product_attention(
                    q[:, :, queries], k[:, :, columns], v[:, :, columns], attn_mask=mask, **settings
                )
                for queries, columns, mask in rectangle.parts(window=window, dtype=q.dtype, device=q.device)
            ]
            out_NHLD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        outs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return _apply(_Unpad, outs[0] if len(outs) == 1 else torch.cat(outs), layout)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out
