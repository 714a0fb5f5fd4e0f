"""Parts of a model that compute in float32, whatever the dtype of the rest, in the trainer and the engine.

The output head (`model.fp32_head`): logits that a matrix product rounds to bfloat16 have steps of up to 2^-8
of their size, so engine and trainer disagree about probabilities although they have the same weights, and
close probabilities become ties. Here the operands stay in the model's dtype and the product is accumulated
and returned in float32, as with SGLang's `--enable-fp32-lm-head`. On a GPU this is one product on the tensor
cores (`torch.mm` with `out_dtype`). torch has no such product on a CPU. Where the CPU multiplies bfloat16
fast, two products give 16 bits: P rounded to bfloat16, and P - round(P), which the kernel subtracts before it
rounds. Elsewhere, and for small products, the operands are converted to float32.

The head's gradients are products of the same kind: the gradient of the logits is rounded to the model's
dtype, the product is not. The trainer runs its head once for each chunk of tokens. `Fp32Head.gradient_sum`
adds up the gradients of the weight in float32 and rounds the sum once, as a layer that runs over all tokens
at once does. Left out: a gradient in float32, because FSDP2 reduces gradients of one dtype.

The routers of a mixture of experts (`model.router_dtype`): their probabilities decide which experts a token
uses, and rounding them to bfloat16 turns close probabilities into ties. So the scores and the weights of the
chosen experts are float32. The router's weights keep their values in the model's dtype, the same as in the
engines. Of the product with the weights there are two forms:

    float32    the product is float32 too
    bfloat16   the product is computed as the model's definition says, in the model's dtype or in float32

SGLang (0.5.23) follows the definitions: it rounds the product of Qwen3-MoE to bfloat16, and computes that of
GLM-4.5 in float32. A trainer that rounds otherwise than the engine chooses other experts where two scores are
close. SGLang on Hopper computes the product of DeepSeek-V3 in float32 for small batches and rounds it for
large ones, which no trainer can follow.
Routers are found by transformers' own declaration of where router logits come from
(`PreTrainedModel._can_record_outputs`). Left out: routers that are a linear layer whose block does the rest
(Jamba, Llama 4), and routers made of other modules, which are float32 in transformers already (Ernie).

Shape suffixes: N rows, D hidden size, V vocabulary, I inner dimension of a product, M its columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from areal_like.cpus import cpu_flags, fast_bfloat16
from areal_like.errors import ConfigError

RouterDtype = Literal["float32", "bfloat16"]
"""A resolved `model.router_dtype`."""
_LEAST_SPLIT = 1 << 22
"""Multiplications from which on a CPU splits a product."""


class Fp32Head(nn.Linear):
    """A head whose logits are float32, of weights and hidden states in a narrower dtype.

    With float32 or wider weights it computes what `nn.Linear` does.
    """

    def forward(self, hidden: Tensor, gradient_VD: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., D]: float32, or the weight's dtype if it is wider.

        `gradient_VD`: a `gradient_sum` that several calls share; None: the weight's gradient of this call is
        rounded on its own.
        """
        if not torch.is_grad_enabled():
            return fp32_logits(hidden, self.weight, self.bias)
        if gradient_VD is None:
            gradient_VD = self.gradient_sum()

        def product(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return _Logits.apply(  # type: ignore[no-any-return, no-untyped-call]
                hidden_ND, weight_VD.detach(), gradient_VD
            )

        return fp32_logits(hidden, self.weight, self.bias, product=product)

    def gradient_sum(self) -> Tensor | None:
        """The argument of `forward` calls whose gradients of the weight are to be added up in float32.

        A [V, D] tensor without memory of its own, whose gradient stands for the weight's. None if no such
        gradient is needed.
        """
        needs_gradient = self.weight.requires_grad and torch.is_grad_enabled()
        if not needs_gradient or not _is_narrow(self.weight):
            return None
        carrier: Tensor = _GradientSum.apply(self.weight)  # type: ignore[no-untyped-call]
        return carrier


def widen_head(model: Any) -> None:
    """Makes the head of a causal language model of transformers an `Fp32Head`, in place."""
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Fp32Head):
        raise ConfigError(
            f"model.fp32_head needs a plain linear layer as the output head, and {type(model).__name__} has "
            f"{type(head).__name__}: set model.fp32_head=false"
        )
    head.__class__ = Fp32Head


