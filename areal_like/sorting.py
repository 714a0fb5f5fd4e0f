"""The digit-sorting task: `5203=` is answered by `0235`. Here because the rollout task and the trainer's warm start both need it.

An example is a pure function of (seed, split, index): nothing is stored, and every process draws the same prompts. The held-out
split is a set of *multisets* of digits, fixed by a hash that no seed changes: a model that has seen `0253` in training has in
effect seen the answer to `5203`, so a held-out set of mere strings would measure memory.
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
    """Which stream of examples."""

    TRAIN = "train"
    """Prompts of the RL run."""
    WARM_START = "warm_start"
    """Prompts of the supervised warm start; the same multisets as TRAIN, in another order."""
    HELD_OUT = "held_out"
    """Prompts of the evaluation; no multiset of theirs appears in the other two."""


@dataclass(frozen=True, kw_only=True)
class SortExample:
    """One prompt with its only right answer."""

    prompt: str
    """Digits and an equals sign, `5203=`."""
    answer: str
    """The digits in ascending order, `0235`; the policy has to stop after them."""


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


def sort_reward(*, prompt: str, response: str) -> float:
    """1.0 if `response` (without the end token) is exactly the sorted digits of `prompt`, else 0.0."""
    return float(response == "".join(sorted(prompt.removesuffix("="))))


def noisy_demonstration(*, seed: int, index: int, swap_prob: float) -> SortExample:
    """A warm-start example whose answer is mostly wrong: each adjacent pair, left to right, is swapped with probability `swap_prob`."""
    example = sort_example(seed=seed, split=Split.WARM_START, index=index)
    rng = random.Random(f"{seed}/noise/{index}")
    answer = list(example.answer)
    for left in range(len(answer) - 1):
        if rng.random() < swap_prob:
            answer[left], answer[left + 1] = answer[left + 1], answer[left]
    return SortExample(prompt=example.prompt, answer="".join(answer))
