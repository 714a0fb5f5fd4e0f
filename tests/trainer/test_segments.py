"""Trajectories of several segments: each is a sequence for the model; statistics stay those of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.objective_helpers import NORMALIZERS, evaluate, tokens_of
from tests.support.trainer_helpers import joined, random_groups, random_trajectory
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.advantages import Advantage
from trainer.batching.packing import DivisorCounts, Packer, TrainingSample, collate, is_target, num_targets
from trainer.batching.sampled_tokens import SampledTokens
from trainer.batching.segments import segments_of, split_sample, split_targets
from trainer.distributed.ranks import Ranks
from trainer.gradients.optimal_baseline import optimal_baseline
from trainer.objectives import build_objective

OBJECTIVES: list[dict[str, Any]] = [
    {"name": "tis", "level": "sequence"},
    {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05},
    {"name": "vcpo", "normalizer": "token_mean"},
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
def test_gradient_is_that_of_segments_as_samples(path: str, ranks: Ranks, objective: dict[str, Any]) -> None:
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
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("normalizer", ["seq_mean_token_sum", "constant", "seq_mean_token_mean"])
def test_a_sample_counts_once_in_normalizers(path: str, ranks: Ranks, normalizer: str) -> None:
    """Three segments with one advantage each, equal to one another: a mean over tokens of the sample."""
    sample, *_ = random_groups(1, group_size=1, longest=12)[0]
    sample = replace(sample, reward=1.0)
    losses = []
    for whole in (sample, joined([sample] * 3)):
        runner = make_runner(
            path,
            ranks,
            advantage=RewardAsAdvantage(),
            settings={"objective": {"name": "reinforce"}},
            normalizer=normalizer,
            budget_tokens=sample.num_tokens,  # each segment is in a micro-batch of its own
        )
        losses.append(runner.run([[whole]], step=7)["loss"])
    assert losses[1] == pytest.approx(losses[0] * (1 if normalizer == "seq_mean_token_mean" else 3), rel=1e-9)


LOGP = [[-0.8, -1.1, -0.6, -0.2], [-1.0, -1.9], [-0.4]]
BEHAVIOR_LOGP = [[-1.0, -2.0, -0.5, -0.3], [-0.7, -1.2], [-0.9]]
ADVANTAGES = [0.4, -0.1, -0.3]


def in_segments(batch: SampledTokens) -> SampledTokens:
    """The first sample as two segments, of which the second comes last in the micro-batch."""
    order = [0, 1, 4, 5, 6, 2, 3]
    tensors = {
        name: getattr(batch, name).detach()[order]
        for name in (
            "logp_S",
            "behavior_logp_S",
            "advantage_S",
            "entropy_S",
            "ref_logp_S",
            "lag_S",
            "version_S",
        )
    }
    rows = [0, 1, 2, 0]
    return replace(
        batch,
        **tensors | {"logp_S": tensors["logp_S"].requires_grad_()},
        prox_logp_S=tensors["logp_S"].detach(),
        segment_S=torch.tensor([0, 0, 1, 1, 2, 3, 3]),
        length_N=torch.tensor([2.0, 2.0, 1.0, 2.0], dtype=torch.float64),
        reward_N=batch.reward_N[rows],
        group_N=batch.group_N[rows],
        truncated_N=batch.truncated_N[rows],
        counts=DivisorCounts(
            num_masked_N=torch.zeros(4, dtype=torch.int64),
            sample_length_N=torch.tensor([4, 2, 1, 4]),
            num_samples_N=torch.tensor([1, 1, 1, 0]),
            sample_N=torch.tensor([0, 1, 2, 0]),
        ),
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "rebel"},
        {"name": "online_dpo", "pairs": "all"},
        {"name": "online_dpo"},
        {"name": "reinforce"},
    ],
    ids=str,
)
def test_a_sample_of_two_segments_is_like_one(settings: dict[str, Any], normalizer: str) -> None:
    """Pairs compare samples, and their number is that of samples, whatever the segments."""
    whole = tokens_of(LOGP, BEHAVIOR_LOGP, ADVANTAGES, rewards=[1.0, 0.5, 0.0])
    objective = build_objective(settings)
    loss, gradient = evaluate(objective, [whole], normalizer=normalizer)
    again, of_segments = evaluate(objective, [in_segments(whole)], normalizer=normalizer)
    assert again == pytest.approx(loss, rel=1e-12)
    assert of_segments == pytest.approx([gradient[i] for i in (0, 1, 4, 5, 6, 2, 3)], rel=1e-12)


def test_leaving_one_out_leaves_out_the_whole_sample() -> None:
    squares_N = torch.tensor([0.3, 0.7, 0.2, 0.6], dtype=torch.float64)
    returns_N = torch.tensor([1.0, -0.5, 0.25, 1.0], dtype=torch.float64)
    group_N, sample_N = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 0])
    got_N = optimal_baseline(squares_N, returns_N, group_N, leave_one_out=True, sample_N=sample_N)
    joined_M = torch.tensor([0.9, 0.7, 0.2], dtype=torch.float64)
    want_M = optimal_baseline(joined_M, returns_N[:3], group_N[:3], leave_one_out=True)
    assert torch.allclose(got_N, want_M[sample_N], rtol=1e-12)
    assert want_M[0] == pytest.approx((0.7 * -0.5 + 0.2 * 0.25) / 0.9), "without its own return"


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


def test_split_cuts_advantage_lag_and_arrays() -> None:
    (sample, *_), *_ = [[s for s in group if len(s) == 3] for group in pieces()]
    whole = joined(sample, arrays={"ids": np.arange(sum(t.num_tokens for t in sample)), "once": np.ones(2)})
    numbers_T = np.arange(whole.num_tokens)
    parts = split_sample(TrainingSample(trajectory=whole, advantage=numbers_T * 0.5, lag=numbers_T, group=4))
    assert [part.trajectory.num_tokens for part in parts] == [t.num_tokens for t in sample]
    for name in ("tokens", "loss_mask", "logprobs", "versions"):
        got = np.concatenate([getattr(part.trajectory, name) for part in parts])
        assert np.array_equal(got, getattr(whole, name))
    assert np.concatenate([part.lag for part in parts]).tolist() == numbers_T.tolist()
    assert np.concatenate([part.advantage for part in parts]).tolist() == (numbers_T * 0.5).tolist()
    assert np.concatenate([part.trajectory.arrays["ids"] for part in parts]).tolist() == numbers_T.tolist()
    assert all(part.trajectory.arrays["once"].tolist() == [1, 1] for part in parts)
    assert all(part.group == 4 and part.trajectory.reward == whole.reward for part in parts)
    batch = collate(parts)
    target_T = is_target(whole)
    assert batch.sampled_S.tolist() == np.flatnonzero(target_T).tolist()
    assert batch.positions_T.tolist() == [p for t in sample for p in range(t.num_tokens)]
    split = split_targets(numbers_T[target_T].astype(float), whole)
    assert np.array_equal(np.concatenate(split), numbers_T[target_T])
    assert [len(value_S) for value_S in split] == [num_targets(part.trajectory) for part in parts]


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


def test_whole_groups_count_all_segments() -> None:
    group = [joined(sample) for sample in pieces()[0]]
    samples = [
        part for t in group for part in split_sample(TrainingSample(trajectory=t, advantage=1.0, group=0))
    ]
    size = sum(t.num_tokens for t in group)
    packer = Packer(budget_tokens=size, whole_groups=True)
    assert [len(batch) for batch in packer.add(samples)] == [len(samples)]
    with pytest.raises(ConfigError, match=f"a group of {size} tokens"):
        Packer(budget_tokens=size - 1, whole_groups=True).add(samples)


def test_a_segment_may_fill_a_microbatch(path: str, ranks: Ranks) -> None:
    """A sample may be longer than a micro-batch; none of its segments is."""
    ((sample, *_), *_) = random_groups(1, longest=12)
    whole = joined([sample] * 5)
    runner = make_runner(path, ranks, budget_tokens=sample.num_tokens, advantage=RewardAsAdvantage())
    metrics = runner.run([[replace(whole, reward=1.0)]], step=7)
    assert metrics["num_microbatches"] == 5 and metrics["num_sequences"] == 1
