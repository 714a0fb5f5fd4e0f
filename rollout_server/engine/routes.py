"""The routes of the tokens in the rows of the KV cache (areal_like/wire/routes.py).

They belong to the KV: whatever fills a row (a prefill, an extension, a copy of a kept prefix) fills its
routes, and a kept prefix has those of the pass that computed it. A sequence has routes of its own, those of
the first pass over each of its tokens: a preempted sequence keeps them when its KV is computed again.

Shape suffixes: S rows, T positions, B contexts, N rows decoded, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.wire.routes import dtype_of
from rollout_server.engine.models.routes import RouteRecorder
from rollout_server.engine.scheduler import Sequence


class RowRoutes:
    """[S, T, L, K] chosen experts. Every pass that fills rows is followed by the method for its kind."""

    def __init__(self, recorder: RouteRecorder, *, num_rows: int, context_length: int) -> None:
        """`recorder`: of a model that has been run once."""
        self._recorder = recorder
        shape = recorder.shape
        self._experts_STLK = np.zeros(
            (num_rows, context_length, shape.num_layers, shape.num_chosen), dtype_of(shape.num_experts)
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the rows' routes in bytes."""
        return self._experts_STLK.nbytes

    def decoded(self, position_N: NDArray[np.int64]) -> None:
        """Takes the routes of a decode step over rows 0..N-1 with tokens at these positions."""
        self._experts_STLK[np.arange(len(position_N)), position_N] = self._recorder.take()

    def prefilled(self, num_contexts: int) -> NDArray[Any]:
        """Takes the routes of a prefill of right-padded contexts: [B, T, L, K]."""
        taken = self._recorder.take()
        return taken.reshape(num_contexts, -1, *taken.shape[1:])

    def extended(self, rows: Items[int], starts_B: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> None:
        """Takes the routes of an extension of these rows with right-padded tokens."""
        experts_BTLK = self.prefilled(len(rows))
        for i, (row, start, length) in enumerate(zip(rows, starts_B, lengths_B, strict=True)):
            self._experts_STLK[row, start : start + length] = experts_BTLK[i, :length]

    def write(self, row: int, experts_TLK: NDArray[Any], *, start: int = 0) -> None:
        """Writes the routes of T tokens from position `start` on."""
        self._experts_STLK[row, start : start + len(experts_TLK)] = experts_TLK

    def read(self, row: int, start: int, end: int) -> NDArray[Any]:
        """Returns a view [end - start, L, K] of a row's positions."""
        return self._experts_STLK[row, start:end]

    def move(self, sources: Items[int], targets: Items[int], *, num_positions: int) -> None:
        """Copies the first `num_positions` of rows `sources` to rows `targets`, which must not overlap."""
        self._experts_STLK[targets, :num_positions] = self._experts_STLK[sources, :num_positions]

    def copy_to(self, sequence: Sequence, *, num_tokens: int) -> None:
        """Gives a sequence the routes of its first `num_tokens` tokens, before it leaves its row.

        Those that it has already are of earlier passes, and stay.
        """
        experts_TLK = self._experts_STLK[sequence.row, :num_tokens].copy()
        if sequence.routes_TLK is not None:
            experts_TLK[: len(sequence.routes_TLK)] = sequence.routes_TLK
        sequence.routes_TLK = experts_TLK
