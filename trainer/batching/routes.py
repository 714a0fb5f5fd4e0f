"""Routes of samples (`model.router_replay`): whether they can be used, and their rows in a micro-batch.

They come from an engine, so nothing about them is certain: `fault_of` compares them with the model. A sample
whose routes are missing or do not fit is not trained on: to route it by the trainer's own choice is just what
router replay prevents. It is counted (`routes_missing`, `routes_malformed`), its reward stays in its group's
baseline, and its tokens stay in the divisor of the loss, as those of any sample that is masked.

Rows of a micro-batch without recorded experts (the last token of each sequence, whose hidden state nothing
reads, and dummies) have `LIVE` in place of an expert: the model routes them.

Shape suffixes: T rows of routes (tokens of the segments but the last of each), U rows that the model
computes, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory
from areal_like.wire.routes import Routes, RoutesShape
from trainer.batching.shared_prefixes import InputSequence, SharedRows

LIVE = -1
"""In a micro-batch's rows: no expert was recorded."""
MAX_EXPERTS = int(np.iinfo(np.int16).max)
"""Largest number of experts of a layer: rows are int16, with `LIVE`."""


class FaultKind(StrEnum):
    """Why routes cannot be used; the value is the metric with the number of such samples in a step."""

    MISSING = "routes_missing"
    """The sample has none."""
    MALFORMED = "routes_malformed"
    """They do not fit its tokens or the model, or name an expert twice for one token."""


class RouteFault(NamedTuple):
    """Why the routes of one sample cannot be used."""

    kind: FaultKind
    text: str
    """An explanation for the log."""


def fault_of(trajectory: Trajectory, shape: RoutesShape) -> RouteFault | None:
    """Why the routes of a trajectory cannot be used; None if they can."""
    routes = trajectory.routes
    if routes is None:
        return RouteFault(FaultKind.MISSING, "it has none")
    experts_TLK = routes.experts_TLK
    if routes.shape != shape:
        return RouteFault(FaultKind.MALFORMED, f"they are those of {routes.shape}, and the model has {shape}")
    ordered_TLK = np.sort(experts_TLK, axis=-1)
    if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
        return RouteFault(FaultKind.MALFORMED, "a token has an expert twice")
    return None


def experts_of_segments(trajectory: Trajectory) -> list[NDArray[Any] | None]:
    """The experts of each segment, [its tokens - 1, L, K]; None for all of them without routes."""
    if (of_segments := trajectory.segment_routes) is None:
        return [None] * len(trajectory.segment_slices)
    return [routes.experts_TLK for routes in of_segments]


def routes_of(trajectory: Trajectory, slices: Sequence[slice]) -> Routes | None:
    """The routes of a trajectory that has only these segments (some of `segment_slices`)."""
    if (of_segments := trajectory.segment_routes) is None:
        return None
    starts = [part.start for part in trajectory.segment_slices]
    by_start = dict(zip(starts, of_segments, strict=True))
    return Routes.joined([by_start[part.start] for part in slices])


def rows_of(sequences: Sequence[InputSequence], shared: SharedRows | None) -> NDArray[np.int16] | None:
    """[U, L, K] the experts of each row of a micro-batch; None if no sequence has any."""
    first = next((each.experts_TLK for each in sequences if each.experts_TLK is not None), None)
    if first is None:
        return None
    num_tokens = sum(each.num_tokens for each in sequences)
    rows = np.full((num_tokens, *first.shape[1:]), LIVE, dtype=np.int16)
    start = 0
    for each in sequences:
        if each.experts_TLK is not None:
            rows[start : start + each.num_tokens - 1] = each.experts_TLK
        start += each.num_tokens
    return rows if shared is None else rows[shared.token_U]
