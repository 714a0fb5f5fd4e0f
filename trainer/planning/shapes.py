"""Finds the shape of the policy: a directory with the model's config.json, with or without weights.

It is the model's own directory or transformers' cache. A model that is not on this machine is planned from
its config.json in configs/scale/models/, so that a job can be planned before anything is downloaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from areal_like.config import Config
from areal_like.errors import ConfigError, first_line
from areal_like.paths import BUILT_MODELS
from areal_like.runtime.command_line import CONFIGS
from areal_like.weights.untrained import auto_class, is_wrapped, set_apart, text_config
from trainer.attention.linear import LINEAR, state_size

SHAPES = CONFIGS / "scale" / "models"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The data about a model that the planner needs, and its directory."""

    directory: str
    """The directory with config.json."""
    source: str
    """The origin of the shape, for the report."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries and keys."""
    value_dim: int
    """Of values."""
    vocab_size: int
    max_positions: int
    num_linear_layers: int = 0
    """Layers with linear attention; the others have keys and values for every token."""
    state_values: int = 0
    """Numbers in the state of one sequence, over all layers with linear attention."""
    latents: tuple[int, int] | None = None
    """Of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): sizes of the latent and of the key with
    positions, which are cached for all heads together (`kv_lora_rank`, `qk_rope_head_dim`)."""
    num_encoder_params: int = 0
    """Parameters of encoders of other inputs, a vision tower for example."""

    @property
    def num_attention_layers(self) -> int:
        return self.num_layers - self.num_linear_layers

    def kv_values_per_token(self, *, engine: str, num_gpus: int) -> int:
        """Numbers in the KV cache of one GPU for one token, over all layers. `num_gpus`: of one engine."""
        if self.latents is not None:
            # Each GPU has them whole. SGLang keeps both in one row (MLATokenToKVPool), the embedded engine
            # in two arrays of equal rows (KVCache).
            size = sum(self.latents) if engine == "sglang" else 2 * max(self.latents)
        else:
            # With more GPUs than KV heads, SGLang keeps a copy of a head on several of them.
            size = max(1, self.num_kv_heads // num_gpus) * (self.head_dim + self.value_dim)
        return self.num_attention_layers * size

    def decode_flops_per_position(self, *, engine: str) -> int:
        """FLOPs of a sampled token's attention for each position of its context, over all layers.

        With multi-head latent attention SGLang multiplies queries and probabilities by the latents themselves
        (the up-projections are absorbed into those of queries and outputs; DeepSeek-V2, arXiv 2405.04434,
        section 2.1.2). The embedded engine expands the latents of the whole context for each token, as
        transformers does.
        """
        if self.latents is None:
            return 4 * self.attention_size
        latent, key_part = self.latents
        if engine == "sglang":
            per_head = 2 * (latent + key_part) + 2 * latent
        else:
            expanded = self.head_dim - key_part + self.value_dim
            per_head = 2 * (self.head_dim + self.value_dim) + 2 * latent * expanded
        return self.num_attention_layers * self.num_heads * per_head

    @property
    def attention_size(self) -> int:
        """Layers times query heads times mean head size: FLOPs of the trainer's attention, and of the
        engine's without latents, are proportional to it."""
        return self.num_attention_layers * self.num_heads * (self.head_dim + self.value_dim) // 2


def known_shapes() -> list[str]:
    """Names below configs/scale/models/."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def with_local_model(config: Config) -> tuple[Config, ModelShape]:
    """The configuration with `model.path` replaced by a directory with config.json, and the model's shape.

    Raises ConfigError if there is none.
    """
    path = config.model.path
    directory, source = find_shape(path)
    whole, hf_config = _read(directory, path=path)
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    if missing := [name for name in needed if getattr(hf_config, name, None) is None]:
        raise ConfigError(
            f"model.path={path}: its config.json has no {', '.join(missing)}, so it describes no language "
            "model with attention: choose another model.path"
        )
    dtype = config.model.dtype
    if path in BUILT_MODELS and dtype == "auto":
        dtype = "float32"  # the dtype in which `trainer.prepare_model` saves them
    local = replace(config, model=replace(config.model, path=str(directory), dtype=dtype))
    heads = int(hf_config.num_attention_heads)
    num_linear = list(getattr(hf_config, "layer_types", None) or ()).count(LINEAR)
    head_dim = int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads)
    value_dim, latents = head_dim, None
    if getattr(hf_config, "kv_lora_rank", None):  # its `head_dim` is that of the part with positions
        latents = (int(hf_config.kv_lora_rank), int(hf_config.qk_rope_head_dim))
        head_dim = int(hf_config.qk_nope_head_dim) + latents[1]
        value_dim = int(hf_config.v_head_dim)
    return local, ModelShape(
        directory=str(directory),
        source=source,
        num_layers=int(hf_config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(hf_config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        value_dim=value_dim,
        vocab_size=int(hf_config.vocab_size),
        max_positions=int(getattr(hf_config, "max_position_embeddings", None) or 1 << 30),
        num_linear_layers=num_linear,
        state_values=num_linear * state_size(hf_config),
        latents=latents,
        num_encoder_params=_num_encoder_params(whole),
    )


def find_shape(path: str, *, key: str = "model.path") -> tuple[Path, str]:
    """Returns (directory with config.json, its origin). Raises ConfigError, which names the setting `key`."""
    if path in BUILT_MODELS:
        return SHAPES / path, f"{path} (built in)"
    directory = Path(path).expanduser()
    if (directory / "config.json").is_file():
        return directory, str(directory)
    if not path.startswith((".", "/", "~")) and (cached := _cached(path)) is not None:
        return cached, f"{path} (cache)"
    name = Path(path).name.lower()
    if name in known_shapes():
        return SHAPES / name, f"configs/scale/models/{name}, because {path} is not on this machine"
    raise ConfigError(
        f"{key}={path}: not on this machine, and no known shape (known: {', '.join(known_shapes())}): "
        "give a directory with config.json; plan needs no weights in it"
    )


def _cached(name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if file is None else Path(file).parent


def _read(directory: Path, *, path: str) -> tuple[Any, Any]:
    """The configuration, and the language model's part of it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        return config, text_config(config)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"model.path={path}: transformers cannot read its config.json ({first_line(error)})"
        ) from None


def _num_encoder_params(hf_config: Any) -> int:
    """Parameters of a wrapper that are not the language model's; 0 for one that transformers cannot build,
    which the trace reports."""
    if not is_wrapped(hf_config):
        return 0
    try:
        with torch.device("meta"):
            model = auto_class(hf_config).from_config(copy.deepcopy(hf_config), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return 0
    num_params: int = sum(param.numel() for param in model.parameters())
    set_apart(model, frozen=())
    num_left: int = sum(param.numel() for param in model.parameters())
    return num_params - num_left
