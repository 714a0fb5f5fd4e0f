"""The interface between the engine and a model: forward passes over KV rows, and sets of weights.

Shapes: B contexts, T positions, N rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.hf_layout import HfTensor
from rollout_server.engine.cache import DecodeBatch, Extension, KVCache, KVShape
from rollout_server.engine.models.adapters import AdapterSlots
from rollout_server.engine.models.routes import RouteRecorder
from rollout_server.engine.states import StateShape

_ALIGNMENT = 64
"""Bytes; the alignment of torch's own allocator."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A complete set of parameters, in their own dtypes and on the engine's device.

    One set is active, another receives updates.
    """

    named: Mapping[str, Tensor]
    """Every tensor of the model's checkpoint by its name; writing into these tensors fills the set."""
    arena: Tensor | None = None
    """uint8[bytes]: a single allocation that holds all parameters; None if they are allocated separately. A
    bucket with the same layout is received directly into it."""
    plan: Any = None
    """Views of the same memory in the form that the model's forward pass needs (fused matrices); private to
    the model."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Properties of a loaded model that do not change while the engine runs."""

    model_type: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    parameter_shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors of the model's checkpoint, by their names there, which pushes use too."""
    parameter_dtypes: Mapping[str, torch.dtype]
    """Their dtypes in the engine: `dtype`, or float32 for vectors of some models (see `loading`)."""
    layout: Sequence[HfTensor]
    """The positions of these tensors in the parameters of the transformers module."""
    tied_names: frozenset[str]
    """Names that alias another parameter: a weight push may include or omit them."""
    kv_shapes: Sequence[KVShape]
    """Of the layers that have keys and values, in order."""
    kv_layers: Sequence[int]
    """The indices of these layers in the model."""
    state_shapes: Sequence[StateShape] = ()
    """Of the layers that have a recurrent state, in order."""
    state_layers: Sequence[int] = ()
    """The indices of these layers in the model."""
    dtype: torch.dtype
    device: torch.device
    untrained_names: frozenset[str] = frozenset()
    """Tensors in the model's files that are not parameters here: encoders of other inputs, routers' biases. A
    checkpoint contains them unchanged."""

    def new_cache(self, *, num_rows: int, context_length: int) -> KVCache:
        """Rows for sequences of this model."""
        return KVCache(
            self.kv_shapes,
            num_rows=num_rows,
            context_length=context_length,
            dtype=self.dtype,
            device=self.device,
            state_shapes=self.state_shapes,
        )


def new_arena(facts: ModelFacts, groups: Iterable[Sequence[str]]) -> tuple[Tensor, list[Tensor]]:
    """Allocates uninitialized memory for a set of weights.

    `groups`: lists of names of tensors of one dtype, which are adjacent in memory. Returns the whole arena
    (uint8) and, for each group, its part as a flat tensor of its dtype. Groups begin at multiples of 64
    bytes, as the matrix products need; in most models the size of every tensor is such a multiple, so there
    are no gaps.
    """
    groups = list(groups)
    dtypes = [facts.parameter_dtypes[group[0]] for group in groups]
    sizes = [
        sum(math.prod(facts.parameter_shapes[name]) for name in group) * dtype.itemsize
        for group, dtype in zip(groups, dtypes, strict=True)
    ]
    starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    arena = torch.empty(starts[-1], dtype=torch.uint8, device=facts.device)
    return arena, [
        arena[start : start + size].view(dtype)
        for start, size, dtype in zip(starts, sizes, dtypes, strict=False)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class NewTokens:
    """Tokens of contexts whose KV a pass computes: from their beginning, or over what rows hold already."""

    tokens_BT: Tensor
    """int64, right-padded."""
    extension: Extension | None = None
    """None: from their beginning (`KVCache.begin_prefill`)."""


class CausalModel(Protocol):
    """A decoder-only model over KV rows."""

    facts: ModelFacts
    adapters: AdapterSlots | None
    """LoRA adapters over the active weights; None before the first one. Select rows' slots before a pass."""
    routes: RouteRecorder | None
    """Records the chosen experts of every pass; None: they are not wanted."""
    copies_weights: bool
    """True if `activate` copies the set, which may be filled again at once."""
    max_pass_tokens: int | None
    """Context tokens of one forward pass beyond which each of them takes longer; None: no such number."""
    joins_passes: bool
    """True if `decode` can compute new tokens of contexts in the same pass, which reads the weights once."""

    def make_slots(self, header: AdapterHeader, *, num_slots: int) -> AdapterSlots:
        """Allocates slots for adapters of this model. Raises WeightSyncError for an unknown target."""
        ...

    def new_weights(self) -> Weights:
        """An uninitialized set."""
        ...

    def activate(self, weights: Weights) -> None:
        """Makes all later forward passes use this set."""
        ...

    def compute(self, new: NewTokens, cache: KVCache) -> None:
        """Computes the KV of new tokens of contexts and hands it to `cache.fill` or `cache.extend`."""
        ...

    def decode(
        self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache, new: NewTokens | None = None
    ) -> Tensor:
        """Returns the logits [N, V] after one more token (int64[N]) in each of rows 0..N-1.

        `new`: tokens to `compute` in the same pass, before the rows that they fill are read; only if
        `joins_passes`.
        """
        ...
