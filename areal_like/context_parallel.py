"""Whether the ranks of a trainer can divide a model's attention among them (`trainer.context_parallel`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KV_HEADS = ("num_key_value_heads", "num_global_key_value_heads")
_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the longest sequence of a micro-batch."""


def context_obstacle(facts: Mapping[str, Any], size: int) -> str:
    """Why `size` ranks cannot compute a micro-batch of this model together, and what to change; empty if they
    can.

    `facts`: the config.json of the model, or of its text part.
    """
    name = f"trainer.context_parallel={size}"
    if linear := facts.get("linear_num_value_heads"):
        sizes = [facts.get(key) for key in ("linear_num_key_heads", "linear_key_head_dim")]
        keys = sizes[0] * sizes[1] if isinstance(sizes[0], int) and isinstance(sizes[1], int) else 0
        if linear % size or 2 * keys % size:
            return (
                f"{name} does not divide the {linear} value heads of this model's linear attention "
                f"(model.path), or their 2 x {keys} channels of queries and keys: lower it"
            )
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    # Some models have one for each kind of layer.
    ropes = [each for each in (rope, *rope.values()) if isinstance(each, Mapping)]
    kinds = [each.get("rope_type", each.get("type")) for each in ropes]
    if kind := next((kind for kind in kinds if kind in _BY_LENGTH), ""):
        return (
            f"{name}: the rotary embeddings of this model (model.path) are of the kind {kind}, which depends "
            "on the longest sequence, and a rank has only a part of it: set trainer.context_parallel=1"
        )
    heads = facts.get("num_attention_heads", facts.get("n_head"))
    if facts.get("kv_lora_rank"):  # latent attention: keys and values are expanded to all heads
        kv_heads = [heads]
    else:
        kv_heads = [value for key in _KV_HEADS if (value := facts.get(key)) is not None] or [heads]
    for number in kv_heads:
        if isinstance(number, int) and number % size:
            return (
                f"{name} does not divide the {number} KV heads of this model (model.path): in attention each "
                f"rank has a share of them. Set trainer.context_parallel to a divisor of {number}"
            )
    if isinstance(heads, int) and heads % size:
        return (
            f"{name} does not divide the {heads} attention heads of this model (model.path): set it to a "
            f"divisor of {heads}"
        )
    return ""
