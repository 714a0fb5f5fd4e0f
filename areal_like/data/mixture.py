"""Chooses the data set of each draw of a mixture: a pure function of the draw's number that follows the
weights.

Draw n is the point frac(n * g) of the unit interval, with the golden ratio g, and each source has a part of
the interval as long as its weight. The points of a rotation by the golden ratio are spread as evenly as those
of any sequence, in every window of draws (H. Niederreiter, Random Number Generation and Quasi-Monte Carlo
Methods, 1992, section 3.1). So the number of draws of a source in any window of 1,000 differs from its weight
by a few, for any number of sources. A counter for each source would do that too, but would have to be stored;
here the state is one integer. The number of draws of a source before n is a sum of floors, computed as
quickly as a greatest common divisor. All arithmetic is in whole numbers, so that it is the same everywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

MAX_SOURCES = 64
_CIRCLE = 1 << 64
"""Points of the interval."""
_STEP = 11400714819323198485
"""The odd number next to _CIRCLE divided by the golden ratio."""


def place_of(index: int, weights: Sequence[float], *, phase: float = 0.0) -> tuple[int, int]:
    """(source, k): draw `index` is the k-th of its source, both from 0. `weights`: positive, any sum.

    `phase` in [0, 1) shifts the points, so that several processes do not draw in lockstep.
    """
    assert index >= 0
    bounds = _bounds(tuple(weights))
    start = int(phase * _CIRCLE)
    source = bisect_right(bounds, (start + index * _STEP) % _CIRCLE) - 1
    return source, _num_below(index, bounds[source], bounds[source + 1], start=start)


def num_draws(count: int, weights: Sequence[float]) -> list[int]:
    """Draws of each source among the first `count`."""
    return [_num_below(count, first, end, start=0) for first, end in pairwise(_bounds(tuple(weights)))]


@lru_cache(maxsize=64)
def _bounds(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Where the part of each source begins, and the end of the last one."""
    assert weights and min(weights) > 0
    exact = [Fraction(weight) for weight in weights]
    ends = list(accumulate(exact))
    return (0, *(int(end * _CIRCLE / ends[-1]) for end in ends))


def _num_below(index: int, first: int, end: int, *, start: int) -> int:
    """Number of draws before `index` with first <= point < end."""
    # A point is in [first, end) exactly if it passes 0 when it is moved by -end but not when by -first.
    return _sum_of_floors(index, start + _CIRCLE - first) - _sum_of_floors(index, start + _CIRCLE - end)


def _sum_of_floors(count: int, offset: int) -> int:
    """The sum over j < count of floor((j * _STEP + offset) / _CIRCLE), as by Euclid's algorithm."""
    total, step, circle = 0, _STEP, _CIRCLE
    while count:
        total += count * (count - 1) // 2 * (step // circle) + count * (offset // circle)
        step, offset = step % circle, offset % circle
        count, offset = divmod(step * count + offset, circle)
        step, circle = circle, step
    return total
