"""AdamW over this rank's shards.

The shards are plain tensors: element-wise updates do not need DTensor, whose dispatch costs more than the
update itself for a small model. Only the gradient's norm needs all shards. Replicas make the same update from
the sum of their gradients, and are compared after it. The learning rate is a pure function of the step
(linear warm-up, then constant or linear decay), so there is no scheduler state to save.

With `trainer.offload_optimizer` the moments are in (pinned) host memory between the updates. An update takes
the shards in parts whose moments are at most `_PART_BYTES`: it copies those of a part to the device, updates
the part, and copies them back. Left out: copies of one part during the update of another, because an update
takes a second or two of a step of minutes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from areal_like.config import TrainerConfig
from areal_like.errors import ArealError
from trainer.distributed.pinning import host_empty
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.packed_model import PackedModel

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
_PART_BYTES = 1 << 30
"""Moments on the device at a time, if the others are on the host."""


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned if `tensor` is on a GPU; complete when the device's work is."""
    copy = host_empty(tensor.shape, tensor.dtype, pinned=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=tensor.is_cuda)


class ShardedAdamW:
    """Scales, clips and applies accumulated, unnormalized gradients."""

    kinds = MOMENTS

    def __init__(
        self,
        model: PackedModel,
        ranks: Ranks,
        *,
        lr: float,
        warmup_steps: int = 0,
        decay_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        offload: bool = False,
        to_host: Callable[[Tensor], Tensor] = host_copy,
    ) -> None:
        """`lr`: rate after the warm-up; it falls linearly to zero at step `decay_steps` (0: it stays
        constant).

        `weight_decay` applies to matrices only. `max_grad_norm`: 0 turns clipping off. `offload`:
        `trainer.offload_optimizer`; `to_host`: makes the copies on the host, of which a trace has others.
        """
        self._ranks = ranks
        self.lr = lr
        """Rate after the warm-up and before the decay. It may change between steps."""
        self._warmup_steps = warmup_steps
        self._decay_steps = decay_steps
        self._max_grad_norm = max_grad_norm
        self._params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.shards = {
            name: torch.nn.Parameter(local(param.detach())) for name, param in self._params.items()
        }
        """This rank's part of each parameter that is trained, by name; memory shared with the model."""
        # If a parameter has fewer rows than there are ranks, some ranks have an empty shard.
        used = [(self._params[name].ndim, shard) for name, shard in self.shards.items() if shard.numel()]
        groups = [
            {"params": [shard for ndim, shard in used if ndim >= 2], "weight_decay": weight_decay},
            {"params": [shard for ndim, shard in used if ndim < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        self._to_host = to_host
        self._parts = _parts([shard for _, shard in used]) if offload else []
        """If the moments are on the host: the shards that are updated together."""

    @classmethod
    def of(
        cls,
        config: TrainerConfig,
        model: PackedModel,
        ranks: Ranks,
        *,
        lr: float,
        to_host: Callable[[Tensor], Tensor] = host_copy,
    ) -> ShardedAdamW:
        """The optimizer of `config`. `lr` is separate because policy and critic have different rates."""
        return cls(
            model,
            ranks,
            lr=lr,
            warmup_steps=config.warmup_steps,
            decay_steps=config.num_steps if config.lr_schedule == "linear" else 0,
            betas=config.betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            offload=config.offload_optimizer,
            to_host=to_host,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step after `step` completed steps."""
        warm = min(1.0, (step + 1) / max(self._warmup_steps, 1))
        left = (
            (self._decay_steps - step) / max(self._decay_steps - self._warmup_steps, 1)
            if self._decay_steps
            else 1.0
        )
        return self.lr * min(warm, max(left, 0.0))

    def step(self, *, divisor: float, lr: float) -> float:
        """Divides the accumulated gradients by `divisor`, clips, updates and clears them. Collective.

        Returns the gradient's norm before clipping. If it is not finite, weights and moments are unchanged:
        one broken batch must neither end the run nor be published. Raises ArealError on every rank if the
        replicas (`trainer.replicas`) differ after the update.
        """
        grads = []
        for name, param in self._params.items():
            shard = self.shards[name]
            # Without any advantage there is no gradient. It counts as zero: momentum still moves the weights.
            shard.grad = torch.zeros_like(shard) if param.grad is None else local(param.grad)
            param.grad = None
            grads.append(shard.grad)
        if self._ranks.replicas is not None:
            self._ranks.replicas.add_up(grads)
        torch._foreach_mul_(grads, 1.0 / divisor)
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum().cpu()
        norm = math.sqrt(float(self._ranks.sum_of_shards(squares)))
        if math.isfinite(norm):
            if 0 < self._max_grad_norm < norm:
                torch._foreach_mul_(grads, self._max_grad_norm / norm)
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._update()
        else:
            log.warning("gradient norm is %s: the weights stay as they are", norm)
        for shard in self.shards.values():
            shard.grad = None
        if difference := self._ranks.difference_of_replicas(self.shards.values()):
            raise ArealError(
                f"{difference} after the same update: a machine or a GPU of these ranks is broken, or of "
                "another kind. The trainer ends, so that these weights are neither pushed nor saved; the "
                "newest checkpoint makes the replicas equal again. If it happens again, set "
                "trainer.replicas=1 or leave that machine out"
            )
        return norm

    def _update(self) -> None:
        if not self._parts:
            self._adam.step()
            return
        grads = {shard: shard.grad for part in self._parts for shard in part}
        for shard in grads:
            shard.grad = None  # Adam leaves out a shard without one
        for part in self._parts:
            on_host = {}
            for shard in part:
                shard.grad = grads.pop(shard)
                if (state := self._adam.state.get(shard)) is not None:
                    on_host[shard] = {key: state[key] for key in MOMENTS}
                    for key in MOMENTS:
                        state[key] = state[key].to(shard.device, non_blocking=shard.is_cuda, copy=True)
            self._adam.step()
            for shard in part:
                shard.grad = None
                state = self._adam.state[shard]
                for key in MOMENTS:
                    if shard in on_host:
                        state[key] = on_host[shard][key].copy_(state[key], non_blocking=shard.is_cuda)
                    else:
                        state[key] = self._to_host(state[key])
        if any(shard.is_cuda for part in self._parts for shard in part):
            torch.cuda.current_stream().synchronize()  # a checkpoint reads them on the host

    def moments(self, shard_name: str) -> dict[str, Tensor]:
        """Adam's moments of one shard: zeros before the first step, then the optimizer's own tensors."""
        shard = self.shards[shard_name]
        state: dict[str, Any] = self._adam.state.get(shard, {})
        return {key: state[key] if key in state else torch.zeros_like(shard) for key in MOMENTS}

    @property
    def num_updates(self) -> int:
        """Updates so far, for Adam's bias correction."""
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    def new_moments(self, *, num_updates: int) -> dict[str, dict[str, Tensor]]:
        """Replaces the moments by uninitialized ones after `num_updates` updates, for the caller to fill.

        Returns them by the name of the shard, like `moments`: the optimizer's own tensors, so that a restored
        state is never in memory twice. After 0 updates there are none.
        """
        self._adam.state.clear()
        if num_updates == 0:
            return {}
        for shard in self.shards.values():
            if shard.numel():
                # The fused kernel keeps its count in a tensor on the shard's device.
                self._adam.state[shard] = {
                    "step": torch.tensor(float(num_updates), dtype=torch.float32, device=shard.device),
                    **{key: self._new_moment(shard) for key in MOMENTS},
                }
        return {name: self.moments(name) for name in self.shards}

    def _new_moment(self, shard: Tensor) -> Tensor:
        empty = torch.empty_like(shard, requires_grad=False)
        return self._to_host(empty) if self._parts else empty


def _parts(shards: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """The shards in their order, those of a part with at most `_PART_BYTES` of moments (or one shard)."""
    parts: list[list[torch.nn.Parameter]] = []
    size = 0
    for shard in shards:
        needed = len(MOMENTS) * shard.numel() * shard.itemsize
        if not parts or size + needed > _PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(shard)
        size += needed
    return parts
