"""A pseudo-random permutation computed index by index: the order of prompts and of rows in an epoch.

A Feistel network with cycle walking, a pure function of (seed, epoch, index). It needs constant memory, which
matters for synthetic tasks with billions of prompts.
"""

from __future__ import annotations

from areal_like.splitmix64 import MASK_64, mix

_NUM_ROUNDS = 6


def permuted(index: int, *, size: int, seed: int, epoch: int) -> int:
    """Position of `index` in a shuffle of 0..size-1. A bijection for every (seed, epoch)."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    key = mix(mix(seed & MASK_64) ^ epoch)
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_ in range(_NUM_ROUNDS):
            left, right = right, left ^ (mix(key ^ (right << 8) ^ round_) & half_mask)
        index = left << half_bits | right
        # The network permutes a power of four >= size. Applying it again until the index is below `size`
        # (cycle walking) keeps it a bijection.
        if index < size:
            return index
