"""Records which experts the routers of a model choose, in every forward pass.

Routers are those of `areal_like.precision.routers`: modules whose output includes the indices of the chosen
experts. A model whose blocks choose elsewhere (Jamba, Llama 4) is refused.

Shape suffixes: N tokens, padding included, L layers with experts, K experts per token.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from areal_like.errors import ConfigError
from areal_like.precision import routers
from areal_like.wire.routes import MAX_EXPERTS, RoutesShape, dtype_of

_TORCH_DTYPES = {np.dtype("u1"): torch.uint8, np.dtype("<u2"): torch.int32}
"""Dtype in which indices leave the device. Few operations of torch support uint16."""


class RouteRecorder:
    """The choices of the last forward pass of one module."""

    def __init__(self, module: Any) -> None:
        """Adds a hook to each router. Raises ConfigError for a model without routers."""
        found: list[Any] = list(routers(module))
        sizes = {int(router.weight.shape[0]) for router in found}
        if len(sizes) != 1 or not all(size <= MAX_EXPERTS for size in sizes):
            raise ConfigError(f"{_named(module)} has no layers with experts: set model.router_replay=false")
        self._module = module
        self._num_experts = sizes.pop()
        self._dtype = dtype_of(self._num_experts)
        self._chosen: list[Tensor | None] = [None] * len(found)
        for layer, router in enumerate(found):
            router.register_forward_hook(partial(self._note, layer))

    @cached_property
    def shape(self) -> RoutesShape:
        """Read it first after a forward pass. Raises ConfigError if a router named no experts."""
        return RoutesShape(
            num_layers=len(self._chosen),
            num_chosen=self._stacked().shape[2],
            num_experts=self._num_experts,
        )

    def take(self) -> NDArray[Any]:
        """[N, L, K]: the experts chosen in the last forward pass, uint8 or uint16."""
        on_device = self._stacked().to(_TORCH_DTYPES[self._dtype])
        self._chosen = [None] * len(self._chosen)
        return on_device.cpu().numpy().astype(self._dtype, copy=False)

    def _stacked(self) -> Tensor:
        chosen = [indices for indices in self._chosen if indices is not None]
        if len(chosen) < len(self._chosen) or len({indices.shape for indices in chosen}) != 1:
            raise ConfigError(
                f"the routers of {_named(self._module)} do not say which experts they choose: set "
                "model.router_replay=false"
            )
        return torch.stack(chosen, dim=1)

    def _note(self, layer: int, router: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        found = [each for each in out if isinstance(each, Tensor)] if isinstance(out, tuple) else []
        indices = [each for each in found if each.ndim == 2 and not each.is_floating_point()]
        self._chosen[layer] = indices[0] if len(indices) == 1 else None


def _named(module: Any) -> str:
    return f"model type {module.config.model_type}"
