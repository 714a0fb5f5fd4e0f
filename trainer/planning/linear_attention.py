"""Stand-ins for the kernels of linear attention in a trace: the tensors they keep, and their products.

The kernels run on a GPU only, and transformers' own functions in torch keep many times more. These follow
`ops/gated_delta_rule/chunk.py` of flash-linear-attention (commit 0315a70): the forward keeps the normalized
queries and keys, the values, the gates and one 64 x 64 matrix for each chunk of 64 tokens; the backward
computes the states again, one for each chunk, and then their gradients. A matrix product is done on operands
without memory, so that its FLOPs are counted and its result has memory.

Left out: FLOPs of the inversion of the 64 x 64 matrices, of gates and norms, and of the convolution, which
has 4 products for each channel.

Shape suffixes: U rows, H value heads, K and V sizes of a head's keys and values, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.attention.linear import CONVOLUTION, DELTA_RULE
from trainer.models.packed_model import PackedModel

_CHUNK = 64


def use_stand_ins(model: PackedModel) -> None:
    """A trace of this model's linear attention has the memory and FLOPs of its kernels."""
    for layer in model.linear_layers:
        layer.stand_in({CONVOLUTION: _convolution, DELTA_RULE: _delta_rule})


def _convolution(hidden_1CU: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Convolution.apply(hidden_1CU, weight)  # type: ignore[no-untyped-call]
    return out


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _DeltaRule.apply(query, key, value, g, beta)  # type: ignore[no-untyped-call]
    return out, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_1CU: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_1CU, weight)
        return torch.empty_like(hidden_1CU)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden_1CU, weight = ctx.saved_tensors
        return torch.empty_like(hidden_1CU), torch.empty_like(weight)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        product = _Products(key, value)
        query, key, norms = torch.empty_like(query), torch.empty_like(key), torch.empty_like(g)
        gates = torch.empty_like(g)
        inner = product("CKC", torch.float32)
        inverse = torch.empty_like(inner, dtype=key.dtype)
        del inner
        states = product.states()
        scores = product("CKC")
        out = product("CKV")
        del scores
        product("CCV")
        del states
        ctx.save_for_backward(query, key, value, norms, norms, gates, beta, inverse)
        return out.view(value.shape[0], -1, *value.shape[2:])[:, : value.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _, gates, beta, _ = ctx.saved_tensors
        product = _Products(key, value)
        states = product.states()
        of_values = product("CCV")
        product("CKC")
        of_states = product("KCV")
        for shape in ("KCV", "CKV", "CVC"):
            product(shape)
        of_query, of_key, of_w = product("CVK"), product("CVK"), product("CVK")
        for shape in ("CCK", "CCK"):
            product(shape)
        del states, of_states
        for shape in ("CKC", "CVC", "CCK", "CCV", "CCC", "CCC", "CCK"):
            product(shape)
        del of_query, of_key, of_w, of_values
        return tuple(torch.empty_like(each) for each in (query, key, value, gates, beta))


class _Products:
    """Batched products over all chunks and heads; sizes are letters: C chunk, K and V."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        batch, length, heads = value.shape[:3]
        self._num = batch * -(-length // _CHUNK) * heads
        self._sizes = {"C": _CHUNK, "K": key.shape[-1], "V": value.shape[-1]}
        self._like = value

    def __call__(self, shape: str, dtype: torch.dtype | None = None) -> Tensor:
        """The product of [rows, inner] with [inner, columns]; `shape` names the three sizes."""
        rows, inner, columns = (self._sizes[letter] for letter in shape)
        operand = self._like.new_empty((), dtype=dtype)
        return torch.bmm(operand.expand(self._num, rows, inner), operand.expand(self._num, inner, columns))

    def states(self) -> tuple[Tensor, ...]:
        """w, u, the new values and the state of each chunk."""
        return self("CCK"), self("CCV"), self("CKV"), self("KCV")
