"""Packing: no sequence is lost, reordered or over budget, and cuts depend only on order and budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import Packer, collate, num_targets
from trainer.batching.training_sample import MicroBatch, TrainingSample

BUDGET = 32


def trajectory(*, prompt: int, response: int, first: int = 0) -> Trajectory:
    mask = np.zeros(prompt + response, dtype=np.uint8)
    mask[prompt:] = 1
    return Trajectory(
        tokens=np.arange(first, first + prompt + response, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        versions=np.where(mask, 3, -1).astype(np.int32),
        reward=float(first),
        finish_reason=FinishReason.STOP,
    )


def group_of(sizes: list[int], *, position: int) -> list[TrainingSample]:
    return [
        TrainingSample(
            trajectory=trajectory(prompt=1, response=size - 1, first=1000 * position + 100 * i),
            advantage=float(i),
            group=position,
        )
        for i, size in enumerate(sizes)
    ]


def microbatches_of(groups: list[list[TrainingSample]], *, whole_groups: bool = False) -> list[MicroBatch]:
    packer = Packer(budget_tokens=BUDGET, whole_groups=whole_groups)
    return [pack for group in groups for pack in packer.add(group)] + packer.flush()


group_sizes = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), max_size=12)


@given(group_sizes, st.booleans())
def test_every_sequence_is_packed_once_in_order(sizes: list[list[int]], whole: bool) -> None:
    groups = [group_of(s, position=i) for i, s in enumerate(sizes)]
    packs = microbatches_of(groups, whole_groups=whole)
    assert [id(s) for pack in packs for s in pack] == [id(s) for group in groups for s in group]
    assert all(0 < sum(s.trajectory.num_tokens for s in pack) <= BUDGET for pack in packs)
    if whole:
        packs_by_group = [
            {i for i, pack in enumerate(packs) for s in pack if s.group == g} for g in range(len(groups))
        ]
        assert all(len(indices) == 1 for indices in packs_by_group)


@given(group_sizes)
def test_cuts_do_not_depend_on_how_samples_are_added(sizes: list[list[int]]) -> None:
    groups = [group_of(s, position=i) for i, s in enumerate(sizes)]
    singly = microbatches_of([[sample] for group in groups for sample in group])
    assert [len(pack) for pack in microbatches_of(groups)] == [len(pack) for pack in singly]


@given(group_sizes)
def test_a_microbatch_is_returned_as_soon_as_it_is_full(sizes: list[list[int]]) -> None:
    packer = Packer(budget_tokens=BUDGET)
    open_tokens = 0
    for position, size in enumerate(sizes):
        done = packer.add(group_of(size, position=position))
        open_tokens += sum(size) - sum(s.trajectory.num_tokens for pack in done for s in pack)
        assert 0 <= open_tokens < BUDGET, "a full micro-batch must be returned at once"


def test_sequences_over_the_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise it to at least 33"):
        microbatches_of([group_of([33], position=0)])
    with pytest.raises(ConfigError, match="a group of 40 tokens"):
        microbatches_of([group_of([20, 20], position=0)], whole_groups=True)


def test_collate_lays_sequences_end_to_end() -> None:
    samples = [
        TrainingSample(trajectory=trajectory(prompt=2, response=1, first=10), advantage=1.5, group=4),
        TrainingSample(
            trajectory=trajectory(prompt=1, response=3, first=20), advantage=np.array([0.0, 1, 2, 3]), group=5
        ),
    ]
    batch = collate(samples)
    assert batch.tokens_T.tolist() == [10, 11, 12, 20, 21, 22, 23]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.samples_T.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.lengths == (3, 4)
    assert batch.sampled_S.tolist() == [2, 4, 5, 6]
    assert batch.advantages_T.tolist() == [1.5, 1.5, 1.5, 0, 1, 2, 3]
    assert batch.rewards_N.tolist() == [10, 20]
    assert batch.groups_N.tolist() == [4, 5]
    assert batch.versions_T.tolist() == [-1, -1, 3, -1, 3, 3, 3]


def test_the_first_token_is_never_trained_on() -> None:
    sampled_from_nothing = trajectory(prompt=0, response=3)
    batch = collate([TrainingSample(trajectory=sampled_from_nothing, advantage=1.0, group=0)] * 2)
    assert batch.sampled_S.tolist() == [1, 2, 4, 5]
    assert num_targets(sampled_from_nothing) == 2
