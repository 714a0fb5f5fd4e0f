"""Attention of a packed batch by torch's varlen kernel (FlashAttention), without padding. CUDA only.

The queries of a sequence are its own rows; its keys are those of its shared prefix and its own rows, gathered
from all rows. The kernel aligns both at their ends: the last query attends to the last key, which is its own.
So neither a shared prefix nor a sliding window needs a mask.

The gather of shared rows has its own backward: a prompt's key is in as many sequences as its group has
samples, and summing gradients one by one in bfloat16 would lose bits.

Left out: FlexAttention for float32 and other cases that the kernel does not support. Those use rectangles.

Shape suffixes: U rows, T packed tokens, H heads, D head size.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.batching.attention_layout import VarlenLayout

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
"""Head sizes that the kernel takes: multiples of this up to _LARGEST_HEAD (torch's flash_api.cpp)."""


def obstacle(query_UHD: Tensor, value_UHD: Tensor) -> str:
    """Why the kernel does not take tensors like these; empty if it does."""
    head = query_UHD.shape[-1]
    if query_UHD.device.type != "cuda":
        return f"the kernel needs CUDA, and the trainer runs on {query_UHD.device.type}"
    if value_UHD.dtype not in (torch.bfloat16, torch.float16):
        dtype = str(value_UHD.dtype).removeprefix("torch.")
        return f"the kernel does not support {dtype}, only 16 bits (model.dtype)"
    if value_UHD.shape[-1] > head or head % _HEAD_MULTIPLE or head > _LARGEST_HEAD:
        return (
            f"the kernel does not support heads of {head} and {value_UHD.shape[-1]}: those of keys must be a "
            f"multiple of {_HEAD_MULTIPLE}, at most {_LARGEST_HEAD} and no smaller than those of values"
        )
    return _obstacle_on(query_UHD.device)


@cache
def _obstacle_on(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "the kernel has not been tested on AMD GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernel needs compute capability 8.0 (A100) or later"
    return ""


def varlen_attention(
    query_UHD: Tensor,
    key_UHD: Tensor,
    value_UHD: Tensor,
    layout: VarlenLayout,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """[U, H, D] outputs. `window`: number of keys that a query attends to; None: all before it and its own.

    Keys and values may have fewer heads than queries, and the heads of values may be smaller.
    """
    head, value_head = query_UHD.shape[-1], value_UHD.shape[-1]
    if value_head < head:
        # The kernel wants equal sizes (latent attention has heads of 192 and 128). Zeros add nothing.
        value_UHD = F.pad(value_UHD, (0, head - value_head))
    if layout.row_T is not None:
        key_UHD, value_UHD = (_Spread.of(rows, layout.row_T) for rows in (key_UHD, value_UHD))
    # Normalization of queries and keys may leave them in float32.
    query_UHD, key_UHD = query_UHD.to(value_UHD.dtype), key_UHD.to(value_UHD.dtype)
    out_UHD = kernel(query_UHD, key_UHD, value_UHD, layout, window=window, scale=scale)
    return out_UHD[..., :value_head]


def kernel(
    query_UHD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    layout: VarlenLayout,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    # Imported here: it is not needed on a CPU.
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if _names_groups(varlen_attn):
        settings["enable_gqa"] = query_UHD.shape[1] != key_THD.shape[1]
    out = varlen_attn(
        query_UHD,
        key_THD,
        value_THD,
        layout.query_bounds,
        layout.key_bounds,
        layout.most_queries,
        layout.most_keys,
        **settings,
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _names_groups(function: Any) -> bool:
    """True from torch 2.12 on; before, the kernel accepted fewer heads of keys without an argument for it."""
    return "enable_gqa" in inspect.signature(function).parameters


class _Spread(torch.autograd.Function):
    """[U, H, D] -> [T, H, D]: the row of each token. The backward sums in float32 or wider."""

    @staticmethod
    def of(row_UHD: Tensor, row_T: Tensor) -> Tensor:
        out: Tensor = _Spread.apply(row_UHD, row_T)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def forward(ctx: Any, row_UHD: Tensor, row_T: Tensor) -> Tensor:
        ctx.row_T, ctx.num_rows = row_T, len(row_UHD)
        return row_UHD.index_select(0, row_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_THD,) = grads
        wide = torch.promote_types(grad_THD.dtype, torch.float32)
        sum_UHD = grad_THD.new_zeros((ctx.num_rows, *grad_THD.shape[1:]), dtype=wide)
        return sum_UHD.index_add_(0, ctx.row_T, grad_THD.to(wide)).to(grad_THD.dtype), None
