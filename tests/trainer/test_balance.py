"""The division of a step's sequences over ranks: complete, within the budget, even, and always the same."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from tests.support.trainer_helpers import run_ranks
from trainer.batching.balance import Cost, SequenceSize, plan
from trainer.batching.exchange import _decoded, _encoded
from trainer.batching.packing import TrainingSample
from trainer.batching.shared_prefixes import budget_size

BUDGET = 64
COST = Cost(per_row=100, per_pair=7)

groups_of_sizes = st.lists(
    st.tuples(st.integers(0, 20), st.lists(st.integers(1, 44), min_size=1, max_size=6)), max_size=20
)
"""For each group: length of the prompt, and lengths of the answers."""


def sizes_of(groups: list[tuple[int, list[int]]]) -> list[SequenceSize]:
    return [
        SequenceSize(group=group, num_tokens=prompt + answer, prefix=prompt if place else 0)
        for group, (prompt, answers) in enumerate(groups)
        for place, answer in enumerate(answers)
    ]


def tokens_of(sizes: list[SequenceSize], members: tuple[int, ...]) -> int:
    total = 0
    for _, of_group in groupby(members, key=lambda index: sizes[index].group):
        first, *others = of_group
        total += sizes[first].num_tokens
        total += sum(budget_size(sizes[i].num_tokens, prefix=sizes[i].prefix) for i in others)
    return total


@given(groups_of_sizes, st.integers(1, 5))
def test_every_sequence_is_in_one_microbatch(groups: list[tuple[int, list[int]]], num_ranks: int) -> None:
    sizes = sizes_of(groups)
    made = plan(sizes, num_ranks=num_ranks, budget_tokens=BUDGET, cost=COST)
    members = [index for each in made.rounds for of_rank in each for index in of_rank]
    assert sorted(members) == list(range(len(sizes)))
    assert all(len(each) == num_ranks for each in made.rounds)
    for each in made.rounds:
        for of_rank in each:
            assert list(of_rank) == sorted(of_rank)
            assert tokens_of(sizes, of_rank) <= BUDGET
    assert 0 < made.busy_share <= 1
    assert plan(sizes, num_ranks=num_ranks, budget_tokens=BUDGET, cost=COST) == made


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=40), st.integers(2, 5))
def test_the_busy_share_is_that_of_the_costs(lengths: list[int], num_ranks: int) -> None:
    sizes = sizes_of([(0, [length]) for length in lengths])
    made = plan(sizes, num_ranks=num_ranks, budget_tokens=BUDGET, cost=COST)
    costs = [[sum(COST.of(lengths[i], prefix=0) for i in m) for m in each] for each in made.rounds]
    waited_for = num_ranks * sum(max(each) for each in costs)
    assert made.busy_share == pytest.approx(sum(map(sum, costs)) / waited_for)


@pytest.mark.parametrize(("num_ranks", "least"), [(4, 0.98), (32, 0.93)])
def test_long_tails_leave_little_waiting(num_ranks: int, least: float) -> None:
    rng = np.random.default_rng(0)
    groups = [
        (400, [int(n) for n in np.clip(rng.lognormal(np.log(6000), 1.0, 8), 16, 31_000)]) for _ in range(128)
    ]
    cost = Cost(per_row=48_000_000, per_pair=1_770)  # of a model of 8 billion parameters, in kiloflops
    made = plan(sizes_of(groups), num_ranks=num_ranks, budget_tokens=65_536, cost=cost)
    assert made.busy_share > least


def test_whole_groups_stay_together() -> None:
    sizes = sizes_of([(4, [8, 8]), (4, [30, 2, 1]), (0, [3]), (2, [5] * 6)])
    made = plan(sizes, num_ranks=2, budget_tokens=BUDGET, cost=COST, whole_groups=True)
    for group in range(4):
        wanted = {index for index, size in enumerate(sizes) if size.group == group}
        (holder,) = (set(m) for each in made.rounds for m in each if wanted & set(m))
        assert wanted <= holder


def test_sequences_over_the_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a sequence of 65 tokens .* raise it to at least 65"):
        plan(sizes_of([(0, [65])]), num_ranks=2, budget_tokens=BUDGET, cost=COST)
    with pytest.raises(ConfigError, match="a group of 80 tokens"):
        plan(sizes_of([(0, [40, 40])]), num_ranks=2, budget_tokens=BUDGET, cost=COST, whole_groups=True)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_a_sample_survives_its_journey(of_tokens: bool) -> None:
    sample = TrainingSample(
        trajectory=Trajectory(
            tokens=np.array([5, 6, 7], dtype=np.int32),
            loss_mask=np.array([0, 1, 1], dtype=np.uint8),
            logprobs=np.array([0, -0.1, -3e-7], dtype=np.float32),
            versions=np.array([-1, 3, 4], dtype=np.int32),
            reward=0.1,
            finish_reason=FinishReason.LENGTH,
        ),
        advantage=np.array([0.0, 1 / 3, -2.0]) if of_tokens else 1 / 3,
        lag=np.array([0, 2, 1]) if of_tokens else 2,
        group=7,
    )
    back = _decoded(_encoded(sample))
    assert repr(back) == repr(sample)


@pytest.mark.timeout(100)
def test_three_ranks_exchange_messages_of_any_size(tmp_path: Path) -> None:
    run_ranks("exchange", str(tmp_path), world_size=3)
