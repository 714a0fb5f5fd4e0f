"""Router replay (R3, arXiv 2510.11370): the trainer's experts are those that the engine has chosen.

Engine and trainer compute router logits with different kernels and dtypes, so where two probabilities are
close they choose different experts, and the log-probs of a token can differ by far more than rounding. Here
only the choice is replaced: scores, normalization and scaling are computed by the trainer's router from the
present weights at the recorded experts, and gradients flow through them.

    decoder layer(hidden, packed_routes=RowRoutes) -> its router -> topk over its experts -> the recorded ones

One mechanism serves all families: a router of transformers chooses by one `torch.topk` over the scores of all
experts, whether softmax or sigmoid, with or without a correction bias and groups. While the router runs, a
`TorchFunctionMode` lets that call return the recorded experts and the scores there. Before anything is
loaded, each class of router is tried on random numbers (`_is_replayed`), so one that chooses in another way
is refused.

A forward's routes are an argument of its decoder layers. Gradient checkpointing keeps the arguments of each
layer for the recomputation, so the backward of a micro-batch uses that micro-batch's routes, however many
forwards came in between.

The policy and its proximal copy are replayed. A reference model and a critic are not: their distributions do
not depend on what the engine chose.

Shape suffixes: U rows of a forward, E experts of a layer, L layers with experts, K experts of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from areal_like.errors import ConfigError
from areal_like.precision import declared_routers, routers
from areal_like.wire.routes import RoutesShape
from trainer.batching.routes import LIVE, MAX_EXPERTS

_TOPK = (torch.topk, Tensor.topk)


class RowRoutes:
    """The routes of one forward, and how far they differ from what the routers would have chosen.

    Not a dataclass: FSDP2 copies dataclasses among a layer's arguments.
    """

    def __init__(self, experts_ULK: Tensor) -> None:
        """`experts_ULK`: int16 experts of each row, `LIVE` where the router chooses."""
        self.experts_ULK = experts_ULK
        self._num_other: dict[int, Tensor] = {}

    def chosen(self, layer: int, live_UK: Tensor) -> Tensor:
        """[U, K] int64: the experts of a layer. `live_UK`: those that its router would choose."""
        recorded_UK = self.experts_ULK[:, layer].long()
        chosen_UK = torch.where(recorded_UK == LIVE, live_UK, recorded_UK)
        if layer not in self._num_other:  # not in a recomputation
            is_other_UK = (chosen_UK[:, :, None] != live_UK[:, None, :]).all(-1)
            self._num_other[layer] = is_other_UK.sum()
        return chosen_UK

    def disagreement(self) -> tuple[Tensor, Tensor]:
        """(recorded choices that the routers would not have made, all recorded choices), on the device."""
        return torch.stack([*self._num_other.values()]).sum(), (self.experts_ULK != LIVE).sum()


class RouterReplay:
    """Replays routes in the routers of one transformers model, which it modifies in place; made once."""

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """`model`: after `route_in_float32`; it may be on the meta device. `layers`: its decoder layers.

        Raises ConfigError for a model without experts, or with routers that cannot be replayed.
        """
        name, advice = type(model).__name__, "set model.router_replay=false"
        whole = list(routers(model))
        declared = sum(1 for _ in declared_routers(model))
        if not declared:
            raise ConfigError(f"model.router_replay: {name} has no experts: {advice}")
        refusal = ConfigError(
            f"model.router_replay: the routers of {name} choose their experts in a way that cannot be "
            f"replayed: {advice}"
        )
        self._gates: list[_Gate] = []
        for layer in layers:
            inside = {id(module) for module in layer.modules()}
            own = [router for router in whole if id(router) in inside]
            if len(own) > 1:
                raise refusal
            self._gates += [_Gate(len(self._gates), layer, router) for router in own]
        shapes = {(gate.num_experts, gate.num_chosen) for gate in self._gates}
        if len(self._gates) != declared or len(shapes) != 1:
            raise refusal
        num_experts, num_chosen = shapes.pop()
        if not (
            isinstance(num_experts, int)
            and isinstance(num_chosen, int)
            and 0 < num_chosen < num_experts <= MAX_EXPERTS
        ):
            raise refusal
        self.shape = RoutesShape(num_layers=len(self._gates), num_chosen=num_chosen, num_experts=num_experts)
        """What routes have to be like."""
        self.last: RowRoutes | None = None
        """The routes of the newest forward; None: it had none."""
        for gate in self._gates:
            gate.attach()
        by_class = {type(gate.router): gate for gate in self._gates}
        if not all(_is_replayed(gate, num_layers=len(self._gates)) for gate in by_class.values()):
            raise refusal

    def arguments(self, routes_ULK: Tensor | None) -> dict[str, Any]:
        """The keyword arguments of a forward of the model with these routes; without: no arguments."""
        self.last = None if routes_ULK is None else RowRoutes(routes_ULK)
        return {} if self.last is None else {"packed_routes": self.last}

    def disagreement(self) -> tuple[Tensor | float, Tensor | float]:
        """`RowRoutes.disagreement` of the newest forward; zeros without routes."""
        return (0.0, 0.0) if self.last is None else self.last.disagreement()


class _Gate:
    """The router of one decoder layer.

    The layer's forward sets `routes` while it runs: router and layer are separate modules, and blocks of
    experts do not pass arguments on.
    """

    def __init__(self, index: int, layer: nn.Module, router: nn.Module) -> None:
        self.index = index
        self.layer = layer
        self.router = router
        self.num_experts = getattr(router, "num_experts", None)
        self.num_chosen = getattr(router, "top_k", None)
        self.routes: RowRoutes | None = None

    def attach(self) -> None:
        self.layer.forward = functools.partial(self._run_layer, self.layer.forward)
        self.router.forward = functools.partial(self._run_router, self.router.forward)

    def _run_layer(
        self, forward: Any, *args: Any, packed_routes: RowRoutes | None = None, **kwargs: Any
    ) -> Any:
        self.routes = packed_routes
        try:
            return forward(*args, **kwargs)
        finally:
            self.routes = None

    def _run_router(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self.routes is None:
            return forward(*args, **kwargs)
        with _Choice(self, self.routes) as choice:
            output = forward(*args, **kwargs)
        if choice.num_made != 1:
            raise ConfigError(
                f"model.router_replay: {type(self.router).__name__} chose its experts {choice.num_made} "
                "times in one forward: set model.router_replay=false"
            )
        return output


class _Choice(TorchFunctionMode):
    """While it is entered, topk over the experts of a router returns the recorded ones."""

    def __init__(self, gate: _Gate, routes: RowRoutes) -> None:
        super().__init__()
        self.num_made = 0
        self._gate = gate
        self._routes = routes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._topk(func, *args, **kwargs) if func in _TOPK else func(*args, **kwargs)

    def _topk(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            live_UK = func(input, *args, **kwargs)[1]
        # A topk inside or among groups of experts has another shape.
        if input.ndim != 2 or (input.shape[1], live_UK.shape[1]) != (
            self._gate.num_experts,
            self._gate.num_chosen,
        ):
            return func(input, *args, **kwargs)
        self.num_made += 1
        with torch.no_grad():
            chosen_UK = self._routes.chosen(self._gate.index, live_UK)
        return torch.return_types.topk((input.gather(1, chosen_UK), chosen_UK))


@torch.no_grad()
def _is_replayed(gate: _Gate, *, num_layers: int) -> bool:
    """True if the attached router follows recorded experts, and where it has none, chooses as before."""
    router, generator = gate.router, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    try:
        state = {
            name: random(*tensor.shape)
            for name, tensor in (*router.named_parameters(), *router.named_buffers())
        }
        hidden_UD = random(3, state["weight"].shape[-1])
        _, want_UK, live_UK = functional_call(router, state, (hidden_UD,))
        experts_UK = (live_UK.flip(1) + 1) % gate.num_experts
        experts_UK[0] = LIVE
        gate.routes = RowRoutes(experts_UK[:, None].expand(-1, num_layers, -1).to(torch.int16))
        _, got_UK, chosen_UK = functional_call(router, state, (hidden_UD,))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError, ConfigError):
        return False
    finally:
        gate.routes = None
    return (
        torch.equal(chosen_UK[0], live_UK[0])
        and torch.equal(got_UK[0], want_UK[0])
        and torch.equal(chosen_UK[1:], experts_UK[1:])
    )
