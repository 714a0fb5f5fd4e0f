"""The parts of a checkpoint that training leaves as they are: encoders of other inputs, and routers' biases.

A checkpoint may wrap a language model together with encoders of images, video or sound (Qwen3.5, Qwen3-VL,
Gemma 3). Here only the language model is trained, on text. `set_apart` removes every other module from the
wrapper. They then cost no memory, and the language model keeps the names of the wrapper's checkpoint, which
engines expect in pushes.

Routers of some mixtures of experts add a bias to their scores when they choose experts, and not to the
weights of the experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; GLM-4.5). Pretraining moves it by a
rule, and no gradient reaches it. transformers keeps it in a buffer, or in a frozen parameter, of which
`set_apart` makes a buffer: FSDP2 would round a parameter to the dtype of the forward.

The trainer and the embedded engine load models through this module. All of them read these parts from the
initial checkpoint. They are saved unchanged with every checkpoint and never pushed.

Everything is derived from transformers' classes, and no architecture is known by name. Left out: wrappers
whose language model is a complete causal language model with a head of its own (BLIP-2, for example).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from areal_like.errors import ConfigError

_LEFT_OUT = "_areal_left_out"
"""Attribute of a model with the paths of its modules and parameters that `set_apart` has removed."""


def text_config(config: Any) -> Any:
    """The language model's part of a configuration of transformers; a plain model's is the configuration."""
    return config.get_text_config()


def is_wrapped(config: Any) -> bool:
    """True if the configuration describes a language model and other models around it."""
    return text_config(config) is not config


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the language model of a configuration, with its wrapper."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wrappers: Any = AutoModelForImageTextToText
    has_wrapper = is_wrapped(config) and type(config) in wrappers._model_mapping
    return wrappers if has_wrapper else AutoModelForCausalLM


def decoder_of(model: Any) -> Any:
    """The part of a model that makes hidden states of tokens: everything but the output head."""
    return model.get_decoder() if is_wrapped(model.config) else model.base_model


def frozen_parameters(model: nn.Module) -> frozenset[str]:
    """Parameters that the definition of a model excludes from training.

    `model`: as its class made it. `from_pretrained` forgets which parameters are frozen.
    """
    return frozenset(name for name, param in model.named_parameters() if not param.requires_grad)


def set_apart(model: Any, *, frozen: Collection[str]) -> None:
    """Leaves only what is trained among the parameters of a model, in place.

    `model`: of the class that `auto_class` returns, unchanged. `frozen`: its `frozen_parameters`. Raises
    ConfigError for a wrapper whose language model cannot be told apart from the rest.
    """
    if is_wrapped(model.config):
        _remove_encoders(model)
    for name, param in list(model.named_parameters()):
        if name in frozen:
            module, leaf = _owner(model, name)
            delattr(module, leaf)
            module.register_buffer(leaf, param.data)


def left_out(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules and parameters that `set_apart` has removed from a model."""
    paths: tuple[str, ...] = getattr(model, _LEFT_OUT, ())
    return paths


def _remove_encoders(model: Any) -> None:
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if head is None or decoder is model or decoder.get_output_embeddings() is not None:
        raise ConfigError(
            f"{type(model).__name__} is not a language model with one output head and encoders beside it, so "
            "it cannot be trained on text alone: choose another model"
        )
    wanted = {id(part) for root in (decoder, head) for part in root.modules()}
    removed: list[str] = []

    def prune(module: nn.Module, prefix: str) -> None:
        own = [name for name, _ in module.named_parameters(recurse=False)]
        own += [name for name, _ in module.named_buffers(recurse=False) if _is_persistent(module, name)]
        removed.extend(f"{prefix}{name}" for name in own)
        children = [name for name, child in module.named_children() if id(child) not in wanted]
        for name in children:
            child = module.get_submodule(name)
            if any(id(part) in wanted for part in child.modules()):
                prune(child, f"{prefix}{name}.")
            else:
                own.append(name)
                removed.append(f"{prefix}{name}")
        for name in own:
            # Not deleted: forwards test for it, or use it only for inputs that do not occur here.
            setattr(module, name, None)

    prune(model, "")
    setattr(model, _LEFT_OUT, tuple(removed))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each buffer that a model's checkpoint contains."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_persistent(module, name):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _is_persistent(module: nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a buffer by its full name."""
    module, leaf = _owner(model, name)
    setattr(module, leaf, value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


class NamesInModel:
    """The names in a transformers model of tensors in files, as `from_pretrained` finds them."""

    def __init__(self, model: Any, known: Mapping[str, object]) -> None:
        """`known`: names that the model has; they decide whether its base's prefix is added or left out."""
        # Imported here: an engine of another package has no use for it.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._known = dict(known)
        self._prefix = model.base_model_prefix
        self._left_out = left_out(model)
        self._renamings = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightRenaming)]

    def __call__(self, name: str) -> str:
        """The model's name of a tensor of a file."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._known)
        return str(renamed)

    def is_left_out(self, name: str, renamed: str) -> bool:
        """True if a tensor belongs to what `set_apart` has removed. `renamed`: its name in the model."""
        return any(
            each == path or each.startswith(f"{path}.") for path in self._left_out for each in (name, renamed)
        )


@torch.no_grad()
def read_buffers(model: Any, files: Iterable[Path]) -> None:
    """Reads the persistent buffers of a model from safetensors files, onto their devices.

    Those of floating-point numbers become float32, whatever the dtype in the files. Raises ConfigError for a
    buffer that the files lack, and for one of another shape.
    """
    buffers = dict(persistent_buffers(model))
    if not buffers:
        return
    names = NamesInModel(model, buffers)
    missing, path = set(buffers), Path()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - not a mapping
                    name = stored if stored in buffers else names(stored)
                    if name in missing:
                        value = file.get_tensor(stored)
                        missing.discard(name)
                        check_buffer(model, name, tuple(value.shape), place=f"{path}: {stored}")
                        value = value.float() if value.is_floating_point() else value.clone()
                        set_buffer(model, name, value.to(buffers[name].device))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): is it complete? Download it again") from None
    if missing:
        raise ConfigError(
            f"{path.parent}: the safetensors files lack {min(missing)} of {type(model).__name__}: download "
            "the model again, or name one whose files fit its config.json"
        )


def check_buffer(model: nn.Module, name: str, shape: Sequence[int], *, place: str) -> None:
    """Raises ConfigError if a stored buffer has another shape than the model's. `place`: for the message."""
    wanted = model.get_buffer(name).shape
    if tuple(wanted) != tuple(shape):
        raise ConfigError(
            f"{place} has shape {list(shape)}, and {type(model).__name__} needs {list(wanted)}: name a model "
            "whose files fit its config.json"
        )
