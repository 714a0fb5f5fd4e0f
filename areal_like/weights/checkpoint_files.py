"""The safetensors files of a model, in a directory or in the cache of the hub.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from areal_like.errors import ConfigError, WeightSyncError
from areal_like.paths import read_json
from areal_like.weights.adapters import base_digest

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def find_file(model: str, name: str) -> Path | None:
    """One file of a model; None if the model does not have it. `model`: argument for `from_pretrained`."""
    # Imported here: it takes a second.
    from transformers.utils.hub import cached_file

    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def weight_files(model: str) -> list[Path]:
    """The files with the model's weights. Raises OSError if there are none in safetensors."""
    if (single := find_file(model, _SINGLE)) is not None:  # the trainer too prefers it to an index
        return [single]
    index = find_file(model, _INDEX)
    names = [_SINGLE] if index is None else sorted(set(read_json(index)["weight_map"].values()))
    files = [find_file(model, name) for name in names]
    if absent := [name for name, path in zip(names, files, strict=True) if path is None]:
        raise OSError(f"{absent[0]} is missing")
    return [path for path in files if path is not None]


def base_of(model: str) -> str:
    """`base_digest` of a model, argument for `from_pretrained`. Raises ConfigError without safetensors."""
    try:
        return base_digest(weight_files(model))
    except (OSError, WeightSyncError) as error:
        raise ConfigError(
            f"model.path={model}: weights.lora=adapter needs its weights as safetensors ({error})"
        ) from None
