"""What the engine needs of a model, and sets of weights that can be exchanged between two steps.

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

from rollout_server.engine.cache import DecodeBatch, KVCache, KVShape

_ALIGNMENT = 64
"""Bytes; what torch's own allocator gives."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A complete set of parameters in the engine's dtype and device. One set is active, another receives."""

    named: Mapping[str, Tensor]
    """Every parameter by its Hugging Face name; writing into these is how a set is filled."""
    arena: Tensor | None = None
    """uint8[...]: the memory of all of them, where they share one. A bucket that lies in it as it travels is received in its place."""
    plan: Any = None
    """What the model's forward reads (views or fused storage of the same memory)."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What does not change while the engine runs."""

    model_type: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    parameter_shapes: Mapping[str, tuple[int, ...]]
    tied_names: frozenset[str]
    """Names that alias another parameter: a push may carry them or leave them out."""
    kv_shapes: Sequence[KVShape]
    dtype: torch.dtype
    device: torch.device


def new_arena(facts: ModelFacts, groups: Iterable[Sequence[str]]) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised memory for a set of weights: all of it (uint8), and the part of each group of names, flat and in the model's dtype.

    Groups begin at multiples of 64 bytes, for the matrix products; in most models every tensor ends at one, and there are no gaps.
    """
    sizes = [
        sum(math.prod(facts.parameter_shapes[name]) for name in group) * facts.dtype.itemsize
        for group in groups
    ]
    starts = list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    arena = torch.empty(starts[-1], dtype=torch.uint8, device=facts.device)
    return arena, [
        arena[start : start + size].view(facts.dtype) for start, size in zip(starts, sizes, strict=False)
    ]


class CausalModel(Protocol):
    """A decoder-only model over KV rows."""

    facts: ModelFacts

    def new_weights(self) -> Weights:
        """An uninitialised set."""
        ...

    def activate(self, weights: Weights) -> None:
        """Makes every forward from now on use this set."""
        ...

    def prefill(self, tokens_BT: Tensor, cache: KVCache) -> None:
        """Computes the KV of right-padded contexts (int64) and hands it to `cache.fill`."""
        ...

    def decode(self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache) -> Tensor:
        """Logits [N, V] after one more token (int64[N]) in each of rows 0..N-1."""
        ...
