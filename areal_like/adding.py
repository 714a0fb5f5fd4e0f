"""Generates examples and demonstrations of the addition task: the correct completion of `37+85+12` is `134`.

A calculator adds two numbers at a time, so n terms need n - 1 calls before the final answer. The number of
terms has a long tail: each further term is added with probability 0.6. The rollout task and the trainer's
warm start both use this module. An example is a pure function of (seed, split, index). The held-out split is
a set of *multisets* of terms, fixed by a hash that does not depend on the seed, as in `areal_like.sorting`.

A demonstration is a conversation with mistakes: most demonstrations do not use the calculator, and those that
do may leave out a term or stop early with the running total. Numbers are always copied correctly. So the warm
start teaches the format and how to copy numbers, and RL has to discover that each term needs a call.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from areal_like.sorting import HELD_OUT_PERCENT, Split

TOOL = "add"
"""Name of the calculator: it adds the integers `a` and `b`."""
MIN_TERMS = 2
MAX_TERMS = 8
_MORE_TERMS_PROB = 0.6
_TERMS = range(10, 100)

_NO_CALL_PROB = 0.55
"""Probability that the demonstrator gives the first term as its final answer."""
_TOO_SOON_PROB = 0.08
"""Per further call: the probability that the demonstrator gives a final answer instead."""
_LEAVES_OUT_PROB = 0.08
"""Per call except the last: the probability that the demonstrator leaves out a term."""


@dataclass(frozen=True, kw_only=True)
class AddExample:
    """One prompt with its only correct answer."""

    terms: tuple[int, ...]
    """Distinct two-digit numbers."""

    @property
    def prompt(self) -> str:
        """`37+85+12`"""
        return "+".join(map(str, self.terms))

    @property
    def answer(self) -> str:
        """The sum."""
        return str(sum(self.terms))


def is_held_out(terms: tuple[int, ...]) -> bool:
    """True if the multiset of `terms` belongs to the held-out split."""
    digest = hashlib.blake2b("+".join(map(str, sorted(terms))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_OUT_PERCENT


def add_example(*, seed: int, split: Split, index: int) -> AddExample:
    """The `index`-th example of a split: 2 to 8 terms.

    Two terms are the most likely number; in the warm start every number is equally likely, because a model
    that has hardly seen a long conversation solves none, and RL then has nothing to learn from.
    """
    rng = random.Random(f"adding/{seed}/{split.value}/{index}")
    while True:
        if split is Split.WARM_START:
            num_terms = rng.randint(MIN_TERMS, MAX_TERMS)
        else:
            num_terms = MIN_TERMS
            while num_terms < MAX_TERMS and rng.random() < _MORE_TERMS_PROB:
                num_terms += 1
        terms = tuple(rng.sample(_TERMS, num_terms))
        if is_held_out(terms) == (split is Split.HELD_OUT):
            return AddExample(terms=terms)


def noisy_demonstration(*, seed: int, index: int, uses_tool: bool) -> list[dict[str, Any]]:
    """A warm-start conversation as chat messages, usually with a wrong answer.

    Without the tool the answer directly follows the prompt and is correct: nothing else teaches sums.
    """
    example = add_example(seed=seed, split=Split.WARM_START, index=index)
    messages: list[dict[str, Any]] = [{"role": "user", "content": example.prompt}]
    if not uses_tool:
        return [*messages, {"role": "assistant", "content": example.answer}]
    rng = random.Random(f"adding/{seed}/noise/{index}")
    total, *rest = example.terms
    while rest and rng.random() >= (_NO_CALL_PROB if len(messages) == 1 else _TOO_SOON_PROB):
        if len(rest) > 1 and rng.random() < _LEAVES_OUT_PROB:
            rest.pop(0)
        arguments = {"a": total, "b": rest.pop(0)}
        call = {"type": "function", "function": {"name": TOOL, "arguments": arguments}}
        total = sum(arguments.values())
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": str(total)})
    return [*messages, {"role": "assistant", "content": str(total)}]
