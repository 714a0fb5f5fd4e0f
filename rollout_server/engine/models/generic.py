"""Runs any decoder-only transformers model through its own modules over our KV rows.

Two documented hooks are enough: a cache object (row_cache.py), and a ready-made 4-D attention mask, which
transformers uses instead of building one. `loading.load` compares the result with the model's own forward, so
a model that ignores one of the hooks is refused.

Linear attention needs a third one, because padding must not change a state. transformers' own mask of
padding zeroes the input of a layer, which is enough before the tokens, but ours comes after them: there the
state would still decay, and take in what the convolution remembers. So the gates of padded positions are
closed: from -inf the layer computes a decay of exactly 1, and 0 as the share of the new value.

Shapes: N rows, B contexts, T positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from areal_like.weights.adapters import AdapterHeader, linear_layers
from rollout_server.engine.cache import DecodeBatch, Extension, KVCache
from rollout_server.engine.models.adapters import AdapterSlots
from rollout_server.engine.models.base import ModelFacts, NewTokens, Weights, new_arena
from rollout_server.engine.models.routes import RouteRecorder
from rollout_server.engine.models.row_cache import RowCache

_GATES = ({"in_proj_ba"}, {"in_proj_a", "in_proj_b"}, {"a_proj", "b_proj"})
"""Linear layers that compute the gates of a Gated DeltaNet (Qwen3-Next; Qwen3.5; OLMo Hybrid): a, how much of
the state decays, and b, the share of the new value that is written."""


def delta_nets(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that are a Gated DeltaNet, by name; perhaps others that decay like it."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if hasattr(layer, "A_log") and hasattr(layer, "dt_bias")
    }


def gates_of(module: nn.Module) -> list[list[nn.Module]]:
    """For each Gated DeltaNet of a model, the layers that compute its gates."""
    gates = []
    for layer in delta_nets(module).values():
        children = dict(layer.named_children())
        gates += [[children[name] for name in names] for names in _GATES if names <= children.keys()]
    return gates


class GenericModel:
    """A CausalModel that wraps a transformers module."""

    def __init__(self, module: Any, facts: ModelFacts) -> None:
        self.facts = facts
        self.adapters: AdapterSlots | None = None
        self.routes: RouteRecorder | None = None
        self.copies_weights = False
        self.max_pass_tokens: int | None = None
        self.joins_passes = False
        self._module = module
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._cache = RowCache(facts)
        self._causal_11TT = torch.zeros(0)
        self._padding_BT1: Tensor | None = None
        """bool: the padding of this pass; None if there is none."""
        if facts.state_shapes:
            for layer in itertools.chain.from_iterable(gates_of(module)):
                layer.register_forward_hook(self._close_padded)

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

    def _close_padded(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """A forward hook: closes the gates of padded positions."""
        return out if self._padding_BT1 is None else out.masked_fill(self._padding_BT1, float("-inf"))

    def activate(self, weights: Weights) -> None:
        """Makes the module's parameters use this set's memory; tied parameters are one object."""
        for name, parameter in self._module.named_parameters():
            parameter.data = weights.plan[name]

    def compute(self, new: NewTokens, cache: KVCache) -> None:
        """Computes the KV of new tokens of contexts, and writes it to the rows."""
        if new.extension is None:
            self._prefill(new.tokens_BT, cache)
        else:
            self._extend(new.tokens_BT, new.extension, cache)

    def _prefill(self, tokens_BT: Tensor, cache: KVCache) -> None:
        """The causal mask is enough: padding comes after all real tokens."""
        length = tokens_BT.shape[1]
        if self._causal_11TT.shape[-1] < length:
            # Additive, not boolean: models without an SDPA path add their mask to the scores.
            hidden = torch.full(
                (1, 1, length, length), float("-inf"), dtype=self.facts.dtype, device=self.facts.device
            )
            self._causal_11TT = hidden.triu_(1)
        positions_BT = torch.arange(length, device=self.facts.device).expand_as(tokens_BT)
        lengths_B = self._begin_padded(cache.new_lengths_B, length)
        self._cache.begin("prefill", cache, states=cache.computed_states, lengths_B=lengths_B)
        self._forward(tokens_BT, positions_BT, self._causal_11TT[..., :length, :length])

    def _extend(self, tokens_BT: Tensor, extension: Extension, cache: KVCache) -> None:
        lengths_B = self._begin_padded(cache.new_lengths_B, tokens_BT.shape[1])
        states = None if cache.states is None else cache.states.select(extension.rows_B)
        self._cache.begin("extend", cache, states=states, lengths_B=lengths_B)
        self._forward(tokens_BT, extension.position_BT, extension.bias_B1TS)
        if cache.states is not None and states is not None:
            cache.states.write(extension.rows_B, states)

    def decode(
        self, tokens_N: Tensor, batch: DecodeBatch, cache: KVCache, new: NewTokens | None = None
    ) -> Tensor:
        """Returns the logits [N, V] after one more token in each of rows 0..N-1."""
        assert new is None, "a transformers module computes one kind of tokens in a pass"
        mask_N11T = batch.bias_N1T.unsqueeze(1)
        self._padding_BT1 = None
        states = None if cache.states is None else cache.states.first(batch.num_rows)
        self._cache.begin("decode", cache, states=states)
        return self._forward(tokens_N.unsqueeze(1), batch.position_N.unsqueeze(1), mask_N11T)

    def _begin_padded(self, lengths_B: NDArray[np.int64], num_positions: int) -> Tensor | None:
        """Prepares the gates for contexts with padding; returns the lengths on the model's device, None for a
        model without states."""
        self._padding_BT1 = None
        if not self.facts.state_shapes:
            return None
        if lengths_B.min() < num_positions:
            padding_BT = np.arange(num_positions) >= lengths_B[:, None]
            self._padding_BT1 = torch.from_numpy(padding_BT).to(self.facts.device).unsqueeze(2)
        return torch.from_numpy(lengths_B).to(self.facts.device)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self._module(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]
