"""Computes the `max_staleness` that keeps both pools busy, from the tail of the samples' durations. No torch.

Every sample that starts with the weights of step s must be complete before step s + max_staleness is. The
slowest sample that starts in a step takes a high quantile of the durations. With q that quantile over their
mean, and k the number of steps that a sample of mean duration takes,

    throughput / limit  <=  about (max_staleness + 1) / (q k)

This holds for every rule that keeps the bound and does not drop samples. Quantile and margin are fitted to
benchmarks/simulate.py: q at 1 - 1/(10 N), the slowest sample of ten steps of N samples, and for 95 % of the
limit 1.4 times the bound at which the right side is 1.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_STEPS, _MARGIN = 10, 1.4


def slowest_over_mean(*, spread: float, samples: int) -> float:
    """q for log-normal durations. `spread`: standard deviation of the log; `samples`: number of samples of a
    step."""
    return math.exp(spread * NormalDist().inv_cdf(1 - 1 / (_STEPS * samples)) - spread**2 / 2)


def least_staleness(
    *, steps_a_sample: float, spread: float, samples: int, longest_over_mean: float = math.inf
) -> int:
    """The least `max_staleness` with which a job reaches about 95 % of its limit.

    `longest_over_mean`: bound of the durations over their mean, as `sampling.max_new_tokens` sets it.
    """
    slowest = min(longest_over_mean, slowest_over_mean(spread=spread, samples=samples))
    steps = _MARGIN * steps_a_sample * slowest
    return max(1, math.ceil(steps) - 1)
