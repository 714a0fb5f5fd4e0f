"""Puts full gradients into FSDP2's shards, for estimators that do not use autograd's accumulation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter or gradient, sharing memory; an unsharded tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Reshards every module: a forward without a backward leaves the parameters unsharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduced(param: nn.Parameter, whole: Tensor) -> Tensor:
    """Sums the ranks' parts of a parameter's full gradient; returns this rank's shard of the sum.

    `whole`: this rank's part. The result has the parameter's dtype. Collective.
    """
    whole = whole.to(param.dtype)
    if not isinstance(param, DTensor) or param.device_mesh.size() == 1:
        return whole
    partial = DTensor.from_local(whole, param.device_mesh, [Partial("sum")], run_check=False)
    return partial.redistribute(placements=param.placements).to_local()


def add_gradient(param: nn.Parameter, shard: Tensor) -> None:
    """Adds `shard`, as `reduced` returned it, to `param.grad`."""
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
