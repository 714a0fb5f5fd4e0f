"""Names and shapes of a checkpoint's tensors, read from the headers of its safetensors files.

SGLang responds with 200 to an unknown tensor name, and loads part of an update if a later tensor has the
wrong shape. So before anything is sent, the names and shapes of a push are compared with those of the
checkpoint that SGLang has loaded. No tensor is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from areal_like.errors import ConfigError
from areal_like.paths import read_json
from areal_like.weights.buckets import TensorSpec, check_names
from areal_like.weights.checkpoint_files import find_file, weight_files

_TIED = "lm_head.weight"
"""The output head. Often missing in the checkpoint of a model that ties it to its embedding; every engine
accepts it in a push. Some of these checkpoints contain it anyway (Qwen3-0.6B and 1.7B), although pushes omit
it."""


@dataclass(frozen=True)
class CheckpointShapes:
    """Tensor shapes by name."""

    shapes: dict[str, tuple[int, ...]]
    ties_head: bool = False
    """True if the head may be tied to the embedding (config.json does not exclude it)."""

    @classmethod
    def of(cls, model: str) -> CheckpointShapes:
        """Reads the shapes. `model`: argument for `from_pretrained`. Raises ConfigError without readable
        safetensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in weight_files(model):
                with safe_open(path, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a mapping
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
            ties_head = _ties_head(model)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path={model}: rollout.engine=sglang needs its weights as safetensors ({error})"
            ) from None
        return cls(shapes, ties_head=ties_head)

    def trained(self, untrained: Collection[str]) -> dict[str, tuple[int, ...]]:
        """The shapes without those of `untrained` (`Manifest.untrained`)."""
        left_out = set(untrained)
        return {name: shape for name, shape in self.shapes.items() if name not in left_out}

    def check(self, specs: Sequence[TensorSpec], *, untrained: Collection[str] = ()) -> None:
        """Raises WeightSyncError with the names that are unknown, missing or have a different shape.

        `untrained`: names that the push leaves out (`Manifest.untrained`).
        """
        is_optional = self.ties_head or _TIED not in self.shapes
        check_names(specs, self.trained(untrained), tied=(_TIED,) if is_optional else ())


def _ties_head(model: str) -> bool:
    config = find_file(model, "config.json")
    facts = {} if config is None else read_json(config)
    text = facts.get("text_config") or {}
    return text.get("tie_word_embeddings", facts.get("tie_word_embeddings")) is not False
