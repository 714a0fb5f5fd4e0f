"""Trajectories of several segments: each is a sequence for the model; statistics stay those of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.trainer_helpers import joined, random_trajectory
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.advantages import Advantage
from trainer.batching.packing import PackedBatch, Packer, collate, is_target, num_targets
from trainer.batching.segments import (
    cut,
    segments_of,
    split_targets,
    trained_segments,
    values_of_targets,
)
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks

OBJECTIVES: list[dict[str, Any]] = [
    {"name": "reinforce"},
    {"name": "ppo"},
    {"name": "tis", "level": "token", "normalize": True},
]


@dataclass(frozen=True, kw_only=True)
class RewardAsAdvantage(Advantage):
    """A = R, so that the samples of a group do not depend on one another."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [trajectory.reward for trajectory in group]


def pieces(num_groups: int = 3, *, group_size: int = 4) -> list[list[list[Trajectory]]]:
    """For each group, for each sample, the trajectories that become its segments (one to three)."""
    rng = np.random.default_rng(3)
    return [
        [
            [random_trajectory(rng, longest=10, reward=float(i - 1)) for _ in range(1 + (g + i) % 3)]
            for i in range(group_size)
        ]
        for g in range(num_groups)
    ]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda settings: f"{settings['name']}")
def test_losses_of_tokens_are_those_of_segments_as_samples(
    path: str, ranks: Ranks, objective: dict[str, Any]
) -> None:
    groups, gradients = pieces(), []
    for is_joined in (True, False):
        step = [
            [joined(sample) for sample in group] if is_joined else [t for sample in group for t in sample]
            for group in groups
        ]
        runner = make_runner(
            path,
            ranks,
            beta1=0.0,
            advantage=RewardAsAdvantage(),
            settings={"objective": objective},
            budget_tokens=120,
        )
        metrics = runner.run(step, step=7)
        gradients.append(last_gradient(runner))
        assert metrics["num_sequences"] == (12 if is_joined else 24), "a sample counts once"
        assert metrics["segments"] == (2 if is_joined else 1)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).norm()) <= 1e-12 * float(gradient.norm()), name


def test_values_and_penalties_are_those_of_segments(path: str, ranks: Ranks) -> None:
    settings = {"advantage": {"name": "gae"}, "kl": {"coef": 0.1, "place": "reward"}}
    runner = make_runner(path, ranks, settings=settings)
    assert runner.critic is not None
    with torch.no_grad():
        runner.critic.optimizer.shards["model.lm_head.weight"].normal_(
            generator=torch.Generator().manual_seed(0)
        )
    samples = [sample for group in pieces() for sample in group]
    together = runner.critic.values([joined(sample) for sample in samples])
    apart = runner.critic.values([t for sample in samples for t in sample])
    assert np.array_equal(np.concatenate(together), np.concatenate(apart))
    assert [len(values_S) for values_S in together] == [num_targets(joined(sample)) for sample in samples]
    (shaped,), (penalties,) = runner.rewards.shape_step([[joined(sample) for sample in samples]])
    _, (of_segments,) = runner.rewards.shape_step([[t for sample in samples for t in sample]])
    assert np.array_equal(np.concatenate(penalties), np.concatenate(of_segments))
    assert [t.reward for t in shaped] == [
        sample[0].reward - float(penalty_S.sum())
        for sample, penalty_S in zip(samples, penalties, strict=True)
    ]
    metrics = runner.run([[joined(sample) for sample in group] for group in pieces()], step=7)
    assert metrics["value_loss"] > 0 and metrics["num_sequences"] == 12


def test_values_are_read_after_the_last_micro_batch(ranks: Ranks) -> None:
    """On a GPU, which would be idle while the host prepares the next one. A tensor without memory cannot be
    read."""
    sizes = []

    def compute(batch: PackedBatch) -> Tensor:
        sizes.append(batch.num_samples)
        return torch.zeros(len(batch.sampled_S), device="meta")

    samples = [t for group in pieces() for sample in group for t in sample]
    with pytest.raises(NotImplementedError):
        values_of_targets(samples, compute, ranks, budget_tokens=30)
    assert len(sizes) > 1 and sum(sizes) == len(samples)


