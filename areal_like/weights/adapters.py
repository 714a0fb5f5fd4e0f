"""A LoRA adapter as one push carries it: its header, and the names and shapes of its tensors.

With `weights.lora=adapter` a push has only the matrices A [rank, in] and B [out, rank] of each adapted layer,
under the names of PEFT's `adapter_model.safetensors`. An engine adds (alpha / rank) B A to the layers of its
base model. The base is not pushed: trainer and engines load it from `model.path`, and the header has its
digest, so that an engine with another base refuses the adapter.

This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import WeightSyncError
from areal_like.weights.safetensors_header import tensors_in

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a layer in its files."""
MAX_RANK = 4096
MAX_TARGETS = 64
_TARGET = re.compile(r"[A-Za-z0-9_.]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAMPLE_BYTES = 4096
"""Bytes at the beginning of each tensor of the base that its digest covers."""


@dataclass(frozen=True, kw_only=True)
class AdapterHeader:
    """What a receiver has to know about an adapter in addition to its tensors.

    Raises WeightSyncError for values that no adapter has.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Adapted layers, by the last part of their names (`q_proj`) or several last parts, in sorted order."""
    base: str
    """`base_digest` of the model that the adapter belongs to."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise WeightSyncError(f"adapter: rank {self.rank!r} is not a number from 1 to {MAX_RANK}")
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha):
            raise WeightSyncError(f"adapter: alpha {self.alpha!r} is not a finite number")
        if not 1 <= len(self.targets) <= MAX_TARGETS or not all(
            isinstance(target, str) and _TARGET.fullmatch(target) for target in self.targets
        ):
            raise WeightSyncError("adapter: targets must be 1 to 64 names of layers")
        if not isinstance(self.base, str) or not _DIGEST.fullmatch(self.base):
            raise WeightSyncError("adapter: base must be a SHA-256 in hexadecimal")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON or msgpack."""
        return {**asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, raw: object) -> AdapterHeader:
        """Inverse of `to_dict`. Raises WeightSyncError."""
        if not isinstance(raw, Mapping) or raw.keys() != cls.__dataclass_fields__.keys():
            raise WeightSyncError("adapter: want rank, alpha, targets and base")
        targets = raw["targets"]
        if not isinstance(targets, (list, tuple)):
            raise WeightSyncError("adapter: targets must be a list")
        return cls(**{**raw, "targets": tuple(targets)})

    def adapts(self, layer: str) -> bool:
        """True if the adapter has matrices for the layer of this name (PEFT's rule)."""
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)

    def peft_config(self, *, model: str) -> dict[str, Any]:
        """The `adapter_config.json` of PEFT for this adapter of the model `model`."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
            "inference_mode": True,
        }


def a_name(layer: str) -> str:
    """PEFT's name of a layer's matrix A."""
    return f"{PEFT_PREFIX}{layer}.lora_A.weight"


def b_name(layer: str) -> str:
    """PEFT's name of a layer's matrix B."""
    return f"{PEFT_PREFIX}{layer}.lora_B.weight"


def adapter_shapes(
    header: AdapterHeader, layers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of an adapter, in the order of `layers`.

    `layers`: the model's linear layers, name -> (out, in). Raises WeightSyncError for a target that is not
    among them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    unknown = set(header.targets)
    for layer, (num_out, num_in) in layers.items():
        if header.adapts(layer):
            unknown -= {target for target in unknown if layer == target or layer.endswith(f".{target}")}
            shapes[a_name(layer)] = (header.rank, num_in)
            shapes[b_name(layer)] = (num_out, header.rank)
    if unknown:
        raise WeightSyncError(
            f"adapter: this model has no linear layers named {', '.join(sorted(unknown))} below .layers.: "
            "list others in model.lora.targets, or set weights.lora=merged"
        )
    return shapes


def linear_layers(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """The layers of a checkpoint that can have an adapter: name -> (out, in).

    `shapes`: of the checkpoint's tensors by name. Left out are the embedding, the output head, routers, and
    routed experts, which transformers keeps as one parameter for all of them.
    """
    found = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        is_routed = ".experts." in name or layer.endswith((".gate", ".router"))
        if layer != name and len(shape) == 2 and ".layers." in name and not is_routed:
            found[layer] = (int(shape[0]), int(shape[1]))
    return found


def base_digest(files: Sequence[Path]) -> str:
    """A SHA-256 that tells one base model from another, in hexadecimal.

    It covers name, shape, dtype and the first 4 KiB of every tensor, not all bytes: another model or another
    training run of the same model differs in nearly every tensor, and reading 4 KiB of each takes
    milliseconds, where hashing 16 GB would take half a minute at each start. How the tensors are spread over
    `files` (safetensors) does not matter. Raises WeightSyncError for a file that is not safetensors.
    """
    entries: list[tuple[str, str, tuple[int, ...], str]] = []
    for path in files:
        try:
            stored = tensors_in(path)
            with path.open("rb") as file:
                for tensor in stored:
                    file.seek(tensor.offset)
                    sample = hashlib.sha256(file.read(min(tensor.num_bytes, _SAMPLE_BYTES))).hexdigest()
                    entries.append((tensor.name, tensor.dtype, tensor.shape, sample))
        except (OSError, ValueError) as error:
            raise WeightSyncError(f"{path}: cannot read it as safetensors: {error}") from None
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
