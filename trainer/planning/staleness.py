"""Which `max_staleness` keeps both pools busy, by the tail of the samples' durations. No torch.

In units of a step's time T, with both pools equally fast: slots / samples of a step = s steps are in progress
on average, because s = mean duration / T. A sample must be complete before the deadline of its step, which is
max_staleness + 1 steps after the weights that it began with were made. Of the N samples of a step the slowest
takes about the 1 - 1/N quantile of the durations, q times their mean, so

    max_staleness + 1 >= share * q * s

With `share` = 1 no step would ever wait. A step that waits for its slowest sample now and then costs little,
since the engines go on; `share` and the constant are fitted to benchmarks/simulate.py.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def quantile_of_mean(*, spread: float, samples: int) -> float:
    """The 1 - 1/samples quantile of log-normal durations over their mean. `spread`: of the log."""
    return math.exp(spread * NormalDist().inv_cdf(1 - 1 / max(2, samples)) - spread**2 / 2)


def least_staleness(*, steps_a_sample: float, spread: float, samples: int) -> int:
    """The least `max_staleness` with which a job reaches about 95 % of its limit."""
    return max(1, math.ceil(steps_a_sample * quantile_of_mean(spread=spread, samples=samples)))
