"""Generates examples of the digit-sorting task: the correct completion of `5203=` is `0235`.

The rollout task and the trainer's warm start both use this generator. An example is a pure function of (seed,
split, index): nothing is stored, and every process generates the same prompts. The held-out split is a set of
*multisets* of digits, fixed by a hash that does not depend on the seed: a model that has seen `0253` in
training has in effect seen the answer to `5203`, so a held-out set of strings would measure memorization.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from enum import StrEnum

MIN_DIGITS = 4
MAX_DIGITS = 8
HELD_OUT_PERCENT = 10


class Split(StrEnum):
    """The streams of examples."""

    TRAIN = "train"
    """Prompts of the RL run."""
    WARM_START = "warm_start"
    """Prompts of the supervised warm start; drawn from the same multisets as TRAIN, in another order."""
    HELD_OUT = "held_out"
    """Prompts of the evaluation; none of their multisets appears in the other two splits."""


@dataclass(frozen=True, kw_only=True)
class SortExample:
    """One prompt with its only correct answer."""

    prompt: str
    """Digits and an equals sign, `5203=`."""
    answer: str
    """The digits in ascending order, `0235`; the policy must stop after them."""


def is_held_out(digits: str) -> bool:
    """True if the multiset of `digits` belongs to the held-out split."""
    digest = hashlib.blake2b("".join(sorted(digits)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_OUT_PERCENT


def sort_example(*, seed: int, split: Split, index: int) -> SortExample:
    """The `index`-th example of a split: 4 to 8 digits, lengths equally likely."""
    rng = random.Random(f"{seed}/{split.value}/{index}")
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.randint(MIN_DIGITS, MAX_DIGITS)))
        if is_held_out(digits) == (split is Split.HELD_OUT):
            return SortExample(prompt=f"{digits}=", answer="".join(sorted(digits)))


def noisy_demonstration(*, seed: int, index: int, swap_prob: float) -> SortExample:
    """A warm-start example with a mostly wrong answer.

    Each adjacent pair of digits, from left to right, is swapped with probability `swap_prob`.
    """
    example = sort_example(seed=seed, split=Split.WARM_START, index=index)
    rng = random.Random(f"{seed}/noise/{index}")
    answer = list(example.answer)
    for left in range(len(answer) - 1):
        if rng.random() < swap_prob:
            answer[left], answer[left + 1] = answer[left + 1], answer[left]
    return SortExample(prompt=example.prompt, answer="".join(answer))