def test_cutting_cuts_advantage_lag_and_arrays() -> None:
    (sample, *_), *_ = [[s for s in group if len(s) == 3] for group in pieces()]
    whole = joined(sample, arrays={"ids": np.arange(sum(t.num_tokens for t in sample)), "once": np.ones(2)})
    numbers_T = np.arange(whole.num_tokens)
    training = TrainingSample(
        trajectory=whole, advantage=numbers_T * 0.5, lag=numbers_T, group=4, num_masked=6
    )
    assert trained_segments(training) is training
    last, first = sample[2].num_tokens, max(sample[0].num_tokens + sample[1].num_tokens, sample[2].num_tokens)
    parts = cut(training, Packer(budget_tokens=first, shares_prefixes=False))
    assert [part.trajectory.num_tokens for part in parts] == [whole.num_tokens - last, last]
    assert [len(part.trajectory.segment_slices) for part in parts] == [2, 1]
    for name in ("tokens", "loss_mask", "logprobs", "versions"):
        got = np.concatenate([getattr(part.trajectory, name) for part in parts])
        assert np.array_equal(got, getattr(whole, name))
    assert np.concatenate([part.lag for part in parts]).tolist() == numbers_T.tolist()
    assert np.concatenate([part.advantage for part in parts]).tolist() == (numbers_T * 0.5).tolist()
    assert np.concatenate([part.trajectory.arrays["ids"] for part in parts]).tolist() == numbers_T.tolist()
    assert all(part.trajectory.arrays["once"].tolist() == [1, 1] for part in parts)
    assert all(part.group == 4 and part.trajectory.reward == whole.reward for part in parts)
    assert [(part.num_masked, part.is_continued) for part in parts] == [(6, True), (0, False)]
    target_T = is_target(whole)
    split = split_targets(numbers_T[target_T].astype(float), whole)
    assert np.array_equal(np.concatenate(split), numbers_T[target_T])
    assert [len(value_S) for value_S in split] == [num_targets(segment) for _, segment in segments_of(whole)]


def test_a_sample_is_several_sequences_and_one_row() -> None:
    (sample, *_), *_ = [[s for s in group if len(s) == 3] for group in pieces()]
    samples = [
        TrainingSample(trajectory=t, advantage=1.0, group=g) for g, t in ((2, joined(sample)), (3, sample[0]))
    ]
    batch = collate(samples)
    whole = samples[0].trajectory
    assert batch.lengths == (*(t.num_tokens for t in sample), sample[0].num_tokens)
    assert batch.sample_lengths == (whole.num_tokens, sample[0].num_tokens)
    assert batch.num_sequences == 4 and batch.num_samples == 2
    assert batch.samples_T.tolist() == [0] * whole.num_tokens + [1] * sample[0].num_tokens
    assert batch.positions_T.tolist() == [p for t in (*sample, sample[0]) for p in range(t.num_tokens)]
    assert batch.groups_N.tolist() == [2, 3]
    assert batch.sampled_S.tolist()[: num_targets(whole)] == np.flatnonzero(is_target(whole)).tolist()


def test_first_tokens_and_empty_segments_are_left_out() -> None:
    rng = np.random.default_rng(0)
    first, second, third = (random_trajectory(rng, longest=6, reward=1.0) for _ in range(3))
    no_prompt = replace(
        second,
        loss_mask=np.ones_like(second.loss_mask),
        logprobs=np.full(second.num_tokens, -1, np.float32),
        versions=np.full(second.num_tokens, 5, np.int32),
    )
    shared = replace(
        third,
        loss_mask=np.zeros_like(third.loss_mask),
        logprobs=np.zeros(third.num_tokens, np.float32),
        versions=np.full(third.num_tokens, -1, np.int32),
    )
    whole = joined([first, shared, no_prompt])
    kept = [part for part, _ in segments_of(whole)]
    assert [part.start for part in kept] == [0, first.num_tokens + third.num_tokens]
    assert not is_target(whole)[kept[1].start]
    assert num_targets(whole) == num_targets(first) + second.num_tokens - 1
    assert len(segments_of(joined([shared, shared]))) == 1, "a sample has at least one sequence"
    trained = trained_segments(TrainingSample(trajectory=whole, advantage=1.0, group=0)).trajectory
    assert trained.segments == (first.num_tokens, no_prompt.num_tokens)
    assert num_targets(trained) == num_targets(whole)


def test_whole_groups_count_all_segments() -> None:
    group = [joined(sample) for sample in pieces()[0]]
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in group]
    size = sum(t.num_tokens for t in group)
    packer = Packer(budget_tokens=size, whole_groups=True)
    assert [len(batch) for batch in packer.add(samples)] == [len(samples)]
    with pytest.raises(ConfigError, match=f"a group of {size} tokens"):
        Packer(budget_tokens=size - 1, whole_groups=True).add(samples)


def test_a_segment_may_fill_a_microbatch(path: str, ranks: Ranks) -> None:
    """A sample may be longer than a micro-batch; none of its segments is."""
    sample = random_trajectory(np.random.default_rng(5), longest=12, reward=1.0)
    whole = joined(
        [replace(sample, tokens=sample.tokens[::-1].copy() if i % 2 else sample.tokens) for i in range(5)]
    )
    runner = make_runner(
        path,
        ranks,
        budget_tokens=sample.num_tokens,
        advantage=RewardAsAdvantage(),
        settings={"objective": {"name": "vcpo", "norms": "exact"}},  # which shares no prefixes
    )
    forwards: list[int] = []
    runner.policy.register_forward_hook(lambda *_: forwards.append(1))
    metrics = runner.run([[whole]], step=7)
    assert metrics["num_microbatches"] == 5 and metrics["num_sequences"] == 1
    assert len(forwards) == 10, "once without gradient"
    assert runner.run([[sample]], step=8)["num_microbatches"] == 1 and len(forwards) == 11
