"""The baseline b that minimizes the variance of the gradient estimate `sum_i (R_i - b) g_i`.

    b* = sum_i m_i R_i / sum_i m_i,  m_i = ||g_i||^2

b* is computed from the differences to one of the group's returns. If all returns are equal, b* is then
exactly this return, so the group's advantages are exactly zero and not rounding errors that would be trained
on.

Shape suffixes: N samples, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SHARE = 1e-12
"""Share of a group's `sum m` below which the remainder without one sample is only rounding."""


def optimal_baseline(
    squares_N: Tensor, returns_N: Tensor, group_N: Tensor, *, leave_one_out: bool = False
) -> Tensor:
    """[N] float64: b* of each sample's group, with m_i = `squares_N` and R_i = `returns_N`.

    `group_N`: any integer per group. `leave_one_out`: each sample's b* is computed from the others of its
    group. Where no m is left (weights that underflow, a group of one), b* is the mean return.
    """
    # A number in 0..N-1 for each group. Not `unique`, which synchronizes with a GPU.
    index_N = torch.searchsorted(group_N.sort().values, group_N)
    squares_N, returns_N = squares_N.double(), returns_N.double()
    zeros_G = returns_N.new_zeros(len(returns_N))
    origin_N = zeros_G.scatter(0, index_N, returns_N)[index_N]
    returns_N = returns_N - origin_N

    def summed(value_N: Tensor) -> Tensor:
        return zeros_G.index_add(0, index_N, value_N)[index_N]

    total_N, numerator_N = summed(squares_N), summed(squares_N * returns_N)
    denominator_N = total_N
    if leave_one_out:
        denominator_N, numerator_N = denominator_N - squares_N, numerator_N - squares_N * returns_N
    mean_N = summed(returns_N) / summed(torch.ones_like(returns_N))
    return origin_N + torch.where(denominator_N > _LEAST_SHARE * total_N, numerator_N / denominator_N, mean_N)
