"""Made-up routes for samples of the tests' mixture of experts (tests/support/moe_model.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from areal_like.trajectory import Trajectory
from areal_like.wire.routes import Routes, RoutesShape

SHAPE = RoutesShape(num_layers=2, num_chosen=2, num_experts=8)
"""Of `write_moe_model`."""


def random_routes(num_tokens: int, rng: np.random.Generator, *, shape: RoutesShape = SHAPE) -> Routes:
    """Different experts at random for each token in each layer."""
    all_TLE = np.tile(np.arange(shape.num_experts), (num_tokens, shape.num_layers, 1))
    return Routes.of(rng.permuted(all_TLE, axis=-1)[..., : shape.num_chosen], num_experts=shape.num_experts)


def routed(trajectory: Trajectory, rng: np.random.Generator, *, shape: RoutesShape = SHAPE) -> Trajectory:
    """The trajectory with random routes for all of its segments."""
    num_rows = trajectory.num_tokens - len(trajectory.segment_slices)
    return replace(trajectory, routes=random_routes(num_rows, rng, shape=shape))


def routed_groups(groups: Sequence[Sequence[Trajectory]], *, seed: int = 0) -> list[list[Trajectory]]:
    """The groups with random routes, which two samples of a group share for as long as their tokens agree."""
    rng = np.random.default_rng(seed)
    return [_alike([routed(each, rng) for each in group]) for group in groups]


def _alike(group: Sequence[Trajectory]) -> list[Trajectory]:
    first = group[0]
    made = [first]
    for each in group[1:]:
        if first.segments or each.segments:
            made.append(each)
            continue
        assert first.routes is not None and each.routes is not None
        length = min(first.num_tokens, each.num_tokens) - 1
        num_common = int(np.cumprod(first.tokens[:length] == each.tokens[:length]).sum())
        parts = [first.routes.rows(0, num_common), each.routes.rows(num_common, each.num_tokens - 1)]
        made.append(replace(each, routes=Routes.joined(parts)))
    return made
