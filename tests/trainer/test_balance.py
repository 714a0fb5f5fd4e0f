"""The division of a step's sequences over ranks: complete, within the budget, even, and always the same."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from areal_like.errors import ArealError, ConfigError
from areal_like.trajectory import TEACHER_LOGPROBS, FinishReason, Trajectory
from tests.support.routes import random_routes
from tests.support.trainer_helpers import joined, run_ranks, write_model
from trainer.batching.balance import Cost, SequenceSize, plan
from trainer.batching.balancer import Balancer, exchange
from trainer.batching.packing import Packer, sequences_of
from trainer.batching.sample_messages import decoded, encoded
from trainer.batching.segments import cut
from trainer.batching.shared_prefixes import budget_size
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks

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


@st.composite
def branching(draw: st.DrawFn) -> list[TrainingSample]:
    """Sequences that begin like some other one of the group up to some token."""
    tokens: list[list[int]] = []
    for number in range(draw(st.integers(1, 7))):
        beginning = draw(st.sampled_from(tokens))[: draw(st.integers(0, 50))] if tokens else []
        tokens.append(beginning + [100 + number] * draw(st.integers(1, BUDGET - len(beginning))))
    return [sample_of(np.array(each, dtype=np.int32)) for each in tokens]


branching_groups = branching()


class AloneRanks(Ranks):
    """One rank without a process group."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1


def sample_of(tokens: NDArray[np.int32]) -> TrainingSample:
    mask = np.ones(len(tokens), dtype=np.uint8)
    return TrainingSample(
        trajectory=Trajectory(
            tokens=tokens,
            loss_mask=mask,
            logprobs=np.zeros(len(tokens), dtype=np.float32),
            versions=np.zeros(len(tokens), dtype=np.int32),
            reward=0.0,
            finish_reason=FinishReason.STOP,
        ),
        advantage=1.0,
        group=0,
    )


def tokens_of(sizes: list[SequenceSize], members: tuple[int, ...]) -> int:
    total = 0
    for _, of_group in groupby(members, key=lambda index: sizes[index].group):
        first, *others = of_group
        total += sizes[first].num_tokens
        total += sum(budget_size(sizes[i].num_tokens, prefix=sizes[i].prefix) for i in others)
    return total


def streaming_time(sizes: list[SequenceSize], num_ranks: int) -> int:
    """Group j on rank j mod `num_ranks`, next fit there: the cost of the slowest micro-batches, added up."""
    costs: list[list[int]] = [[] for _ in range(num_ranks)]
    room, last = [0] * num_ranks, [-1] * num_ranks
    for size in sizes:
        rank = size.group % num_ranks
        prefix = size.prefix if last[rank] == size.group else 0
        if budget_size(size.num_tokens, prefix=prefix) > room[rank]:
            costs[rank].append(0)
            room[rank], prefix = BUDGET, 0
        room[rank] -= budget_size(size.num_tokens, prefix=prefix)
        costs[rank][-1] += COST.of(size.num_tokens, prefix=prefix)
        last[rank] = size.group
    return sum(map(max, zip_longest(*costs, fillvalue=0)))


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


@given(st.lists(branching_groups, max_size=3), st.booleans())
def test_branches_keep_to_the_budget(groups: list[list[TrainingSample]], shares_prefixes: bool) -> None:
    """Of the prefixes that are in the same micro-batch, not of those that were in the group."""
    groups = [[replace(sample, group=at) for sample in group] for at, group in enumerate(groups)]
    balancer = Balancer(AloneRanks(), cost=COST, budget_tokens=BUDGET, shares_prefixes=shares_prefixes)
    microbatches = list(balancer.microbatches(groups))
    samples = [sample for group in groups for sample in group]
    assert sorted(map(id, chain(*microbatches))) == sorted(map(id, samples))
    for microbatch in microbatches:
        packer = Packer(budget_tokens=BUDGET + 1, shares_prefixes=shares_prefixes)
        assert packer.add(microbatch) == [] and packer.flush() == [microbatch]