def fp32_linear(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """`F.linear` without bias with a float32 result, of operands in bfloat16 or float16.

    On a CPU an operand may be float32 already.
    """
    return _fp32_product(x_ND, weight_VD.t())


def fp32_logits(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = fp32_linear,
) -> Tensor:
    """[..., V]: what `Fp32Head` computes, without a gradient of the weight unless `product` has one."""
    if not _is_narrow(weight_VD):
        return F.linear(hidden, weight_VD, bias_V)
    logits_NV = product(hidden.to(weight_VD.dtype).reshape(-1, hidden.shape[-1]), weight_VD)
    logits = logits_NV.view(*hidden.shape[:-1], -1)
    return logits if bias_V is None else logits + bias_V.float()


def fp32_operand(weight_VD: Tensor) -> Tensor:
    """The weight as `fp32_linear` multiplies it on this device, for callers that use one weight often."""
    is_narrow = _multiplies_narrow(weight_VD) or _is_split(weight_VD[:1], weight_VD.t())
    return weight_VD if is_narrow else weight_VD.float()


class _Logits(torch.autograd.Function):
    """`fp32_linear` whose gradient of the weight, float32, goes to a `_GradientSum`."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, gradient_VD: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        return fp32_linear(hidden_ND, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_NV = grads[0].to(weight_VD.dtype)
        for_hidden = for_weight = None
        if ctx.needs_input_grad[0]:
            for_hidden = _narrow_product(grad_NV, weight_VD)
        if ctx.needs_input_grad[2]:
            for_weight = _fp32_product(grad_NV.t(), hidden_ND)
        return for_hidden, None, for_weight


class _GradientSum(torch.autograd.Function):
    """Weight -> a float32 tensor of its shape without values: autograd adds up its gradients in float32."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor) -> Tensor:
        ctx.dtype = weight_VD.dtype
        return torch.zeros((), device=weight_VD.device).expand(weight_VD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to(ctx.dtype)


def _fp32_product(left_NI: Tensor, right_IM: Tensor) -> Tensor:
    """[N, M] float32. On a CPU an operand may be float32 already."""
    if _multiplies_narrow(left_NI):
        return torch.mm(left_NI, right_IM, out_dtype=torch.float32)
    if _is_split(left_NI, right_IM):
        first_NM = torch.mm(left_NI, right_IM)
        rest_NM = torch.addmm(first_NM, left_NI, right_IM, beta=-1)
        return first_NM.float().add_(rest_NM)
    return torch.mm(left_NI.float(), right_IM.float())


def _narrow_product(left_NI: Tensor, right_IM: Tensor) -> Tensor:
    """[N, M]: the product accumulated in float32 and rounded to the dtype of `right_IM`."""
    if _is_split(left_NI, right_IM):
        return torch.mm(left_NI, right_IM)
    return _fp32_product(left_NI, right_IM).to(right_IM.dtype)


def _is_split(left_NI: Tensor, right_IM: Tensor) -> bool:
    """True for operands whose product a CPU computes faster as two products in bfloat16."""
    return (
        left_NI.dtype == right_IM.dtype == torch.bfloat16
        and left_NI.device.type == "cpu"
        and left_NI.shape[0] * right_IM.numel() >= _LEAST_SPLIT
        and not _multiplies_narrow(left_NI)
        and cpu_is_fast_in_bfloat16()
    )


def _multiplies_narrow(operand: Tensor) -> bool:
    # A fake tensor stands for one of a GPU (`areal-like plan`).
    return operand.is_cuda or isinstance(operand, FakeTensor)


def _is_narrow(weight: Tensor) -> bool:
    return weight.dtype.itemsize < torch.float32.itemsize


def cpu_is_fast_in_bfloat16() -> bool:
    """True if torch multiplies bfloat16 faster than float32 on this machine's CPU: by oneDNN's kernels."""
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and bool(fast_bfloat16(cpu_flags()))


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers model that compute router logits, one for each layer with experts."""
    return (module for module in declared_routers(model) if _is_whole(module))


def declared_routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that transformers declares as the sources of router logits, whole or not."""
    declared = [
        recorder
        for module in model.modules()
        for recorder in _as_list((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    for name, module in model.named_modules():
        for recorder in declared:
            target = getattr(recorder, "target_class", recorder)
            layer_name = getattr(recorder, "layer_name", None)
            if isinstance(module, target) and (layer_name is None or layer_name in name):
                yield module
                break


def route_in_float32(model: nn.Module, *, product: RouterDtype = "float32") -> None:
    """Makes the routers of a transformers model compute in float32 where their weights are narrower.

    Modifies the modules in place; call it once. A model without experts is unchanged. `product`: `bfloat16`
    leaves the product of hidden states and weights in the dtype of the model's definition, and only what
    follows is float32.
    """
    for router in routers(model):
        wrapped = _router_in_float32 if product == "float32" else _router_after_product
        router.forward = functools.partial(wrapped, router, router.forward)


def _router_in_float32(router: nn.Module, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not _has_narrow_weights(router):
        return forward(hidden, *args, **kwargs)
    # FSDP2 gives a module its gathered parameters just before the forward, so they are replaced here. The
    # casts are part of the graph: gradients reach the parameters.
    own: dict[str, Any] = dict(router._parameters)
    try:
        for name, param in own.items():
            router._parameters[name] = None if param is None else param.float()
        return forward(hidden.float(), *args, **kwargs)
    finally:
        router._parameters.update(own)


def _router_after_product(router: nn.Module, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not _has_narrow_weights(router):
        return forward(hidden, *args, **kwargs)
    with _WideProducts():
        return forward(hidden, *args, **kwargs)


class _WideProducts(TorchFunctionMode):
    """Within the block the results of `F.linear` are float32, with the values of their own dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.float() if func is F.linear and _is_narrow(out) else out


def _has_narrow_weights(router: nn.Module) -> bool:
    return any(param is not None and _is_narrow(param) for param in router._parameters.values())


def _is_whole(module: nn.Module) -> bool:
    """True for a module that holds the router's weights itself and computes probabilities from its logits."""
    return next(module.children(), None) is None and not isinstance(module, nn.Linear)


def _as_list(recorders: Any) -> list[Any]:
    if recorders is None:
        return []
    return list(recorders) if isinstance(recorders, (list, tuple)) else [recorders]
