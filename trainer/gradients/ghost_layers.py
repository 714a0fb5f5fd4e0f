"""Layers that record inputs and output gradients for `GhostTape` instead of computing parameter gradients.

Each class replaces the forward of one kind of module. The backward passes the gradient on to the module's
input, records the factors of the parameter gradient, and writes no `.grad`. From the records the class
computes each sequence's squared gradient norm (`squares`) and any weighted sum of the sequences' gradients
(`combined`).

`SegmentRows` pads packed rows to rectangles of similar lengths, for computations on single sequences.

Shape suffixes: T rows (tokens), N sequences, n sequences of one block, L longest of them, I in, O out,
D features, U distinct (sequence, token id) pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from areal_like.errors import ConfigError
from areal_like.precision import Fp32Head, fp32_logits


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


def layer_of(module: nn.Module) -> Layer | None:
    """The recorder for this module, or None if its kind is not supported.

    A module class that overrides the `forward` of a supported class is not supported.
    """
    forward = type(module).forward
    if forward in (nn.Linear.forward, Fp32Head.forward, Conv1D.forward):
        return Matrix(module)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return Embedding(module) if module.max_norm is None and not module.scale_grad_by_freq else None
    return _Scale(module) if forward is nn.LayerNorm.forward or _is_scale(module) else None


class Layer:
    """One module with the records of the last backward: inputs `x_TI` and output gradients `e_TO`."""

    path: str
    names: dict[str, str]
    """Names of its trainable parameters: in the module -> in the model."""
    is_head: bool
    """True: the module is the model's head, which runs over sampled tokens only."""
    reached: list[Layer]
    """Shared by all layers of a tape: layers in the order in which the backward reached them."""
    rows: SegmentRows
    """The sequence of each recorded row."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.x_TI = self.e_TO = torch.empty(0)

    def record(self, x: Tensor, e: Tensor) -> None:
        """Stores the layer's input and output gradient.

        Raises ConfigError on a second call in one backward.
        """
        if self in self.reached:
            raise ConfigError(
                f"objective.norms=ghost does not support {self.path}, which runs twice in one forward: "
                "use exact or proxy"
            )
        self.x_TI, self.e_TO = x, e
        self.reached.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Replaces the module's forward while the tape is attached."""
        raise NotImplementedError

    def squares(self, grams: dict[int, list[Tensor]]) -> Tensor:
        """[N] squared norm of each sequence's gradient.

        `grams` caches Gram matrices by the input they belong to.
        """
        raise NotImplementedError

    def combined(self, coefficient_N: Tensor, scaled: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(model's parameter name, sum of coefficient times gradient over sequences).

        `scaled` caches scaled inputs.
        """
        raise NotImplementedError


class Matrix(Layer):
    """A matrix multiplication: Linear and Fp32Head, `x W^T + b`, or transformers' Conv1D, `x W + b`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.module.weight.t() if isinstance(self.module, Conv1D) else self.module.weight
        return _apply(_Linear, x, weight, self.module.bias, self.record, isinstance(self.module, Fp32Head))

    def squares(self, grams: dict[int, list[Tensor]]) -> Tensor:
        x_TI, e_TO = wide(self.x_TI), wide(self.e_TO)
        out_N = e_TO.new_zeros(len(self.rows.lengths))
        num_in, num_out = x_TI.shape[1], e_TO.shape[1]
        longest = max(block.places_nL.shape[1] for block in self.rows.blocks)
        if "weight" in self.names and longest * (num_in + num_out) > num_in * num_out:
            parts = zip(
                torch.split(x_TI, self.rows.lengths), torch.split(e_TO, self.rows.lengths), strict=True
            )
            # For long sequences, the gradients are smaller than the Gram matrices.
            out_N += torch.stack([(e.t() @ x).square().sum() for x, e in parts])
        elif "weight" in self.names:
            # Layers that read the same tensor (query, key and value) share its Gram matrices.
            key = self.x_TI.data_ptr()
            if key not in grams:
                grams[key] = [_gram(block, x_TI) for block in self.rows.blocks]
            for block, gram_nLL in zip(self.rows.blocks, grams[key], strict=True):
                e_nLO = block.pad(e_TO)
                out_N.index_add_(0, block.sequences_n, torch.bmm(e_nLO, e_nLO.mT).mul_(gram_nLL).sum((1, 2)))
        if "bias" in self.names:
            out_N += self.rows.sum_ND(e_TO).square().sum(1)
        return out_N

    def combined(self, coefficient_N: Tensor, scaled: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        x_TI, e_TO = self.x_TI, self.e_TO
        coefficient_T1 = coefficient_N[self.rows.segment_T, None].to(wide(e_TO[:0]).dtype)
        if "bias" in self.names or e_TO.shape[1] < x_TI.shape[1]:
            e_TO = (e_TO * coefficient_T1).to(e_TO.dtype)
        else:
            key = x_TI.data_ptr()
            x_TI = scaled[key] = scaled[key] if key in scaled else (x_TI * coefficient_T1).to(x_TI.dtype)
        if "weight" in self.names:
            yield (
                self.names["weight"],
                x_TI.t() @ e_TO if isinstance(self.module, Conv1D) else e_TO.t() @ x_TI,
            )
        if "bias" in self.names:
            yield self.names["bias"], e_TO.sum(0)


class Embedding(Layer):
    """Rows of a table looked up by token id; `x_TI` holds the ids [T, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return _apply(_Lookup, x, self.module.weight, self._record_ids)

    def _record_ids(self, ids: Tensor, e: Tensor) -> None:
        if self.module.padding_idx is not None:
            e = e.masked_fill((ids == self.module.padding_idx)[..., None], 0.0)
        self.record(ids.reshape(-1, 1), e.reshape(-1, e.shape[-1]))

    def squares(self, grams: dict[int, list[Tensor]]) -> Tensor:
        num_rows = self.module.num_embeddings
        keys_U, index_T = torch.unique(self.rows.segment_T * num_rows + self.x_TI[:, 0], return_inverse=True)
        e_TO = wide(self.e_TO)
        rows_UO = e_TO.new_zeros(len(keys_U), e_TO.shape[1]).index_add_(0, index_T, e_TO)
        return e_TO.new_zeros(len(self.rows.lengths)).index_add_(
            0, keys_U // num_rows, rows_UO.square().sum(1)
        )

    def combined(self, coefficient_N: Tensor, scaled: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        e_TO = wide(self.e_TO)
        e_TO = e_TO * coefficient_N[self.rows.segment_T, None].to(e_TO.dtype)
        yield (
            self.names["weight"],
            e_TO.new_zeros(self.module.num_embeddings, e_TO.shape[1]).index_add_(0, self.x_TI[:, 0], e_TO),
        )


class _Scale(Layer):
    """`weight * normalized(x) + bias` (LayerNorm, RMSNorm); `x_TI` holds normalized(x)."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._normalized = _without_parameters(module)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(
            _Affine,
            self._normalized(x),
            self.module.weight,
            getattr(self.module, "bias", None),
            self._record_rows,
        )

    def _record_rows(self, x: Tensor, e: Tensor) -> None:
        # [1, T, heads, D] is recorded as [T, heads, D]; `squares` sums the gradients of the heads.
        last = 1 if x.ndim == 4 else -2
        self.record(x.flatten(0, last), e.flatten(0, last))

    def squares(self, grams: dict[int, list[Tensor]]) -> Tensor:
        self._vectors: dict[str, Tensor] = {}
        for key, value in (("weight", wide(self.x_TI) * wide(self.e_TO)), ("bias", wide(self.e_TO))):
            if key in self.names:
                self._vectors[key] = self.rows.sum_ND(value.sum(1) if value.ndim == 3 else value)
        return torch.stack([vector_ND.square().sum(1) for vector_ND in self._vectors.values()]).sum(0)

    def combined(self, coefficient_N: Tensor, scaled: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for key, vector_ND in self._vectors.items():
            yield self.names[key], coefficient_N.to(vector_ND.dtype) @ vector_ND


def wide(value: Tensor) -> Tensor:
    """The value in float32 or wider: a sum of squares in bfloat16 would keep two digits."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _gram(block: Block, x_TI: Tensor) -> Tensor:
    """[n, L, L] inner products of the inputs of each sequence, zero where either token is padding."""
    x_nLI = block.pad(x_TI)
    gram_nLL = torch.bmm(x_nLI, x_nLI.mT)
    return gram_nLL if block.is_dense else gram_nLL.mul_(block.pairs_nLL)


def _is_scale(module: nn.Module) -> bool:
    """True if the module's one parameter, a vector `weight`, multiplies its output.

    Tested on four inputs per feature.
    """
    params = dict(module.named_parameters())
    if list(params) != ["weight"] or params["weight"].ndim != 1 or list(module.children()):
        return False
    size = params["weight"].shape[0]
    x_TD = torch.linspace(-1.0, 2.0, 4 * size, device=params["weight"].device).reshape(4, size)
    weight_D = torch.linspace(0.5, 1.5, size, device=x_TD.device)
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # a kernel's, put in place of the class's, is bound to `module`
    try:
        twin._parameters = {"weight": nn.Parameter(weight_D, requires_grad=False)}
        scaled_TD = twin(x_TD)
        twin._parameters = {"weight": nn.Parameter(torch.ones_like(weight_D), requires_grad=False)}
        return bool(torch.allclose(scaled_TD, weight_D * twin(x_TD), rtol=1e-4, atol=1e-6))
    except (RuntimeError, TypeError):  # its forward takes other arguments, so it is not a scale
        return False


def _without_parameters(module: Any) -> Any:
    """The module's forward with weight 1 and no bias, in the input's dtype."""
    if isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        return lambda x: F.layer_norm(x, shape, None, None, eps)
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    size = module.weight.shape[0]

    def forward(x: Tensor) -> Tensor:
        twin._parameters = {"weight": x.new_ones(size)}
        return type(module).forward(twin, x)  # type: ignore[no-any-return]

    return forward


class _Linear(torch.autograd.Function):
    """F.linear, or that of Fp32Head, whose backward records (x [T, I], e [T, O]) and computes no parameter
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: Any, is_fp32_head: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return fp32_logits(x, weight, bias) if is_fp32_head else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        e = grads[0].to(weight.dtype)
        ctx.record(x.reshape(-1, x.shape[-1]), e.reshape(-1, e.shape[-1]))
        return (e @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Lookup(torch.autograd.Function):
    """F.embedding whose backward records (ids, e) and computes no parameter gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, record: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.record = record
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.record(*ctx.saved_tensors, grads[0])
        return None, None, None


class _Affine(torch.autograd.Function):
    """x * weight + bias whose backward records (x, e) and computes no parameter gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, record: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.record(x, grads[0])
        return grads[0] * weight, None, None, None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out
