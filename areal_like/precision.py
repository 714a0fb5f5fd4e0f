"""Parts of a model that compute in float32, whatever the dtype of the rest, in the trainer and the engine.

The output head (`model.fp32_head`): logits that a matrix product rounds to bfloat16 have steps of up to 2^-8
of their size, so engine and trainer disagree about probabilities although they have the same weights. Here
weight and hidden states are converted to float32 before the product. The weight keeps its values in the
model's dtype, as with SGLang's `--enable-fp32-lm-head`.

The routers of a mixture of experts: their probabilities decide which experts a token uses, and rounding them
to bfloat16 turns close probabilities into ties. So the product, the softmax and the weights of the chosen
experts are float32. The router's weights keep their values in the model's dtype, the same as in the engines:
SGLang (0.5.23, Qwen3-MoE) multiplies in bfloat16 with float32 accumulation, and does the rest in float32.
Routers are found by transformers' own declaration of where router logits come from
(`PreTrainedModel._can_record_outputs`). Left out: routers that are a linear layer whose block does the rest
(Jamba, Llama 4), and routers made of other modules, which are float32 in transformers already (Ernie).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widen_head(model: Any) -> None:
    """Makes the head of a causal language model of transformers compute in float32, in place."""
    head = model.get_output_embeddings()
    head.forward = MethodType(_head_in_float32, head)


def _head_in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    return F.linear(hidden.to(dtype), head.weight.to(dtype), bias)


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers model that compute router logits, one for each layer with experts."""
    declared = [
        recorder
        for module in model.modules()
        for recorder in _as_list((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    for name, module in model.named_modules():
        for recorder in declared:
            target = getattr(recorder, "target_class", recorder)
            layer_name = getattr(recorder, "layer_name", None)
            if (
                isinstance(module, target)
                and (layer_name is None or layer_name in name)
                and _is_whole(module)
            ):
                yield module
                break


def route_in_float32(model: nn.Module) -> None:
    """Makes the routers of a transformers model compute in float32 where their weights are narrower.

    Modifies the modules in place; call it once. A model without experts is unchanged.
    """
    for router in routers(model):
        router.forward = functools.partial(_router_in_float32, router, router.forward)


def _router_in_float32(router: nn.Module, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    own: dict[str, Any] = dict(router._parameters)
    if all(param is None or param.dtype.itemsize >= torch.float32.itemsize for param in own.values()):
        return forward(hidden, *args, **kwargs)
    # FSDP2 gives a module its gathered parameters just before the forward, so they are replaced here. The
    # casts are part of the graph: gradients reach the parameters.
    try:
        for name, param in own.items():
            router._parameters[name] = None if param is None else param.float()
        return forward(hidden.float(), *args, **kwargs)
    finally:
        router._parameters.update(own)


def _is_whole(module: nn.Module) -> bool:
    """True for a module that holds the router's weights itself and computes probabilities from its logits."""
    return next(module.children(), None) is None and not isinstance(module, nn.Linear)


def _as_list(recorders: Any) -> list[Any]:
    if recorders is None:
        return []
    return list(recorders) if isinstance(recorders, (list, tuple)) else [recorders]
