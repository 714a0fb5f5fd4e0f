"""What a decoder layer keeps for its backward, where activations are recomputed.

    trainer.gradient_checkpointing=true         each layer's input; the backward computes the layer again
    trainer.gradient_checkpointing=selective    also the output of attention and of every second matrix
                                                product, which are not computed again
    trainer.offload_activations=true            the layers' inputs are in pinned host memory meanwhile

Attention keeps its output and one number for each head and row, much less than it computes. Of the matrix
products of a layer the second, the fourth and so on are kept: in a layer with the products q, k, v, o, gate,
up, down those are k, o and up, half of the work of the seven. The last product's output is read by no
backward, so it is not computed again in any case (torch's early stop). These choices are torchtitan's, which
counts from the first product on and so keeps the last one.

Products of experts (grouped) and linear attention are computed again: the former's outputs are larger than
their inputs by the number of experts of a token, and the latter's kernels are no operations of torch. Liger's
rotary embedding writes into the product k that it gets, so `selective` leaves it out (`kernels.py`). With
`trainer.compile` it is refused: compiled products write into buffers, which torch refuses to keep.

transformers recomputes a layer in training mode only, where some models also have dropout (seed_oss, opt) or
noise in their routers (phimoe). So a layer alone is in training mode, and not while it computes.

Left out: copies on a stream of their own. A layer's input is a few hundredths of a second of PCIe for some
tenths of a second of computation; the copies run on the training's stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from areal_like.config.trainer import Recomputation
from areal_like.errors import ConfigError, first_line

_PRODUCTS = frozenset({"aten::mm", "aten::addmm"})
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
    }
)


def recompute_layers(model: Any, *, kind: Recomputation, offload: bool) -> None:
    """Makes the decoder layers of a transformers model recompute their activations, as `kind` says (not
    False). `offload`: their inputs are in host memory between forward and backward. Raises ConfigError for a
    model whose layers cannot."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = _selective_contexts
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    except ValueError as error:
        raise ConfigError(f"{first_line(error)} Set trainer.gradient_checkpointing=false") from error
    layers: list[Any] = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # not its modules
        layer._gradient_checkpointing_func = _Evaluating(layer, layer._gradient_checkpointing_func)
        if offload:
            layer._gradient_checkpointing_func = InputsOnHost(layer._gradient_checkpointing_func)


class _Evaluating:
    """Calls a layer by `checkpoint`; the layer is in evaluation mode while it computes, also again."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self._layer = layer
        self._checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._checkpoint(functools.partial(self._computed, function), *args)

    def _computed(self, function: Callable[..., Any], *args: Any) -> Any:
        self._layer.training = False
        try:
            return function(*args)
        finally:
            self._layer.training = True


class InputsOnHost:
    """Calls a layer by `checkpoint`, which saves the layer's input for the backward: here on the host."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint
        self.saving: Callable[[], AbstractContextManager[Any]] = _on_host
        """Under this context torch saves tensors on the host; a trace has another one."""

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        # Within the call, what the layer's operations save is dropped by checkpoint's own, inner hooks.
        with self.saving():
            return self._checkpoint(function, *args)


def _on_host() -> saved_tensors_hooks:
    return saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Copies in the order of the current stream; the host does not wait, and may not read the copy."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor, non_blocking=tensor.is_cuda)


def _to_device(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, copy = saved
    return copy.to(device, non_blocking=device.type == "cuda")


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of one layer's forward and of its recomputation (`context_fn` of checkpoint)."""
    num_products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = operation.name().partition(".")[0]
        if name in _PRODUCTS:
            num_products[context.is_recompute] += 1
            is_kept = num_products[context.is_recompute] % 2 == 0
        else:
            is_kept = name in _ATTENTION
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call, no-any-return]
