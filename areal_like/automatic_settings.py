"""Resolves settings that are `auto` for a job's devices and model.

Every role computes them by the same functions from the same settings, `areal-like run` writes the results
into the run's config.yaml, and the buffer refuses a peer whose dtype differs from the first peer's.

    model.dtype                      a GPU anywhere in the job: the checkpoint's dtype; else float32
    model.fp32_head                  on where model.dtype is bfloat16; in float32 it changes nothing
    model.router_dtype               bfloat16 where model.dtype is bfloat16; in float32 it changes nothing
    trainer.gradient_checkpointing   on where the trainer is on GPUs
    objective                        the default method (`areal_like/config/default_objective.py`)

Only config.json is read, never weights. For a model that is given by its hub name, it may be downloaded.

`start_limit_s` is a limit that depends on the size of the weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from areal_like.config import Config
from areal_like.errors import ConfigError, first_line
from areal_like.paths import BUILT_MODELS, model_path

Dtype = Literal["float32", "bfloat16"]
LEAST_BYTES_PER_S = 100e6
"""Read rate in bytes per second that start limits assume: that of a slow file system."""
LONG_TOKENS = 4096
"""Sequences beyond this length need an attention kernel that never holds the matrix of scores."""


def compute_dtype(config: Config) -> Dtype:
    """The resolved `model.dtype`: the dtype of the engine's weights and of the trainer's forward pass.

    On GPUs a checkpoint in float16 counts as bfloat16: the trainer has no loss scaling. Raises ConfigError if
    the checkpoint's dtype has to be known, and its config.json cannot be read or names none.
    """
    if config.model.dtype != "auto":
        return config.model.dtype
    if _is_on_cpu(config.trainer.device) and _is_on_cpu(config.rollout.engine_device):
        return "float32"
    if config.model.path in BUILT_MODELS:
        return "float32"  # `trainer.prepare_model` saves them so
    facts = model_facts(config, needed_for="model.dtype=auto")
    named = facts.get("dtype") or facts.get("torch_dtype")
    if not isinstance(named, str):
        raise ConfigError(
            f"model.dtype=auto: config.json of {config.model.path} names no dtype: set model.dtype to "
            "bfloat16 or float32"
        )
    return "float32" if named.removeprefix("torch.") == "float32" else "bfloat16"


def uses_fp32_head(config: Config) -> bool:
    """The resolved `model.fp32_head`. Raises ConfigError as `compute_dtype` does."""
    setting = config.model.fp32_head
    return compute_dtype(config) == "bfloat16" if setting == "auto" else setting


def router_dtype(config: Config) -> Dtype:
    """The resolved `model.router_dtype`. Raises ConfigError as `compute_dtype` does."""
    setting = config.model.router_dtype
    return compute_dtype(config) if setting == "auto" else setting


def recomputes_activations(config: Config) -> bool:
    """The resolved `trainer.gradient_checkpointing`."""
    setting = config.trainer.gradient_checkpointing
    return not _is_on_cpu(config.trainer.device) if setting == "auto" else setting


def resolved(config: Config) -> Config:
    """The configuration with its `auto` settings resolved. Raises ConfigError as `compute_dtype` does, and
    for a model whose attention would not fit on a GPU in that dtype.
    """
    config = dataclasses.replace(
        config.with_resolved_objective(),
        model=dataclasses.replace(
            config.model,
            dtype=compute_dtype(config),
            fp32_head=uses_fp32_head(config),
            router_dtype=router_dtype(config),
        ),
        trainer=dataclasses.replace(config.trainer, gradient_checkpointing=recomputes_activations(config)),
    )
    _check_attention(config)
    return config


def start_limit_s(config: Config) -> float:
    """Longest time without output of an engine that starts or loads weights, in seconds.

    This is `rollout.start_timeout_s` plus the time to read the model's weights. The time is not added for a
    model that is given by its hub name or built by the run.
    """
    folder = Path(config.model.path).expanduser()
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return config.rollout.start_timeout_s + num_bytes / LEAST_BYTES_PER_S


def _check_attention(config: Config) -> None:
    """Raises ConfigError for an attention that would hold L x L scores for each head. In float32, torch has
    no flash attention on GPUs, and its memory-efficient kernel does not support grouped queries. What remains
    needs 137 GB for 32 heads and 32k tokens.
    """
    if config.trainer.attention == "varlen" and config.model.dtype == "float32":
        raise ConfigError(
            "trainer.attention=varlen is a kernel for 16 bits, and model.dtype is float32: set "
            "model.dtype=bfloat16, or trainer.attention=auto"
        )
    longest = max(config.rollout.max_context, config.sampling.max_new_tokens + 1)
    is_affected = config.model.dtype == "float32" and not _is_on_cpu(config.trainer.device)
    if not is_affected or longest <= LONG_TOKENS or config.model.path in BUILT_MODELS:
        return
    facts = model_facts(config, needed_for=f"sequences of {longest} tokens")
    num_heads = facts.get("num_attention_heads")
    if facts.get("num_key_value_heads", num_heads) != num_heads:
        raise ConfigError(
            f"model.dtype=float32 with sequences of {longest} tokens on "
            f"trainer.device={config.trainer.device}: beyond {LONG_TOKENS} tokens no attention kernel fits "
            "this model (grouped queries) into memory: set model.dtype=bfloat16"
        )


def _is_on_cpu(device: str) -> bool:
    return device == "cpu"


def model_facts(config: Config, *, needed_for: str) -> dict[str, Any]:
    """The model's config.json, or its text section if it has several. Raises ConfigError."""
    path = model_path(config)
    try:
        file = Path(path) / "config.json"
        if not file.is_file():
            # Imported here: it takes half a second, which only a model of the hub needs.
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, "config.json"))
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={config.model.path}: config.json, which {needed_for} needs, cannot be read: "
            f"{first_line(error)}"
        ) from None
    if not isinstance(facts, dict):
        raise ConfigError(f"model.path={config.model.path}: config.json is not a JSON object")
    text = facts.get("text_config")
    return facts | text if isinstance(text, dict) else facts