@given(
    st.lists(branching_groups, max_size=3),
    st.lists(st.integers(1, 3), min_size=21, max_size=21),
    st.booleans(),
)
def test_segments_of_a_sample_stay_together(
    groups: list[list[TrainingSample]], num_segments: list[int], shares_prefixes: bool
) -> None:
    """Or the sample is too long, set aside and cut."""
    counts = iter(num_segments)
    samples: list[list[TrainingSample]] = []
    for group in groups:
        samples.append([])
        while group:
            count = next(counts)
            whole = joined([sample.trajectory for sample in group[:count]])
            samples[-1].append(replace(group[0], trajectory=whole, group=len(samples) - 1))
            group = group[count:]
    limits: dict[str, Any] = {"budget_tokens": BUDGET, "shares_prefixes": shares_prefixes}
    for packer in (Balancer(AloneRanks(), cost=COST, **limits), Packer(**limits)):
        microbatches = list(packer.microbatches(samples))
        found = [*chain(*microbatches), *packer.set_aside]
        assert sorted(map(id, found)) == sorted(map(id, chain(*samples)))
        for microbatch in microbatches:
            again = Packer(**limits | {"budget_tokens": BUDGET + 1})
            assert again.add(microbatch) == [] and again.flush() == [microbatch]
        for sample in packer.set_aside:
            alone = Packer(**limits)
            assert list(alone.microbatches([[sample]])) == [] and alone.set_aside == [sample]
            parts = cut(sample, alone)
            assert all(list(alone.microbatches([[part]])) == [(part,)] for part in parts) and len(parts) > 1
            lengths = [each.num_tokens for part in parts for each in sequences_of(part.trajectory)]
            assert tuple(lengths) == sample.trajectory.segments


def test_halves_of_the_budget_are_planned_at_once() -> None:
    """Twice the rounds that the tokens need."""
    sizes = sizes_of([(0, [33 + index % 3]) for index in range(2000)])
    began_s = time.process_time()
    made = plan(sizes, num_ranks=4, budget_tokens=BUDGET, cost=COST)
    assert len(made.rounds) == 500 and made.busy_share > 0.99
    assert time.process_time() - began_s < 10, "trying every number of rounds takes minutes"


@given(groups_of_sizes, st.integers(1, 5))
def test_it_takes_no_longer_than_next_fit(groups: list[tuple[int, list[int]]], num_ranks: int) -> None:
    sizes = sizes_of(groups)
    made = plan(sizes, num_ranks=num_ranks, budget_tokens=BUDGET, cost=COST)
    assert made.time <= 1.34 * streaming_time(sizes, num_ranks)


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
    teacher = {TEACHER_LOGPROBS: np.array([0, -0.3, -2e-7], dtype=np.float32)}
    sample = TrainingSample(
        trajectory=Trajectory(
            tokens=np.array([5, 6, 7], dtype=np.int32),
            loss_mask=np.array([0, 1, 1], dtype=np.uint8),
            logprobs=np.array([0, -0.1, -3e-7], dtype=np.float32),
            versions=np.array([-1, 3, 4], dtype=np.int32),
            reward=0.1,
            finish_reason=FinishReason.LENGTH,
            segments=(1, 2) if of_tokens else (),
            routes=random_routes(1, np.random.default_rng(0)) if of_tokens else None,
            label="sums" if of_tokens else "",
            arrays=teacher if of_tokens else {},
        ),
        advantage=np.array([0.0, 1 / 3, -2.0]) if of_tokens else 1 / 3,
        lag=np.array([0, 2, 1]) if of_tokens else 2,
        group=7,
        beyond=np.array([False, True, False]) if of_tokens else None,
        num_masked=2 if of_tokens else 0,
        is_continued=of_tokens,
    )
    back = decoded(encoded(sample))
    assert repr(back) == repr(sample)


def test_samples_that_were_not_planned_are_refused() -> None:
    sample = sample_of(np.array([1, 2, 3], dtype=np.int32))

    class Peers(AloneRanks):
        data = b""

        def exchange(self, messages: Sequence[bytes], *, most_bytes: Sequence[int]) -> list[bytes]:
            return [self.data]

    def receive(data: Any) -> dict[int, TrainingSample]:
        peers = Peers()
        peers.data = msgpack.packb(data)
        return exchange([{}], [{4: 3}], peers)

    fields = encoded(sample)
    assert repr(receive([[4, fields]])) == repr({4: sample})
    for other in ([[5, fields]], [], [[4, encoded(sample_of(np.array([1, 2], dtype=np.int32)))]]):
        with pytest.raises(ArealError, match="rank 0 sent other samples"):
            receive(other)
    broken = [
        {**fields, "advantage": bytes(16)},
        {**fields, "lag": "one"},
        {**fields, "tokens": bytes(5)},
        {},
    ]
    for each in (*broken, 7):
        with pytest.raises(ArealError, match="rank 0 sent samples that cannot be read"):
            receive([[4, each]])


@pytest.mark.chaos
def test_three_ranks_give_the_gradient_of_streaming(tmp_path: Path) -> None:
    """With segments, groups without advantages and a rank without work; abandoned; the same step twice.

    Long, because three ranks take turns on the cores for each of them.
    """
    # RMSNorm rounds the gradient of every row to float32: LayerNorm does not.
    run_ranks("balanced", str(tmp_path), write_model(tmp_path / "model", "gpt2"), world_size=3)


def test_three_ranks_exchange_messages_of_any_size(tmp_path: Path) -> None:
    run_ranks("exchange", str(tmp_path), world_size=3)
