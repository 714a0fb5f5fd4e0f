"""Rows of preferences for the digit-sorting task: the better completion has the larger reward of the task."""

from __future__ import annotations

import random
from typing import Any

from areal_like.sorting import Split, sort_example


def sorting_pairs(num_rows: int, *, seed: int, split: Split = Split.TRAIN) -> list[dict[str, Any]]:
    """Rows of a prompt, the right answer, and one with two digits exchanged."""
    rows: list[dict[str, Any]] = []
    index = 0
    while len(rows) < num_rows:
        example = sort_example(seed=seed, split=split, index=index)
        draw, digits = random.Random(f"{seed}/{index}"), list(example.answer)
        left, right = draw.sample(range(len(digits)), 2)
        digits[left], digits[right] = digits[right], digits[left]
        index += 1
        if (wrong := "".join(digits)) != example.answer:
            rows.append({"prompt": example.prompt, "chosen": example.answer, "rejected": wrong})
    return rows
