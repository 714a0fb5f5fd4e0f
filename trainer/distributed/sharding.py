"""Whole gradients into the shards that FSDP2's optimizer step reads, for those who do not let autograd accumulate them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back on every module that a forward without a backward left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduced(param: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's shard, in the parameter's dtype, of the sum over ranks of `whole`: their parts of its full gradient. Collective."""
    whole = whole.to(param.dtype)
    if not isinstance(param, DTensor) or param.device_mesh.size() == 1:
        return whole
    partial = DTensor.from_local(whole, param.device_mesh, [Partial("sum")], run_check=False)
    return partial.redistribute(placements=param.placements).to_local()


def add_gradient(param: nn.Parameter, shard: Tensor) -> None:
    """Adds to `param.grad` what `reduced` returned."""
    if param.grad is not None:
        grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        grad.add_(shard)
    elif isinstance(param, DTensor):
        param.grad = DTensor.from_local(
            shard,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    else:
        param.grad = shard
