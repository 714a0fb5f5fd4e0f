"""The digit-sorting task: held-out multisets are never trained on, examples are pure, the reward is exact
match."""

from collections import Counter

from areal_like.sorting import Split, is_held_out, noisy_demonstration, sort_example
from rollout_server.tasks.base import Example
from rollout_server.tasks.sort import SortTask


def test_examples_are_pure_functions_of_their_index() -> None:
    a = [sort_example(seed=1, split=Split.TRAIN, index=i) for i in range(50)]
    assert a == [sort_example(seed=1, split=Split.TRAIN, index=i) for i in range(50)]
    assert a != [sort_example(seed=2, split=Split.TRAIN, index=i) for i in range(50)]
    assert a != [sort_example(seed=1, split=Split.WARM_START, index=i) for i in range(50)]


def test_held_out_multisets_are_never_trained_on() -> None:
    held_out = {
        "".join(sorted(sort_example(seed=0, split=Split.HELD_OUT, index=i).answer)) for i in range(500)
    }
    trained = set()
    for seed in (0, 7):
        trained |= {sort_example(seed=seed, split=Split.TRAIN, index=i).answer for i in range(2000)}
        trained |= {
            "".join(sorted(noisy_demonstration(seed=seed, index=i, swap_prob=0.5).answer))
            for i in range(2000)
        }
    assert not held_out & trained
    assert all(is_held_out(digits) for digits in held_out)


def test_lengths_are_four_to_eight_and_equally_likely() -> None:
    lengths = Counter(len(sort_example(seed=3, split=Split.TRAIN, index=i).answer) for i in range(2000))
    assert set(lengths) == {4, 5, 6, 7, 8}
    assert min(lengths.values()) > 300


def test_reward_is_exact_match() -> None:
    example = Example(prompt="5203=", answer="0235")
    assert SortTask().reward(example, "0235") == 1.0
    for wrong in ("0253", "02355", "023", "", " 0235", "0235="):
        assert SortTask().reward(example, wrong) == 0.0


def test_demonstrations_are_mostly_wrong_permutations() -> None:
    demos = [noisy_demonstration(seed=0, index=i, swap_prob=0.5) for i in range(1000)]
    assert all(sorted(d.answer) == sorted(d.prompt[:-1]) for d in demos)
    right = sum(d.answer == "".join(sorted(d.prompt[:-1])) for d in demos) / len(demos)
    assert 0.02 < right < 0.3
    clean = [noisy_demonstration(seed=0, index=i, swap_prob=0.0) for i in range(50)]
    assert all(d.answer == "".join(sorted(d.prompt[:-1])) for d in clean)
