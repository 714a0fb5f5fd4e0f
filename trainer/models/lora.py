"""LoRA: adapters on the linear layers of a frozen base model (Hu et al., arXiv 2106.09685).

    y = x W^T + scale (x A^T) B^T       W [out, in] frozen; A [rank, in] and B [out, rank] trained
    scale = alpha / rank                B starts at zero, so a new adapter changes nothing

PEFT puts the matrices around the layers of the model's skeleton, on the meta device. The base's weights are
kept in `model.dtype`, the matrices in float32 like all weights that are trained. FSDP2 shards both by rows,
and casts the matrices to `model.dtype` for the forward, as it does with all weights of a full training.

The weights of the merged model, W + scale B A, are computed in float32 and then rounded: `merged_rows`. A
rank's rows of B belong to the same outputs as its rows of W, so it needs only A from the other ranks.

Left out: adapters on the output head, on embeddings and on routed experts, which transformers keeps as one
parameter for all experts, and so on layers of shared experts and dense blocks with the same names; PEFT's
variants (DoRA, rsLoRA, biases).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from areal_like.config import LoraConfig
from areal_like.errors import ConfigError
from areal_like.precision import routers
from areal_like.weights.hf_layout import ADAPTER, hf_tensors, is_adapter
from trainer.distributed.sharding import local, row_range

_MOST_LISTED = 12


def add_adapter(model: Any, settings: LoraConfig) -> None:
    """Puts a new adapter around the chosen layers of a causal LM on the meta device, and freezes the rest.

    Raises ConfigError for targets that the model does not have or that cannot have an adapter.
    """
    # It takes seconds, which only a run with adapters needs.
    import peft

    targets = _targets(model, settings)
    alpha = settings.alpha
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        bias="none",
    )
    model.requires_grad_(False)
    with torch.device("meta"):
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, layer in _layers(model):
        if not isinstance(layer.base_layer, nn.Linear):
            raise ConfigError(
                f"model.lora.targets: {name} is a {type(layer.base_layer).__name__}, and only linear layers "
                "can have an adapter: list the names of others in model.lora.targets"
            )
    for name, param in model.named_parameters():
        if is_adapter(name):
            param.data = param.data.to(model.dtype)
    use_dropout(model, False)


def _targets(model: Any, settings: LoraConfig) -> tuple[str, ...]:
    """`model.lora.targets` as names of layers, sorted; raises ConfigError for one without a layer."""
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    routed = _routed(model)
    linear = [
        name
        for name, part in modules.items()
        if isinstance(part, nn.Linear) and part is not head and name.rpartition(".")[2] not in routed
    ]
    if isinstance(settings.targets, str):
        if not linear:
            raise ConfigError(f"model.lora.targets=all-linear: {type(model).__name__} has no linear layers")
        return tuple(sorted({name.rpartition(".")[2] for name in linear}))
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in settings.targets:
        if target.rpartition(".")[2] in routed:
            raise ConfigError(
                f"model.lora.targets: {target}: a layer of this name is in the blocks with routed experts of "
                f"{type(model).__name__}, where PEFT and engines would want matrices for each expert; use "
                f"some of {', '.join(known[:_MOST_LISTED])}, or all-linear"
            )
        parts = [part for name, part in modules.items() if name == target or name.endswith(f".{target}")]
        if not parts or any(not isinstance(part, nn.Linear) or part is head for part in parts):
            why = "has no layer of this name" if not parts else "cannot have an adapter there"
            raise ConfigError(
                f"model.lora.targets: {target}: {type(model).__name__} {why}; use some of "
                f"{', '.join(known[:_MOST_LISTED])}, or all-linear"
            )
    return tuple(sorted(set(settings.targets)))


def _routed(model: Any) -> frozenset[str]:
    """Last parts of the names of the layers in blocks with routed experts: of these experts, which shared
    experts have too, and of the gates beside them."""
    of_routers = {id(router) for router in routers(model)}
    if not of_routers:
        return frozenset()
    modules = dict(model.named_modules())
    blocks = [modules[name.rpartition(".")[0]] for name, part in modules.items() if id(part) in of_routers]
    layers = [name for block in blocks for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    experts = [
        tensor.name.removesuffix(".weight") for tensor in hf_tensors(model) if ".experts." in tensor.name
    ]
    return frozenset(name.rpartition(".")[2] for name in (*layers, *experts))


def targets_of(model: Any) -> tuple[str, ...]:
    """Last parts of the names of the adapted layers, sorted: `target_modules` of adapter_config.json."""
    return tuple(sorted(model.peft_config[ADAPTER].target_modules))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, PEFT's layer) of each adapted layer, in the order of the model."""
    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_A", ()):
            yield name, module


def use_dropout(model: nn.Module, is_on: bool) -> None:
    """Turns the dropout of the adapters' inputs on or off."""
    for _, layer in _layers(model):
        layer.lora_dropout.train(is_on)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model computes as its base alone within the block."""
    # Not PEFT's disable_adapter, which also changes `requires_grad`: of sharded or of gathered parameters,
    # whichever FSDP2 has put in place at this moment.
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, rank: int, world_size: int) -> None:
    """Fills this rank's rows of a new adapter: A uniform within 1 / sqrt(in), as in PEFT, and B zero.

    A's numbers depend on `seed` and the layer's name, and not on the number of ranks.
    """
    for name, param in model.named_parameters():
        if not is_adapter(name):
            continue
        rows = local(param.detach())
        if ".lora_B." in name:
            rows.zero_()
            continue
        of_layer = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(of_layer[:7], "little"))
        whole = torch.empty(param.shape).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(param.shape[1])
        first, end = row_range(param.shape, rank=rank, world_size=world_size)
        rows.copy_(whole[first:end])


def scales(model: nn.Module) -> dict[str, float]:
    """Name of each adapted layer -> its scale."""
    return {name: float(layer.scaling[ADAPTER]) for name, layer in _layers(model)}


def merged_rows(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """Rows of W + scale B A: [rows, in] in float32, or the adapter's dtype if wider.

    `weight`: [rows, in] in the base's dtype; `a`: [rank, in]; `b`: [rows, rank].
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)


def layer_matrices(layer: str) -> tuple[str, str, str]:
    """Names of the parameters W, A and B of an adapted layer."""
    return (
        f"{layer}.base_layer.weight",
        f"{layer}.lora_A.{ADAPTER}.weight",
        f"{layer}.lora_B.{ADAPTER}.weight",
    )
