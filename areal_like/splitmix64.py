"""A 64-bit hash: the generator splitmix64 (Steele, Lea & Flood 2014) and its finalizer.

Every bit of the result depends on every bit of the argument. Saved state depends on these values (prompt
order, sampling seeds), so they are computed here and not by a library whose upgrade might change them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK_64 = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Increment of splitmix64's counter: 2^64 divided by the golden ratio, odd."""
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_ARRAY_MULTIPLIERS = np.uint64(_MULTIPLIER_1), np.uint64(_MULTIPLIER_2)
_ARRAY_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(value: int) -> int:
    """One draw of splitmix64: adds the increment, then applies the finalizer. A bijection of 0..2^64-1."""
    value = (value + GOLDEN_GAMMA) & MASK_64
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & MASK_64
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & MASK_64
    return value ^ (value >> 31)


def mix_array(values_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer alone, without the increment: uint64[N] -> uint64[N]."""
    first, second, third = _ARRAY_SHIFTS
    values_N = (values_N ^ (values_N >> first)) * _ARRAY_MULTIPLIERS[0]
    values_N = (values_N ^ (values_N >> second)) * _ARRAY_MULTIPLIERS[1]
    return values_N ^ (values_N >> third)
