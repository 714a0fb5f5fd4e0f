"""Reads the routes in an engine's responses (`routed_experts`; areal_like/wire/routes.py).

    SGLang     base64 of int32[tokens, all layers, experts per token], little-endian, with `--enable-return-
               routed-experts` and `return_routed_experts` in the request; rows of layers without experts mean
               nothing. Tokens whose KV was in the prefix cache have the routes of the pass that computed it
    embedded   the same for the layers with experts alone; in the packed form bytes of uint8 or uint16

Both cover the prompt and the completion but its last token, which has not been through the model.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import RoutesError
from areal_like.expert_layers import ExpertLayers
from areal_like.wire.routes import Routes, RoutesShape, dtype_of

_REPORTED = np.dtype("<i4")
_OTHER_BYTES = 1 << 16
_PIECE_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RoutesReader:
    """How one engine reports the routes of its model."""

    shape: RoutesShape
    layers: tuple[int, ...]
    """Indices of the layers with experts among those that the engine reports."""
    num_reported: int
    """Layers that it reports."""

    @classmethod
    def of_embedded(cls, raw: Any) -> RoutesReader | None:
        """Of an embedded engine, from `routes_shape` in its /server_info. None if it records no routes.

        Raises RoutesError for anything that is not a shape.
        """
        if raw is None:
            return None
        try:
            shape = RoutesShape(*map(int, raw))
            shape.check()
        except (TypeError, ValueError, OverflowError) as error:
            raise RoutesError(f"the engine reports routes_shape={raw!r}: {error}") from None
        return cls(shape=shape, layers=tuple(range(shape.num_layers)), num_reported=shape.num_layers)

    @classmethod
    def of_model(cls, facts: Mapping[str, Any]) -> RoutesReader:
        """Of SGLang, from the config.json of its model. Raises ConfigError if that has no experts."""
        layers, num_layers, routes = ExpertLayers.of(facts)
        return cls(shape=routes, layers=layers, num_reported=num_layers)

    def read(self, raw: Any, *, num_tokens: int) -> Routes:
        """The routes of a completion. `raw`: `routed_experts` of its response, None if it has none;
        `num_tokens`: its prompt and output but for the last token.

        May run in any thread. Raises RoutesError for anything but routes of so many tokens.
        """
        if raw is None:
            raise RoutesError(
                "the engine returned no routed_experts, which model.router_replay needs: start it with "
                "--enable-return-routed-experts"
            )
        num_chosen, num_experts = self.shape.num_chosen, self.shape.num_experts
        try:
            flat = np.frombuffer(raw, dtype_of(num_experts)) if isinstance(raw, bytes) else _decoded(raw)
            if flat.size != num_tokens * self.num_reported * num_chosen:
                raise ValueError(
                    f"want {num_chosen} experts of {self.num_reported} layers for each of {num_tokens} "
                    f"tokens, got {flat.size} numbers"
                )
            experts_TLK = flat.reshape(num_tokens, self.num_reported, num_chosen)
            if len(self.layers) < self.num_reported:
                experts_TLK = experts_TLK[:, self.layers]
            routes = Routes.of(experts_TLK, num_experts=num_experts)
            # Rows that an engine has allocated and not filled are all zeros.
            if num_chosen > 1 and (routes.experts_TLK[..., 0] == routes.experts_TLK[..., 1]).any():
                raise ValueError("a token has the same expert twice")
        except (TypeError, ValueError) as error:
            raise RoutesError(f"the engine returned unusable routed_experts: {error}") from None
        return routes

    def response_bytes(self, num_tokens: int) -> int:
        """Upper limit of the bytes that the routes of so many tokens add to a response."""
        num_bytes = num_tokens * self.num_reported * self.shape.num_chosen * _REPORTED.itemsize
        return num_bytes * 4 // 3 + _OTHER_BYTES


def _decoded(text: Any) -> NDArray[Any]:
    """int32[N] of base64, decoded in pieces between which other threads run. Raises ValueError and
    TypeError."""
    if not isinstance(text, str):
        raise TypeError(f"want base64, got {type(text).__name__}")
    starts = range(0, len(text), _PIECE_CHARS)
    pieces = [base64.b64decode(text[start : start + _PIECE_CHARS], validate=True) for start in starts]
    return np.concatenate([np.frombuffer(piece, _REPORTED) for piece in pieces])
