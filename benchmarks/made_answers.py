"""Wrong answers of the sorting task that are made on purpose, beside those that a model gives.

A reward model that has read only one model's answers knows only that model's mistakes. The initial model of
the default job puts the right digits into a wrong order; these also have other digits, too many or too few.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from rollout_server.tasks.base import Split
from rollout_server.tasks.sort import SortTask

DIGITS = "0123456789"
MAX_DIGITS = 10
Change = Callable[[list[str], random.Random], None]


def made_pairs(split: Split, num_pairs: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Rows with the right answer and a wrong one to the same prompt."""
    task, draw = SortTask(seed=seed), random.Random(f"{seed}/{split}/made")
    for index in range(num_pairs):
        example = task.example(split, index)
        wrong = example.answer
        while not wrong or task.reward(example, wrong) == 1.0:
            wrong = changed(example.answer, draw)
        yield {"prompt": str(example.prompt), "chosen": example.answer, "rejected": wrong}


def changed(answer: str, draw: random.Random) -> str:
    """The answer after one to three changes of one kind, in half of the cases sorted again."""
    digits, change = list(answer), draw.choice(CHANGES)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change(digits, draw)
    if draw.random() < 0.5:
        digits.sort()
    return "".join(digits[:MAX_DIGITS])


def _swap(digits: list[str], draw: random.Random) -> None:
    left, right = draw.randrange(len(digits)), draw.randrange(len(digits))
    digits[left], digits[right] = digits[right], digits[left]


def _replace(digits: list[str], draw: random.Random) -> None:
    digits[draw.randrange(len(digits))] = draw.choice(DIGITS)


def _drop(digits: list[str], draw: random.Random) -> None:
    if len(digits) > 1:
        digits.pop(draw.randrange(len(digits)))


def _insert(digits: list[str], draw: random.Random) -> None:
    digits.insert(draw.randrange(len(digits) + 1), draw.choice(DIGITS))


def _repeat(digits: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(digits))
    digits.insert(at, digits[at])


def _swap_neighbors(digits: list[str], draw: random.Random) -> None:
    at = draw.randrange(len(digits) - 1)
    digits[at], digits[at + 1] = digits[at + 1], digits[at]


def _any_digits(digits: list[str], draw: random.Random) -> None:
    digits[:] = draw.choices(DIGITS, k=draw.randint(1, MAX_DIGITS))


CHANGES: tuple[Change, ...] = (
    _swap,
    _swap_neighbors,
    _replace,
    _drop,
    _insert,
    _repeat,
    _any_digits,
)
