"""Attention inside each sequence of a packed batch, registered with transformers as `areal_packed`.

A mask of T x T would be correct but waste nearly all of the work: a pack of 2,000 tokens holds about a
hundred sequences. `rectangle_attention` pads the rows to rectangles of sequences, `varlen.py` calls a CUDA
kernel that takes the bounds of the sequences. `batching/attention_layout.py` arranges the rows for either.

In rectangles, on any device and in any dtype, plain causal attention is correct: padding is at the end, where
no real query attends to it. Sequences with a shared prefix need a mask. With a sliding window, blocks of
queries attend to the keys within reach, so that neither memory nor work grows with the square of the length.
There is one gather for each of queries, keys, values and outputs, over all rectangles. The gathers have a
hand-written backward: without shared rows both directions are permutations, and autograd's backward costs
more than the attention itself on a CPU.

`trainer.attention` chooses. With `auto` each call decides by its tensors, because the layers of a model may
differ: varlen wherever the kernel takes them, else rectangles.

Shape suffixes: T packed tokens, U rows that the model computes for them, N sequences of a rectangle, L
longest number of own rows of them, P padded positions of queries in all rectangles, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from areal_like.errors import ConfigError
from trainer.attention import varlen
from trainer.attention.context import ContextExchange
from trainer.batching.attention_layout import AttentionLayout, RectangleLayout

ATTENTION_NAME = "areal_packed"
Kind = Literal["auto", "rectangles", "varlen"]
_SHORT = 192
"""Keys up to which a CPU attends in float32 whatever the dtype: the backward of its kernel in bfloat16 calls
oneDNN for each small block and takes up to three times as long (torch 2.13)."""


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
    query_PHD = pad_rows(query_UHD, layout)
    if layout.key_row_K is None:
        keys, values = pad_rows(key_UHD, layout), pad_rows(value_UHD, layout)
    else:
        # Autograd's backward sums the gradients of a row's uses in the order of `key_row_K`.
        keys, values = (x.index_select(0, layout.key_row_K) for x in (key_UHD, value_UHD))
    settings: dict[str, Any] = {"scale": scale, "enable_gqa": query_UHD.shape[1] != key_UHD.shape[1]}
    is_narrow = query_UHD.device.type == "cpu" and query_UHD.element_size() < 4
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
        if is_narrow and rectangle.num_keys <= _SHORT:
            qkv = [x.float() for x in qkv]
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
        outs.append(out_NHLD.transpose(1, 2).flatten(0, 1).to(query_UHD.dtype))
    return unpad_rows(outs[0] if len(outs) == 1 else torch.cat(outs), layout)


def pad_rows(row_U: Tensor, layout: RectangleLayout) -> Tensor:
    """[U, ...] -> [P, ...]: the row in each position of the rectangles' queries."""
    return _apply(_Pad, row_U, layout)


def unpad_rows(padded_P: Tensor, layout: RectangleLayout) -> Tensor:
    """[P, ...] -> [U, ...]: the inverse of `pad_rows`, without the padding."""
    return _apply(_Unpad, padded_P, layout)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: AttentionLayout | None = None,
    packed_kind: Kind = "auto",
    packed_context: ContextExchange | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    `packed_kind`: `trainer.attention`. `packed_context`: the rows are those of this rank of a context group,
    and the layout is that of all its rows. Dropout is ignored: a policy's log-probs must be those of the
    engine. Raises ConfigError for architectures whose attention is more than softmax over a causal window,
    for a kernel that was chosen and does not take the tensors, and for heads that a context group cannot
    divide.
    """
    if packed_layout is None or attention_mask is not None or softcap is not None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot be trained packed: its attention uses soft-capping or sinks, "
            "or its model does not pass keyword arguments down to it, or makes masks. Choose another model"
        )
    assert len(query) == 1
    packed_layout.users.append(module)
    query_UHD, key_UHD, value_UHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packed_context is not None:
        query_UHD, key_UHD, value_UHD = packed_context.to_heads(query_UHD, key_UHD, value_UHD)
    if uses_varlen(packed_kind, query_UHD, value_UHD):
        out_UHD = varlen.varlen_attention(
            query_UHD, key_UHD, value_UHD, packed_layout.varlen, window=sliding_window, scale=scaling
        )
    else:
        out_UHD = rectangle_attention(
            query_UHD, key_UHD, value_UHD, packed_layout.rectangles, window=sliding_window, scale=scaling
        )
    if packed_context is not None:
        out_UHD = packed_context.to_rows(out_UHD)
    return out_UHD[None], None


def uses_varlen(kind: Kind, query_UHD: Tensor, value_UHD: Tensor) -> bool:
    """True if the varlen kernel is called. Raises ConfigError if it was chosen and cannot be used."""
    if kind == "rectangles":
        return False
    obstacle = varlen.obstacle(query_UHD, value_UHD)
    if obstacle and kind == "varlen":
        raise ConfigError(f"trainer.attention=varlen: {obstacle}. Set trainer.attention=auto")
    return not obstacle


AttentionInterface.register(ATTENTION_NAME, packed_attention)
