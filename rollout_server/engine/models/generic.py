"""Runs any decoder-only transformers model through its own modules over our KV rows.

Two documented hooks are enough: a cache object whose `update` writes into the rows and returns views of them,
and a ready-made 4-D attention mask, which transformers uses instead of building one. `loading.load` compares
the result with the model's own forward, so a model that ignores one of the hooks is refused.

Shapes: N rows, B contexts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from areal_like.weights.adapters import AdapterHeader, linear_layers
from rollout_server.engine.cache import DecodeBatch, Extension, KVCache, KVShape
from rollout_server.engine.models.adapters import AdapterSlots
from rollout_server.engine.models.base import ModelFacts, Weights, new_arena
from rollout_server.engine.models.routes import RouteRecorder


class RowCache(Cache):
    """A transformers cache that reads and writes the KV rows.

    With `rows` None it keeps nothing and records the shapes of keys and values instead.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: KVCache | None = None
        self.mode: Literal["prefill", "extend", "decode"] = "prefill"
        self.seen: dict[int, KVShape] = {}
        """Layer index -> shape of its keys and values. Recorded in a forward pass, because model
        configurations name these sizes differently."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, H, T, D]; returns the ones that the layer's queries attend to."""
        if self.rows is None:
            self.seen[layer_idx] = KVShape(
                num_heads=key_states.shape[1], key_dim=key_states.shape[3], value_dim=value_states.shape[3]
            )
        elif self.mode == "decode":
            return self.rows.append(layer_idx, key_states.squeeze(2), value_states.squeeze(2))
        elif self.mode == "extend":
            return self.rows.extend(layer_idx, key_states, value_states)
        else:
            self.rows.fill(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions are passed explicitly, so nothing may depend on this."""
        return 0


class GenericModel:
    """A CausalModel that wraps a transformers module."""

    def __init__(self, module: Any, facts: ModelFacts) -> None:
        self.facts = facts
        self.adapters: AdapterSlots | None = None
        self.routes: RouteRecorder | None = None
        self._module = module
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._cache = RowCache()
        self._causal_11TT = torch.zeros(0)

    def new_weights(self) -> Weights:
        """An uninitialized set."""
        facts = self.facts
        in_param = defaultdict(list)
        for tensor in facts.layout:
            in_param[tensor.param].append(tensor)
        # The tensors of a fused parameter are adjacent and in order, so together they are the parameter.
        arena, parts = new_arena(facts, [[tensor.name for tensor in group] for group in in_param.values()])
        params = {name: part.view(self._shapes[name]) for name, part in zip(in_param, parts, strict=True)}
        named = {tensor.name: tensor.whole_in(params[tensor.param]) for tensor in facts.layout}
        return Weights(named=named, arena=arena, plan=params)

    def make_slots(self, header: AdapterHeader, *, num_slots: int) -> AdapterSlots:
        """Allocates slots for adapters of the module's linear layers.

        Raises WeightSyncError for a target that is not among them.
        """
        modules = {
            name: module for name, module in self._module.named_modules() if isinstance(module, nn.Linear)
        }
        layers = linear_layers(self.facts.parameter_shapes)
        layers = {name: size for name, size in layers.items() if name in modules}
        slots = AdapterSlots(
            header,
            [(name,) for name in layers],
            layers,
            num_slots=num_slots,
            dtype=self.facts.dtype,
            device=self.facts.device,
        )
        for name in filter(header.adapts, layers):
            modules[name].register_forward_hook(partial(self._adapted, name))
        return slots

    def _adapted(self, layer: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """A forward hook: adds the adapters to a linear layer's output."""
        if self.adapters is None:
            return out
        return self.adapters.add(layer, args[0].flatten(0, -2), out.flatten(0, -2)).view_as(out)

    def activate(self, weights: Weights) -> None:
        """Makes the module's parameters use this set's memory; tied parameters are one object."""
        for name, parameter in self._module.named_parameters():
            parameter.data = weights.plan[name]

    def prefill(self, tokens_BT: Tensor, cache: KVCache) -> None:
        """Computes the KV of right-padded contexts.

        The causal mask is enough: padding comes after all real tokens.
        """
        length = tokens_BT.shape[1]
        if self._causal_11TT.shape[-1] < length:
            # Additive, not boolean: models without an SDPA path add their mask to the scores.
            hidden = torch.full(
                (1, 1, length, length), float("-inf"), dtype=self.facts.dtype, device=self.facts.device
            )
            self._causal_11TT = hidden.triu_(1)
        positions_BT = torch.arange(length, device=self.facts.device).expand_as(tokens_BT)
        self._cache.mode = "prefill"
        self._forward(tokens_BT, positions_BT, self._causal_11TT[..., :length, :length], cache)

    def extend(self, tokens_BT: Tensor, extension: Extension, cache: KVCache) -> None:
        """Computes the KV of right-padded tokens that extend the contents of rows, and writes it to the
        rows."""
        self._cache.mode = "extend"
        self._forward(tokens_BT, extension.position_BT, extension.bias_B1TS, cache)

    def decode(self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache) -> Tensor:
        """Returns the logits [N, V] after one more token in each of rows 0..N-1."""
        mask_N11T = batch.bias_N1T.unsqueeze(1)
        self._cache.mode = "decode"
        return self._forward(tokens_N.unsqueeze(1), batch.position_N.unsqueeze(1), mask_N11T, cache)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        self._cache.rows = cache
        logits: Tensor = self._module(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]
