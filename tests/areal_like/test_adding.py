"""The addition task's generator: pure examples, held-out multisets, a long tail, noisy demonstrations."""

from __future__ import annotations

from collections import Counter
from typing import Any

from areal_like.adding import MAX_TERMS, add_example, is_held_out, noisy_demonstration
from areal_like.sorting import Split


def test_examples_are_pure_and_held_out_multisets_are_apart() -> None:
    def terms(split: Split, *, seed: int = 0, num: int = 500) -> list[tuple[int, ...]]:
        return [add_example(seed=seed, split=split, index=i).terms for i in range(num)]

    assert terms(Split.TRAIN) == terms(Split.TRAIN) != terms(Split.TRAIN, seed=1)
    held_out = {tuple(sorted(some)) for some in terms(Split.HELD_OUT)}
    for seed in (0, 7):
        for split in (Split.TRAIN, Split.WARM_START):
            assert not held_out & {tuple(sorted(some)) for some in terms(split, seed=seed)}
    assert all(is_held_out(some) for some in held_out)
    assert all(len(set(some)) == len(some) for some in terms(Split.TRAIN)), "equal terms cannot be told apart"


def test_numbers_of_terms_have_a_long_tail() -> None:
    lengths = Counter(len(add_example(seed=3, split=Split.TRAIN, index=i).terms) for i in range(2000))
    assert set(lengths) == set(range(2, MAX_TERMS + 1))
    assert lengths[2] > lengths[3] > lengths[4] > lengths[6]
    assert sum(n for terms, n in lengths.items() if terms >= 6) > 150


def test_demonstrations_are_mostly_wrong() -> None:
    right = 0
    for index in range(1000):
        example = add_example(seed=0, split=Split.WARM_START, index=index)
        prompt, *turns, last = noisy_demonstration(seed=0, index=index, uses_tool=True)
        assert prompt == {"role": "user", "content": example.prompt}
        right += last["content"] == example.answer
        assert replies_of(turns) == [message["content"] for message in turns[1::2]]
    assert 220 < right < 380
    prompt, last = noisy_demonstration(seed=0, index=5, uses_tool=False)
    example = add_example(seed=0, split=Split.WARM_START, index=5)
    assert (prompt["content"], last["content"]) == (example.prompt, example.answer)


def replies_of(turns: list[dict[str, Any]]) -> list[str]:
    """What the calculator answers to the calls of a demonstration."""
    calls = [message["tool_calls"][0]["function"] for message in turns[::2]]
    return [str(call["arguments"]["a"] + call["arguments"]["b"]) for call in calls]
