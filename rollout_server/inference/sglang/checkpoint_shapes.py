"""The tensors that a checkpoint has, from the headers of its safetensors files: what an engine that loads by name has to be sent.

SGLang answers 200 to a tensor that it does not know, and loads half an update whose last shape is wrong. So names and shapes are compared
here, before it hears of any, and with the very names that it has loaded once already. No tensor is read, and torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from areal_like.errors import ConfigError
from areal_like.weights.buckets import TensorSpec, check_names

_INDEX = "model.safetensors.index.json"
_TIED = "lm_head.weight"
"""Not in the checkpoint of a model that ties it to its embedding, and known to every engine."""


@dataclass(frozen=True)
class ModelTensors:
    """Shapes by name."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: str) -> ModelTensors:
        """`model` is what `from_pretrained` takes. Raises ConfigError where it has no readable safetensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in _files(model):
                with safe_open(path, framework="numpy") as tensors:
                    shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path={model}: rollout.engine=sglang needs its weights as safetensors ({error})"
            ) from None
        return cls(shapes)

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Raises WeightSyncError, naming what is unknown, missing or of another shape."""
        check_names(specs, self.shapes, tied=() if _TIED in self.shapes else (_TIED,))


def _files(model: str) -> list[Path]:
    from transformers.utils.hub import (
        cached_file,
    )  # a second of import that only rollout.engine=sglang has to pay

    def find(name: str) -> Path | None:
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    index = find(_INDEX)
    names = (
        ["model.safetensors"]
        if index is None
        else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    )
    files = [find(name) for name in names]
    if absent := [name for name, path in zip(names, files, strict=True) if path is None]:
        raise OSError(f"no {absent[0]} there")
    return [path for path in files if path is not None]
