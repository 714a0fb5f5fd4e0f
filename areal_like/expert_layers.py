"""Which layers of a model have experts, and how many, by its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from areal_like.errors import ConfigError
from areal_like.wire.routes import RoutesShape

_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""Names of the number of experts in config.json; the model families differ."""


class ExpertLayers(NamedTuple):
    """The layers of a model with experts."""

    layers: tuple[int, ...]
    """Their indices."""
    num_layers: int
    """Layers of the model, with and without experts."""
    routes: RoutesShape
    """What the routes of its tokens are like."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ExpertLayers:
        """Of a config.json (`model_facts`). Raises ConfigError for a model without experts."""
        name = next((name for name in _NUM_EXPERTS if facts.get(name)), "num_experts")
        try:
            num_layers = int(facts["num_hidden_layers"])
            layers = tuple(layer for layer in range(num_layers) if _has_experts(facts, layer))
            routes = RoutesShape(len(layers), int(facts["num_experts_per_tok"]), int(facts[name]))
            routes.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "model.router_replay=true needs a mixture of experts, and config.json of the model names "
                f"none ({error}): set model.router_replay=false"
            ) from None
        return cls(layers, num_layers, routes)


def _has_experts(facts: Mapping[str, Any], layer: int) -> bool:
    """By the fields of Qwen's (`mlp_only_layers`, `decoder_sparse_step`) and DeepSeek's config.json, or by a
    list with an entry for each layer (GLM with sparse attention, MiniMax)."""
    kinds, step = facts.get("mlp_layer_types"), facts.get("moe_layer_freq")
    if isinstance(kinds, list) and layer < len(kinds):
        return bool(kinds[layer] == "sparse")
    if isinstance(step, list) and layer < len(step):
        return bool(step[layer])
    dense: Sequence[int] = facts.get("mlp_only_layers") or ()
    if layer in dense or (layer + 1) % int(facts.get("decoder_sparse_step") or 1):
        return False
    first = int(facts.get("first_k_dense_replace") or 0)
    return layer >= first and (not isinstance(step, int) or layer % step == 0)
