"""Attention inside each sequence of a packed batch, registered with transformers as `areal_packed`.

A mask of T x T would be correct but waste nearly all of the work: a pack of 2,000 tokens holds about a
hundred sequences. `rectangles.py` pads the rows to rectangles of sequences, `varlen.py` calls a CUDA kernel
that takes the bounds of the sequences. `batching/attention_layout.py` arranges the rows for either.

`trainer.attention` chooses. With `auto` each call decides by its tensors, because the layers of a model may
differ: varlen wherever the kernel takes them, else rectangles.

Shape suffixes: T packed tokens, U rows that the model computes for them, H heads, D head size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface

from areal_like.errors import ConfigError
from trainer.attention import varlen
from trainer.attention.rectangles import rectangle_attention
from trainer.batching.attention_layout import AttentionLayout

ATTENTION_NAME = "areal_packed"
Kind = Literal["auto", "rectangles", "varlen"]


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    `packed_kind`: `trainer.attention`. Dropout is ignored: a policy's log-probs must be those of the engine.
    Raises ConfigError for architectures whose attention is more than softmax over a causal window, and for a
    kernel that was chosen and does not take the tensors.
    """
    if packed_layout is None or softcap is not None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} cannot be trained packed: its attention uses soft-capping or sinks, "
            "or its model does not pass keyword arguments down to it. Choose another model"
        )
    assert attention_mask is None and len(query) == 1
    query_UHD, key_UHD, value_UHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if uses_varlen(packed_kind, query_UHD, value_UHD):
        out_UHD = varlen.varlen_attention(
            query_UHD, key_UHD, value_UHD, packed_layout.varlen, window=sliding_window, scale=scaling
        )
    else:
        out_UHD = rectangle_attention(
            query_UHD, key_UHD, value_UHD, packed_layout.rectangles, window=sliding_window, scale=scaling
        )
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
