"""What the engine needs of a model, and sets of weights that can be exchanged between two steps.

Shapes: B contexts, T positions, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rollout_server.engine.cache import DecodeBatch, KVCache, KVShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A complete set of parameters in the engine's dtype and device. One set is active, another receives."""

    named: Mapping[str, Tensor]
    """Every parameter by its Hugging Face name; writing into these is how a set is filled."""
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
