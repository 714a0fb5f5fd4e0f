"""The integer and the array form of splitmix64 agree with each other and with the published generator."""

from __future__ import annotations

import numpy as np

from areal_like.splitmix64 import GOLDEN_GAMMA, MASK_64, mix, mix_array


def test_mix_is_the_published_generator() -> None:
    """The first two outputs of splitmix64 with seed 0."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(GOLDEN_GAMMA) == 0x6E789E6AA1B965F4


def test_both_forms_agree() -> None:
    values = [0, 1, 12345, 1 << 40, MASK_64]
    counters = np.array([(value + GOLDEN_GAMMA) & MASK_64 for value in values], dtype=np.uint64)
    assert mix_array(counters).tolist() == [mix(value) for value in values]
