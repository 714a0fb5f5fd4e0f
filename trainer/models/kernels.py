"""Kernels of other packages, used where they are installed (`trainer.kernels`).

FlashAttention 3 (`flash_attn_interface`) replaces the kernel behind torch's varlen attention, forward and
backward, on GPUs of compute capability 9.0. Liger's RMSNorm, rotary embedding and SwiGLU replace those of
transformers: each reads and writes its tensors once, where transformers needs several passes.

On a CPU both are off, so the numbers of a job on a CPU do not depend on what is installed.

Left out: Liger's losses, because the policy needs the log-probs of single tokens; Liger on mixtures of
experts (transformers computes all experts in one module), on models with linear attention and on wrapped
models (it changes their encoders too); kernels that are downloaded from a hub at run time, because their code
changes without an installation.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from areal_like.config import Config
from areal_like.precision import routers
from areal_like.weights.untrained import is_wrapped
from trainer.attention.linear import linear_layers

log = logging.getLogger(__name__)

_FA3_CAPABILITY = (9, 0)
"""Compute capability of H100 and H200, the only one that FlashAttention 3 supports."""
_ROPE = "apply_rotary_pos_emb"
"""transformers' name of the rotary embedding in a model's module."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Why each kernel is not used; empty: it is."""

    flash_attention_3: str
    liger: str

    def __str__(self) -> str:
        parts = (("FlashAttention 3", self.flash_attention_3), ("Liger", self.liger))
        return ", ".join(f"{name}: {f'no ({reason})' if reason else 'yes'}" for name, reason in parts)


def choose_kernels(
    setting: str,
    *,
    dtype: str,
    attention: str = "auto",
    compiles: bool = False,
    is_cuda: bool,
    capability: tuple[int, int] | None = None,
) -> Kernels:
    """The kernels for a model. `setting`, `attention`, `compiles`: `trainer.kernels`, `trainer.attention` and
    `trainer.compile`. `dtype`: `model.dtype`. `capability`: the GPU's compute capability.
    """
    common = "trainer.kernels=torch" if setting == "torch" else "" if is_cuda else "no GPU"
    flash = liger = common
    if not common:
        if dtype != "bfloat16" or attention == "rectangles":
            flash = "only for varlen attention in bfloat16"
        elif capability != _FA3_CAPABILITY:
            flash = "the GPU's compute capability is not 9.0"
        else:
            flash = _absent("flash_attn_interface")
        # torch.compile fuses the same operations and would break its graphs at Liger's.
        liger = "trainer.compile=true" if compiles else _absent("liger_kernel")
    return Kernels(flash_attention_3=flash, liger=liger)


def use_kernels(config: Config, device: torch.device, *, dtype: str) -> Kernels:
    """Chooses the kernels for this process's device and activates FlashAttention 3; logs the choice, once."""
    trainer = config.trainer
    return _activated(
        choose_kernels(
            trainer.kernels,
            dtype=dtype,
            attention=trainer.attention,
            compiles=trainer.compile,
            is_cuda=device.type == "cuda" and torch.version.hip is None,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        )
    )


@functools.cache
def _activated(kernels: Kernels) -> Kernels:
    if not kernels.flash_attention_3:
        kernels = Kernels(flash_attention_3=activate_flash_attention_3(), liger=kernels.liger)
    log.info("kernels: %s", kernels)
    return kernels


def activate_flash_attention_3() -> str:
    """Puts FlashAttention 3 in place of torch's varlen kernel; returns why it cannot, or an empty text."""
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, for example
        return f"{type(error).__name__}: {error}"
    return ""


def apply_liger(model: Any, *, rope: bool = True) -> bool:
    """Replaces norms, rotary embedding and SwiGLU of a transformers causal LM by Liger's, in place.

    False, with a line in the log, for models that Liger does not support. Names of parameters stay.

    Liger changes the model's module of transformers too, for every later model of that family in the
    process. Only its rotary embedding stays there, because the layers look it up by its name, and only for
    tensors that Liger's kernels can read. It overwrites the queries and keys that it gets: `rope` has to be
    False where one of them is kept for the backward (`recomputation.py`).
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = model.config.model_type
    is_known = family in MODEL_TYPE_TO_APPLY_LIGER_FN and not is_wrapped(model.config)
    if not is_known or next(routers(model), None) is not None or linear_layers(model):
        log.info("kernels: Liger has none for models of type %s", family)
        return False
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    _apply_liger_kernel_to_instance(
        model=model,
        rope=rope,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    for name, value in before.items():
        found = getattr(module, name)
        if found is not value:
            setattr(module, name, _only_on_gpus(found, value) if name == _ROPE else value)
    return True


def _only_on_gpus(of_liger: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `of_liger` for tensors on a GPU, and `own` for those of a CPU and for fake tensors."""

    @functools.wraps(own)
    def rotary(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_real = query.is_cuda and type(query) is Tensor
        return (of_liger if is_real else own)(query, *args, **kwargs)

    return rotary


def _absent(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
