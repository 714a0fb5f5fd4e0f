"""A transformers model as its configuration describes it, without memory for its parameters.

Parameters are on the meta device. Buffers (rotary frequencies and the like) are real and computed by
transformers' own initialization, as `from_pretrained` does; those that a checkpoint stores are read from it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from areal_like.errors import ConfigError
from trainer.models.safetensors_rows import SafetensorsRows


def build_skeleton(path: str, *, dtype: torch.dtype) -> Any:
    """The causal LM of a Hugging Face directory or name, its parameters on the meta device in `dtype`.

    Raises ConfigError for an architecture that transformers does not know, and for quantized weights.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            from_config: Any = AutoModelForCausalLM.from_config  # untyped
            model = from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path}: transformers has no causal language model for it ({reason})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{path}: its weights are quantized, which cannot be trained: name another model")
    _fill_buffers(model, path)
    # Without generation_config.json the one that was made from the model's configuration stays.
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Other names of parameters that have several -> the first name, which `named_parameters` gives."""
    first = {id(param): name for name, param in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if first[id(param)] != name}


def set_buffer(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _fill_buffers(model: Any, path: str) -> None:
    for name, buffer in list(model.named_buffers()):
        set_buffer(model, name, torch.empty_like(buffer, device="cpu"))
    for param in model.parameters():
        param._is_hf_initialized = True  # else transformers would draw random numbers for it
    model.initialize_weights()
    stored = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    if not stored:
        return
    source = SafetensorsRows.of_model(path)
    for name in stored:
        if name in source.names:
            buffer = model.get_buffer(name)
            value = source.tensor(name)
            if value.shape != buffer.shape:
                raise ConfigError(
                    f"{source.file_of(name)}: {name} has shape {tuple(value.shape)}, and the model needs "
                    f"{tuple(buffer.shape)}"
                )
            set_buffer(model, name, value.to(buffer.dtype))
