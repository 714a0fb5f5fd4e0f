"""Traces a few decoder layers, and extends the result to all layers of a model without loss.

All layers of most models are alike. Then every layer but the first and the last adds the same FLOPs and the
same bytes, and the memory at a given moment of layer i of L is a + b i + c L. Its maximum over the layers
between the first and the last is at the second or at the last but one. So the traces of three and of four
layers determine the peak of every stage (`tensor_memory.Stage`) for any L. The peak of the step is the
largest of them: which stage that is depends on L, so the peak itself cannot be extended.

Models whose layers differ (kinds of attention, experts in some of them) are traced in full.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoConfig

from areal_like.weights.untrained import text_config
from trainer.models.packed_model import SMALLEST_SHARDED_APART, build_skeleton, decoder_layers
from trainer.planning.shapes import ModelShape
from trainer.planning.tensor_memory import Stage

FEW = 3
"""Fewest layers that have a first, a last and another one."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a trace recorded. Every number is linear in the number of layers."""

    num_layers: int
    peaks: Mapping[Stage, Mapping[str, int]]
    """Bytes by purpose at the largest total of each stage."""
    resident: Mapping[str, int]
    """Bytes by purpose between two steps."""
    flops: Mapping[str, int]
    """As `TensorMemory.flops`."""
    sizes: Mapping[str, int]
    """Numbers of parameters."""
    model_bytes: Mapping[str, int]
    """Bytes of the parameters of each model in the step, on all ranks together."""


def has_equal_layers(shape: ModelShape) -> bool:
    """True if the model has more layers than two traces, and all have the same parameters and attention."""
    if shape.num_layers <= 2 * FEW + 1:
        return False
    model = build_skeleton(shape.directory, dtype=torch.bfloat16)
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ())
    layers = {
        tuple((name, param.shape) for name, param in layer.named_parameters())
        for layer in decoder_layers(model)
    }
    return len(kinds) <= 1 and len(layers) == 1


def with_layers(shape: ModelShape, num_layers: int, folder: Path) -> ModelShape:
    """The shape of the model's first layers; their config.json is written into `folder`."""
    config = AutoConfig.from_pretrained(shape.directory, trust_remote_code=False)
    text = text_config(config)
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_layers]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return replace(shape, directory=str(folder), num_layers=num_layers)


def extended(few: Traced, more: Traced, *, num_layers: int) -> Traced | None:
    """The trace of `num_layers` layers. `few`: FEW layers; `more`: one layer more.

    None if all layers together are large enough to be sharded one by one, and those of `few` are not.
    """
    assert (few.num_layers, more.num_layers) == (FEW, FEW + 1)
    steps = num_layers - FEW

    def extend(before: Mapping[Key, int], after: Mapping[Key, int]) -> dict[Key, int]:
        keys = {**before, **after}
        return {key: before.get(key, 0) + steps * (after.get(key, 0) - before.get(key, 0)) for key in keys}

    model_bytes = extend(few.model_bytes, more.model_bytes)
    for name, size in model_bytes.items():
        if few.model_bytes[name] < SMALLEST_SHARDED_APART <= size:
            return None
    shorter, longer = dict(_from_both_ends(few)), dict(_from_both_ends(more))
    assert shorter.keys() == longer.keys()
    return Traced(
        num_layers=num_layers,
        peaks={stage: extend(shorter[stage], peak) for stage, peak in longer.items()},
        resident=extend(few.resident, more.resident),
        flops=extend(few.flops, more.flops),
        sizes=extend(few.sizes, more.sizes),
        model_bytes=model_bytes,
    )


def _from_both_ends(traced: Traced) -> Iterator[tuple[Stage, Mapping[str, int]]]:
    """The peaks of the first two and the last two layers, the latter counted from -1 down: with FEW layers
    the middle one is both the second and the last but one."""
    for stage, peak in traced.peaks.items():
        if stage.layer is None:
            yield stage, peak
            continue
        if stage.layer < 2:
            yield stage, peak
        if (from_end := stage.layer - traced.num_layers) >= -2:
            yield stage._replace(layer=from_end), peak
