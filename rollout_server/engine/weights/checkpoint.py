"""Reads a Hugging Face directory of safetensors files as one weight update."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from areal_like.errors import WeightSyncError
from areal_like.paths import read_json
from rollout_server.engine.weights.bucket_receiver import BucketReceiver


def store_checkpoint(path: Path, receiver: BucketReceiver) -> None:
    """Stores all tensors of the directory in the shadow weights. Raises WeightSyncError."""
    try:
        index = path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
        for file in files:
            with safe_open(path / file, framework="pt", device=str(receiver.device)) as tensors:
                names = tensors.keys()
                receiver.store({name: tensors.get_tensor(name) for name in names})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise WeightSyncError(f"{path}: cannot read weights: {error}") from None
