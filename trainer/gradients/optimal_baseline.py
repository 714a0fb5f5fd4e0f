"""The baseline that minimises the variance of `sum_i (R_i - b) g_i`: each return weighted by its gradient's squared norm.

Returns are taken relative to one of their group, so that equal returns give exactly that return: a group without spread must not learn
from rounding.

Shape suffixes: N sequences, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SHARE = 1e-12
"""Of a group's mass, below which what is left without one sample is rounding."""


def optimal_baseline(
    squares_N: Tensor, returns_N: Tensor, group_N: Tensor, *, leave_one_out: bool = False
) -> Tensor:
    """[N] float64: `sum m R / sum m` over each sequence's group, with m = `squares_N`; `group_N` holds any integers.

    `leave_one_out`: over the others of the group. Where no m is left (weights that underflow, a group of one), the mean return.
    """
    _, index_N = torch.unique(group_N, return_inverse=True)
    squares_N, returns_N = squares_N.double(), returns_N.double()
    zeros_G = returns_N.new_zeros(len(returns_N))
    origin_N = zeros_G.scatter(0, index_N, returns_N)[index_N]
    returns_N = returns_N - origin_N

    def summed(value_N: Tensor) -> Tensor:
        return zeros_G.index_add(0, index_N, value_N)[index_N]

    total_N, moment_N = summed(squares_N), summed(squares_N * returns_N)
    mass_N = total_N
    if leave_one_out:
        mass_N, moment_N = mass_N - squares_N, moment_N - squares_N * returns_N
    mean_N = summed(returns_N) / summed(torch.ones_like(returns_N))
    return origin_N + torch.where(mass_N > _LEAST_SHARE * total_N, moment_N / mass_N, mean_N)
