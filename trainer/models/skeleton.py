"""Builds a transformers model from its configuration, without memory for its parameters.

Parameters are on the meta device. Buffers (rotary frequencies and the like) are real and computed by
transformers' own initialization, as `from_pretrained` does. They are never read from a file: `hf_tensors`
refuses models whose checkpoints store buffers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from areal_like.errors import ConfigError, first_line


def build_skeleton(path: str, *, dtype: torch.dtype) -> Any:
    """The causal LM of a Hugging Face directory or name, its parameters on the meta device in `dtype`.

    Raises ConfigError for an architecture that transformers does not know, and for quantized weights.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            from_config: Any = AutoModelForCausalLM.from_config  # untyped
            model = from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"{path}: transformers has no causal language model for it ({first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{path}: its weights are quantized, which cannot be trained: name another model")
    _compute_buffers(model)
    # Without generation_config.json, the generation config made from the model's configuration stays.
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Other name of a tied parameter -> its first name, which `named_parameters` gives."""
    first = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if first[id(param)] != name}


def set_buffer(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _compute_buffers(model: Any) -> None:
    for name, buffer in list(model.named_buffers()):
        set_buffer(model, name, torch.empty_like(buffer, device="cpu"))
    for param in model.parameters():
        param._is_hf_initialized = True  # otherwise transformers would initialize it randomly
    model.initialize_weights()
