"""What a transformers module gets as its cache: the KV rows and the recurrent states of a forward pass.

Attention layers call `update`, which writes into the rows and returns views of them. Layers with linear
attention (Gated DeltaNet) read their state from the cache and give it the new one. A pass has the states of
its contexts in one `StateRows`: zeros in a prefill, copies of the rows' in an extension, the rows themselves
in a decode step. So a pass updates them in place, in the same way in all three.

Shapes: B contexts (or rows that are decoded), T positions, H KV heads or heads of a state, D head size, C
channels and W width of a convolution, K and V key and value size of a state.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rollout_server.engine.cache import KVCache, KVShape
from rollout_server.engine.models.base import ModelFacts
from rollout_server.engine.states import StateRows, StateShape


class ShapeProbe(Cache):
    """Keeps nothing, and records the shapes of keys, values and states in a forward pass, because model
    configurations name these sizes differently."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kv: dict[int, KVShape] = {}
        """Layer index -> shape of its keys and values."""
        self.states: dict[int, StateShape] = {}
        """Layer index -> shape of its state."""
        self._convs: dict[int, tuple[int, int]] = {}
        """Layer index -> (C, W)"""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Records the shapes of keys and values [B, H, T, D], and returns both."""
        self.kv[layer_idx] = KVShape(
            num_heads=key_states.shape[1], key_dim=key_states.shape[3], value_dim=value_states.shape[3]
        )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0."""
        return 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Always False."""
        return False

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Records the shape of a convolution with inputs [B, C, T], and returns them."""
        if state_idx or conv_kernel_size is None:
            raise NotImplementedError(f"the convolution of layer {layer_idx} is not that of a Gated DeltaNet")
        self._convs[layer_idx] = conv_states.shape[1], conv_kernel_size
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Records the shape of matrices [B, H, K, V], and returns them."""
        is_float32 = recurrent_states.dtype == torch.float32
        if layer_idx not in self._convs or recurrent_states.ndim != 4 or not is_float32:
            raise NotImplementedError(f"the state of layer {layer_idx} is not that of a Gated DeltaNet")
        num_channels, conv_width = self._convs[layer_idx]
        _, num_heads, key_dim, value_dim = recurrent_states.shape
        self.states[layer_idx] = StateShape(
            num_channels=num_channels,
            conv_width=conv_width,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
        )
        return recurrent_states


class RowCache(Cache):
    """Reads and writes the rows of a KVCache. `begin` comes before every pass."""

    def __init__(self, facts: ModelFacts) -> None:
        self._kv_index = {layer: index for index, layer in enumerate(facts.kv_layers)}
        self._state_index = {layer: index for index, layer in enumerate(facts.state_layers)}
        layers: list[Any] = [
            _StateLayer(self, self._state_index.get(layer, -1))
            for layer in range(max(facts.state_layers, default=-1) + 1)
        ]
        super().__init__(layers=layers)
        self.mode: Literal["prefill", "extend", "decode"] = "prefill"
        self._rows: KVCache | None = None
        self._states: StateRows | None = None
        self._lengths_B = torch.zeros(0, dtype=torch.int64)

    def begin(
        self,
        mode: Literal["prefill", "extend", "decode"],
        rows: KVCache,
        *,
        states: StateRows | None,
        lengths_B: Tensor | None = None,
    ) -> None:
        """Prepares for a forward pass. `states`: of the pass's contexts, which it updates; None for models
        without. `lengths_B`: int64[B] tokens of each context without its padding; needed with states, except
        to decode."""
        self.mode, self._rows, self._states = mode, rows, states
        if lengths_B is not None:
            self._lengths_B = lengths_B

    # Attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, H, T, D]; returns the ones that the layer's queries attend to."""
        assert self._rows is not None, "begin first"
        index = self._kv_index[layer_idx]
        if self.mode == "decode":
            return self._rows.append(index, key_states.squeeze(2), value_states.squeeze(2))
        if self.mode == "extend":
            return self._rows.extend(index, key_states, value_states)
        self._rows.fill(index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions are passed explicitly, so nothing may depend on this."""
        return 0

    # Linear attention

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Always True: the state before the first token is zero."""
        return True

    def states_of(self, index: int) -> tuple[Tensor, Tensor]:
        """The state of one layer: the convolution's inputs [B, C, W] and float32 matrices [B, H, K, V]."""
        assert self._states is not None, "begin first"
        return self._states.conv_SCW[index], self._states.matrices_SHKV[index]

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Takes a convolution's inputs [B, C, T]; returns them after the W before them [B, C, W + T], and
        keeps the last W of each context."""
        known_BCW, _ = self.states_of(self._state_index[layer_idx])
        inputs_BCT = torch.cat((known_BCW, conv_states), -1)
        last_BW = self._lengths_B.unsqueeze(1) + torch.arange(known_BCW.shape[2], device=inputs_BCT.device)
        known_BCW.copy_(inputs_BCT.gather(2, last_BW.unsqueeze(1).expand_as(known_BCW)))
        return inputs_BCT

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Keeps the matrices [B, H, K, V] after this pass."""
        _, matrices_BHKV = self.states_of(self._state_index[layer_idx])
        return matrices_BHKV.copy_(recurrent_states)


class _StateLayer:
    """The entry of one layer in `Cache.layers`, with the attributes that a Gated DeltaNet reads."""

    def __init__(self, cache: RowCache, index: int) -> None:
        self._cache = cache
        self._index = index

    @property
    def record_past(self) -> bool:
        """False lets a layer that gets one token write it into `conv_states` itself, instead of calling
        `update_conv_state`. That is one call less in a decode step."""
        return self._cache.mode != "decode"

    @property
    def conv_states(self) -> tuple[Tensor]:
        return (self._cache.states_of(self._index)[0],)

    @property
    def recurrent_states(self) -> tuple[Tensor]:
        return (self._cache.states_of(self._index)[1],)
