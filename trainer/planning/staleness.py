"""Predicts what a staleness bound costs, from the tail of the samples' durations. No torch.

`buffer.overdue=wait`: every sample that starts with the weights of step s must be complete before step
s + max_staleness is. The slowest sample that starts in a step takes a high quantile of the durations. With q
that quantile over their mean, and k the number of steps that a sample of mean duration takes,

    r = (max_staleness + 1) / (q k),   x = .9 r,   throughput / limit = about x / (1 + x^4)^(1/4)

This holds for every rule that keeps the bound for whole samples and does not drop any. Quantile, curve and
margin are fitted to benchmarks/simulate.py: q at 1 - 1/(10 N), the slowest sample of ten steps of N samples,
and for 95 % of the limit 1.4 times the bound at which r is 1. (The largest error of the curve is .19, at a
bound of 32, where the simulated runs are short.)

`buffer.overdue=close`: nothing waits for the slowest sample, and tokens beyond the bound are masked. Tokens
are sampled evenly over a sample's duration D (in steps), and a complete sample is trained on about a step
later, so a token is too old if more than max_staleness - 1/2 steps of sampling follow it:

    masked = E[(D - max_staleness + 1/2)+] / E[D]
    lag    = E[min(max_staleness, max(D, min(longest of the group, close_after - 3/2)) + 1)]

The lag is that of a sample's oldest trained token. The formulas agree to within .045 (masked) and .2 (lag)
with the simulated tables to which the constants were fitted.

Durations are log-normal with mean 1 times k; `spread` is the standard deviation of their log. They may be cut
off, as `sampling.max_new_tokens` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from statistics import NormalDist

_STEPS, _MARGIN = 10, 1.4
_SLOPE, _BEND = 0.9, 4
_NORMAL = NormalDist()
_QUANTILES = 100
MASKED = 0.05
"""Share of masked tokens below which a bound counts as large enough."""


# Fitted by hand to `benchmarks.simulate close`: 64 groups of 4 a step, `close_after` 4, bounds of 4, 8 and
# 16, spreads of .5, 1 and 1.5 cut off at 4 to 16 means.
CLOSING = 1.0
"""Throughput over its limit with `buffer.overdue=close`; masked tokens count as trained on."""
_DELAY = 1.0
"""Steps from the end of a sample, or of its group's wait, to the step that trains on it."""
_ROUNDING = 0.5
"""Steps by which a duration may exceed the bound, minus `_DELAY`, before a token is too old; and by which
closing is earlier than `close_after`, minus that step. Steps are counted in whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """The durations of samples, in steps: log-normal, and cut off."""

    mean: float
    """k: the steps that a sample of mean duration takes."""
    spread: float
    longest_over_mean: float = math.inf
    """At least 1."""

    def excess(self, steps: float) -> float:
        """E[(D - steps)+] / E[D]: the share of tokens that are sampled more than `steps` before the end of
        their sample."""
        if steps <= 0:
            return 1 - steps / self.mean
        if steps >= self.mean * self.longest_over_mean:
            return 0.0
        cut, mean = self._cut
        return (self._excess(steps / self.mean * mean) - self._excess(cut)) / mean

    def quantile(self, share: float) -> float:
        """The duration that `share` of the samples do not exceed."""
        cut, mean = self._cut
        uncut = math.exp(self.spread * _NORMAL.inv_cdf(share) - self.spread**2 / 2)
        return self.mean * min(uncut, cut) / mean

    @cached_property
    def _cut(self) -> tuple[float, float]:
        """(where a log-normal of mean 1 is cut off, its mean after that), so that their ratio is
        `longest_over_mean`."""
        if math.isinf(self.longest_over_mean):
            return math.inf, 1.0
        low, high = 1e-9, self.longest_over_mean
        for _ in range(60):  # the ratio grows with the cut, from 1
            cut = math.sqrt(low * high)
            mean = 1 - self._excess(cut)
            low, high = (cut, high) if cut < self.longest_over_mean * mean else (low, cut)
        return cut, mean

    def _excess(self, level: float) -> float:
        """E[(Y - level)+] of an uncut log-normal Y of mean 1."""
        if math.isinf(level):
            return 0.0
        if not self.spread:
            return max(0.0, 1 - level)
        d = -math.log(level) / self.spread + self.spread / 2
        return _NORMAL.cdf(d) - level * _NORMAL.cdf(d - self.spread)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a bound costs under both rules."""

    spread: float
    waiting: float
    """Throughput over its limit with `buffer.overdue=wait`."""
    closing: float
    """The same with `close`."""
    masked: float
    """Share of the sampled tokens that are beyond the bound with `close`."""
    lag: float
    """Mean lag, in steps, of a sample's oldest trained token with `close`."""


def slowest_over_mean(*, spread: float, samples: int) -> float:
    """q for log-normal durations. `spread`: standard deviation of the log; `samples`: number of samples of a
    step."""
    return math.exp(spread * _NORMAL.inv_cdf(1 - 1 / (_STEPS * samples)) - spread**2 / 2)


def least_staleness(
    *, steps_a_sample: float, spread: float, samples: int, longest_over_mean: float = math.inf
) -> int:
    """The least `max_staleness` with which a job that waits reaches about 95 % of its limit.

    `longest_over_mean`: bound of the durations over their mean, as `sampling.max_new_tokens` sets it.
    """
    slowest = min(longest_over_mean, slowest_over_mean(spread=spread, samples=samples))
    steps = _MARGIN * steps_a_sample * slowest
    return max(1, math.ceil(steps) - 1)


def least_staleness_of_close(durations: Durations) -> int:
    """The least `max_staleness` with which a job that closes groups masks at most 5 % of its tokens."""
    return next(bound for bound in count(1) if masked_share(durations, bound) <= MASKED)


def masked_share(durations: Durations, max_staleness: int) -> float:
    """Share of the sampled tokens that are beyond the bound when they are trained on."""
    return durations.excess(max_staleness + _ROUNDING - _DELAY)


def forecast(
    durations: Durations, *, samples: int, group_size: int, max_staleness: int, close_after: int
) -> Forecast:
    """Both rules. `samples`: number of samples of a step."""
    slowest = min(durations.longest_over_mean, slowest_over_mean(spread=durations.spread, samples=samples))
    x = _SLOPE * (max_staleness + 1) / (slowest * durations.mean)
    return Forecast(
        spread=durations.spread,
        waiting=x / (1 + x**_BEND) ** (1 / _BEND),
        closing=CLOSING,
        masked=masked_share(durations, max_staleness),
        lag=_lag(durations, group_size=group_size, max_staleness=max_staleness, close_after=close_after),
    )


def _lag(durations: Durations, *, group_size: int, max_staleness: int, close_after: int) -> float:
    """Mean over a sample's quantiles, and those of the longest of the others of its group."""
    shares = [(i + 0.5) / _QUANTILES for i in range(_QUANTILES)]
    own = [durations.quantile(share) for share in shares]
    others = max(1, group_size - 1)
    longest = [durations.quantile(share ** (1 / others)) for share in shares]
    wait = close_after - 1 - _ROUNDING
    total = sum(
        min(max_staleness, max(each, min(other, wait)) + _DELAY)
        for each in own
        for other in (longest if group_size > 1 else [0.0] * _QUANTILES)
    )
    return total / _QUANTILES**2
