"""The output head in float32, whatever the dtype of the rest: `model.fp32_head`.

Logits that a matrix product rounds to bfloat16 have steps of up to 2^-8 of their size, so engine and trainer
disagree about probabilities although they have the same weights. Here weight and hidden states are widened
before the product. The weight's values stay those of the model's dtype, as with SGLang's
`--enable-fp32-lm-head`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widen_head(model: Any) -> None:
    """Makes the head of a causal language model of transformers compute in float32, in place."""
    head = model.get_output_embeddings()
    head.forward = MethodType(_forward, head)


def _forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear(hidden.to(dtype), head.weight.to(dtype), bias)
