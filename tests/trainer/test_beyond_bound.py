"""Tokens beyond the staleness bound: ages, masks like a prompt, whole lengths as divisors, cap, ratio."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.config import KlConfig
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import ClosedGroup, EarlyMember, Group
from areal_like.wire.records import Record
from tests.support.objective_helpers import tokens_of
from tests.support.part_groups import example_step, sampled_at, served
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import (
    dense_logprobs,
    flattened,
    joined,
    random_groups,
    random_trajectory,
    without_measured,
    write_model,
)
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.batching.packing import num_targets
from trainer.batching.positions import Position, as_context
from trainer.distributed.ranks import Ranks
from trainer.objectives import OBJECTIVES, build_objective
from trainer.objectives.base import Objective

STEP, BOUND = 8, 2
OF_PARTS = [name for name in OBJECTIVES.names() if name not in ("oapl", "rebel", "online_dpo", "sppo")]


def settings_of(name: str) -> dict[str, Any]:
    return {"name": name, "leave_one_out": True} if name == "vcpo" else {"name": name}


def parts_of(trajectories: Sequence[Trajectory], *, max_staleness: int = BOUND) -> Group:
    """Early samples of a closed group; its other two early members have rewards .3 and .9."""
    others = [
        EarlyMember(sample_index=50 + i, reward=reward, num_sampled=4, is_truncated=False)
        for i, reward in enumerate((0.3, 0.9))
    ]
    closed = ClosedGroup(ticket_id=3, prompt_index=0, begin_step=STEP - 4, early=others)
    records = [Record.of(3, index, t) for index, t in enumerate(trajectories)]
    return served(records, step=STEP, closed=[closed], max_staleness=max_staleness)


def dated(seed: int = 0) -> list[Trajectory]:
    """Samples of which one is wholly fresh, one begins beyond the bound and one is wholly beyond it; and one
    of three segments, of which the first is beyond the bound and the second begins beyond it."""
    rng = np.random.default_rng(seed)
    ages = ([STEP - 1], [STEP - 4, STEP - 3, STEP - 2, STEP], [STEP - 5])
    plain = [
        sampled_at(random_trajectory(rng, longest=12, reward=float(i % 2)), age) for i, age in enumerate(ages)
    ]
    pieces = [
        sampled_at(random_trajectory(rng, longest=9, reward=0.6), age)
        for age in ([STEP - 4], [STEP - 3, STEP - 1], [STEP])
    ]
    return [*plain, joined(pieces)]


# --- ages ---


@given(
    steps=st.lists(st.integers(0, 9), min_size=1, max_size=6).map(sorted),
    picks=st.lists(st.integers(-1, 5), min_size=1, max_size=12),
    max_staleness=st.integers(0, 9),
)
def test_ages_are_exact(steps: list[int], picks: list[int], max_staleness: int) -> None:
    """Also where versions and steps advance unequally, as after a restart or a failed push."""
    versions = [3 + 4 * k + k % 2 for k in range(len(steps))]
    of_token = [pick if 0 <= pick < len(steps) else -1 for pick in picks]
    of_token[-1] = max(of_token[-1], 0)
    (trajectory,) = random_groups(1, group_size=1)[0]
    mask = (np.array(of_token) >= 0).astype(np.uint8)
    trajectory = replace(
        trajectory,
        tokens=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        logprobs=np.zeros(len(mask), np.float32),
        versions=np.array([versions[k] if k >= 0 else -1 for k in of_token], dtype=np.int32),
    )
    group = served([Record.of(1, 0, trajectory)], step=9, begin_step=0, max_staleness=max_staleness)
    position = Position.of(replace(group, versions=versions, steps=steps))
    want = [9 - steps[k] if k >= 0 else 0 for k in of_token]
    assert position.lags[0].tolist() == want
    beyond_T = position.beyond(0)
    found = [False] * len(want) if beyond_T is None else beyond_T.tolist()
    assert found == [k >= 0 and lag > max_staleness for k, lag in zip(of_token, want, strict=True)]
    if beyond_T is not None:
        kept = as_context(trajectory, beyond_T)
        assert kept.loss_mask.tolist() == [
            int(k >= 0 and lag <= max_staleness) for k, lag in zip(of_token, want, strict=True)
        ]
        assert np.array_equal(kept.tokens, trajectory.tokens)


def test_a_version_without_a_step_is_an_error() -> None:
    group = parts_of(dated())
    with pytest.raises(AssertionError, match="a token has a version whose step"):
        Position.of(replace(group, versions=group.versions[:-1], steps=group.steps[:-1]))


# --- masked tokens ---


def perturbed(trajectory: Trajectory, position: Position, index: int) -> Trajectory:
    """The trajectory with other recorded log-probs and versions of another age at tokens beyond the bound."""
    beyond_T = position.beyond(index)
    if beyond_T is None:
        return trajectory
    oldest = int(trajectory.versions[beyond_T].min())
    return replace(
        trajectory,
        logprobs=np.where(beyond_T, -9.0, trajectory.logprobs).astype(np.float32),
        versions=np.where(beyond_T, oldest, trajectory.versions).astype(np.int32),
    )


@pytest.mark.parametrize("name", OF_PARTS)
def test_masked_tokens_have_no_influence(path: str, ranks: Ranks, name: str) -> None:
    """Their log-probs and ages change neither the gradient nor a statistic of the objective, in any bit."""
    group = parts_of(dated())
    position = Position.of(group)
    changed = parts_of([perturbed(t, position, i) for i, t in enumerate(group.trajectories)])
    results = []
    for each in (group, changed):
        runner = make_runner(path, ranks, beta1=0.0, settings={"objective": settings_of(name)}, beyond="mask")
        metrics = runner.run_served([each], step=STEP, num_groups=1, max_staleness=BOUND)
        assert metrics["masked_share"] > 0.2 and metrics["lag_max"] <= BOUND
        results.append((flattened(without_measured(metrics)), last_gradient(runner)))
    (metrics, gradient), (again, other) = results
    assert metrics == again
    assert all(torch.equal(gradient[key], other[key]) for key in gradient)


@pytest.mark.parametrize("name", OF_PARTS)
def test_masked_tokens_are_like_a_prompt(path: str, ranks: Ranks, name: str) -> None:
    """With a divisor that does not depend on lengths: the same gradient as if they had never been sampled."""
    group = parts_of(dated()[:3])
    position = Position.of(group)
    as_prompt = [
        t if (beyond_T := position.beyond(i)) is None else as_context(t, beyond_T)
        for i, t in enumerate(group.trajectories)
    ]
    gradients = []
    # The third has no token within the bound: as a prompt it would not be a sample at all.
    for trajectories in (group.trajectories[:2], as_prompt[:2]):
        settings = settings_of(name) | ({"normalizer": "constant"} if name == "vcpo" else {})
        runner = make_runner(
            path, ranks, beta1=0.0, settings={"objective": settings}, beyond="mask", normalizer="constant"
        )
        runner.run_served([parts_of(trajectories)], step=STEP, num_groups=1, max_staleness=BOUND)
        gradients.append(last_gradient(runner))
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert any(bool(gradient.any()) for gradient in gradients[0].values())


@pytest.mark.parametrize(
    "normalizer", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
)
@pytest.mark.parametrize("balances", [False, True])
def test_divisors_keep_the_whole_length(path: str, ranks: Ranks, normalizer: str, balances: bool) -> None:
    """The loss by definition: sums over trained tokens, divided by lengths, tokens and samples as if nothing
    were masked; a sample of three segments and a wholly masked one are one sample each."""
    group = parts_of(dated())
    position, trajectories = Position.of(group), group.trajectories
    runner = make_runner(
        path,
        ranks,
        settings={"objective": {"name": "reinforce"}, "advantage": {"name": "dr_grpo"}},
        beyond="mask",
        normalizer=normalizer,
        balances=balances,
    )
    metrics = runner.run_served([group], step=STEP, num_groups=1, max_staleness=BOUND)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    sums, lengths = [], []
    for index, trajectory in enumerate(trajectories):
        beyond_T = position.beyond(index)
        trained_T = np.ones(trajectory.num_tokens, bool) if beyond_T is None else ~beyond_T
        total = 0.0
        for part in trajectory.segment_slices:
            piece = replace(
                trajectory,
                tokens=trajectory.tokens[part].copy(),
                loss_mask=trajectory.loss_mask[part],
                logprobs=trajectory.logprobs[part],
                versions=trajectory.versions[part],
                segments=(),
            )
            (logp_T,) = dense_logprobs(model, [piece]).detach().numpy()
            total += float(logp_T[(piece.loss_mask == 1) & trained_T[part]].sum())
        baseline = (0.3 + 0.9) / 2  # before the first step no running mean is known
        sums.append(-(trajectory.reward - baseline) * total)
        lengths.append(num_targets(trajectory))
    assert sums[2] == 0 and lengths[2] > 0
    want = {
        "token_mean": sum(sums) / sum(lengths),
        "seq_mean_token_mean": sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums),
        "seq_mean_token_sum": sum(sums) / len(sums),
        "constant": sum(sums) / (len(sums) * 10),
    }[normalizer]
    assert metrics["loss"] == pytest.approx(want, rel=1e-9)
    assert metrics["num_sequences"] == 4 and metrics["num_groups"] == 1


@pytest.mark.parametrize("beyond", ["mask", *only_in_chaos("cap"), "ratio"])
@pytest.mark.parametrize(
    "objective",
    [{"name": "tis", "masks": [{"name": "opsm"}, {"name": "stapo", "max_prob": 0.03}]}, {"name": "ppo"}],
    ids=lambda settings: str(settings["name"]),
)
def test_a_sample_that_is_cut_is_trained_on_alike(
    path: str, ranks: Ranks, beyond: str, objective: dict[str, Any]
) -> None:
    """Samples that are too long for a micro-batch, with masks, tokens beyond the bound, KL and entropy."""
    rng = np.random.default_rng(4)
    samples = [
        joined(
            [
                sampled_at(random_trajectory(rng, longest=9, reward=0.2 * i), age)
                for age in ([STEP - 4], [STEP - 3, STEP - 1], [STEP])
            ]
        )
        for i in range(3)
    ]
    found = []
    for budget_tokens in (200, 9):
        runner = make_runner(
            path,
            ranks,
            beta1=0.0,
            settings={"objective": objective, "kl": {"coef": 0.1, "place": "loss"}},
            budget_tokens=budget_tokens,
            beyond=beyond,
            entropy_coef=0.05,
        )
        runs: list[bool] = []
        runner.policy.register_forward_hook(lambda *_, runs=runs: runs.append(torch.is_grad_enabled()))
        metrics = runner.run_served([parts_of(samples)], step=STEP, num_groups=1, max_staleness=BOUND)
        found.append((last_gradient(runner), flattened(without_measured(metrics))))
        assert runs.count(True) == metrics["num_microbatches"]
    assert runs.count(False) >= 4, "parts of two samples at least, without gradient"
    (want, of_whole), (got, of_parts) = found
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= 1e-9 * float(value.norm()), name
    for name in of_whole.keys() - {"num_microbatches", "shared_share"}:
        assert of_parts[name] == pytest.approx(of_whole[name], rel=1e-9, abs=1e-12), name


def test_the_metrics_of_a_step_by_hand(path: str, ranks: Ranks) -> None:
    """Three early parts and a late one of two groups, of which one had a single early member."""
    fresh, partly, wholly, branched = dated()
    records = [
        Record.of(3, 0, fresh),
        Record.of(3, 1, partly),
        Record.of(5, 0, wholly),
        Record.of(5, 1, branched),
    ]
    closed = [
        ClosedGroup(
            ticket_id=ticket_id,
            prompt_index=0,
            begin_step=STEP - 4,
            early=[
                EarlyMember(
                    sample_index=index, reward=t.reward, num_sampled=t.num_sampled, is_truncated=False
                )
                for index, t in early
            ],
        )
        for ticket_id, early in ((3, [(0, fresh), (1, partly)]), (5, [(0, wholly)]))
    ]
    runner = make_runner(path, ranks, settings={"advantage": {"name": "dr_grpo"}}, beyond="mask")
    metrics = runner.run_served(
        [served(records, step=STEP, closed=closed, max_staleness=BOUND)],
        step=STEP,
        num_groups=1,
        max_staleness=BOUND,
    )
    ends = [0, *np.cumsum(branched.segments)]
    num_branched = sum(int((branched.loss_mask[a:b] == 1).sum()) for a, b in pairwise(ends))
    assert num_branched == num_targets(branched)
    num_beyond = [0, 2, wholly.num_sampled, int(branched.loss_mask[: ends[1]].sum()) + 1]
    lengths = [t.num_sampled for t in (fresh, partly, wholly, branched)]
    assert metrics["beyond_share"] == metrics["masked_share"] == pytest.approx(sum(num_beyond) / sum(lengths))
    assert metrics["beyond_share_first"] == 0.75
    advantages = [0.0 - 1.0, 1.0 - 0.0, 0.0, 0.6 - 0.0]  # of the other early member; the third has none
    want = sum(a * n for a, n in zip(advantages, num_beyond, strict=True)) / sum(num_beyond)
    assert metrics["beyond_advantage"] == pytest.approx(want)
    assert metrics["late_share"] == 0.25 and metrics["late_without_baseline"] == 0
    assert metrics["late_reward_gap"] == pytest.approx((0 + 1 + 0) / 3 - 0.6)
    assert metrics["early_members"] == 1.5
    # The trained lags: 1; 2 (the third token on); none; 1.
    assert metrics["lag_histogram"] == {"0": 0, "1": 2, "2": 1} and metrics["lag_max"] == 2
    by_length = sorted(zip(lengths, range(4), strict=True))
    for quartile, (length, index) in enumerate(by_length):
        assert metrics[f"beyond_share_q{quartile + 1}"] == pytest.approx(num_beyond[index] / length)


def test_nothing_changes_without_tokens_beyond_the_bound(path: str, ranks: Ranks) -> None:
    """A job without `close` computes the same bits whether the message has exact steps or not."""
    results = []
    for max_staleness in (-1, 4):
        runner = make_runner(path, ranks, beta1=0.0)
        groups = [
            replace(
                served(
                    [Record.of(g, i, sampled_at(t, [STEP - g])) for i, t in enumerate(group)],
                    step=STEP,
                    position=g,
                    max_staleness=max_staleness,
                ),
                begin_step=-1,
            )
            for g, group in enumerate(random_groups(3))
        ]
        metrics = runner.run_served(groups, step=STEP, num_groups=3, max_staleness=4)
        results.append((json.dumps(without_measured(metrics)), last_gradient(runner)))
    assert results[0][0] == results[1][0] and "masked_share" not in results[0][0]
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])
    assert "reward_history" not in runner.state()


# --- cap and ratio ---

LOGP = [[-0.4, -2.0, -0.5, -1.0], [-0.7, -1.2, -3.0]]
BEHAVIOR = [[-2.4, -1.0, -0.6, -1.0], [-0.7, -2.9, -1.2]]
BEYOND = torch.tensor([True, True, True, False, False, True, True])


def slopes(objective: Objective, *, beyond: Tensor | None, advantages: tuple[float, float]) -> Tensor:
    """[S] derivative of each token's loss by its log-prob."""
    batch = replace(tokens_of(LOGP, BEHAVIOR, advantages), beyond_S=beyond)
    with torch.no_grad():
        stats = objective.summarize({k: v.double() for k, v in objective.observe(batch).items()})
    loss_S = objective.losses(batch, stats).loss_S
    return torch.autograd.grad(loss_S.sum(), batch.logp_S)[0]


@pytest.mark.parametrize("advantages", [(1.5, -0.5), (-1.0, 2.0)])
@pytest.mark.parametrize("name", OF_PARTS)
def test_a_capped_token_has_a_weight_of_at_most_one(name: str, advantages: tuple[float, float]) -> None:
    plain = build_objective(settings_of(name), takes_parts=True)
    capped = build_objective(settings_of(name), takes_parts=True, caps_beyond=True)
    free_S = slopes(plain, beyond=None, advantages=advantages)
    assert torch.equal(slopes(capped, beyond=None, advantages=advantages), free_S)
    got_S = slopes(capped, beyond=BEYOND, advantages=advantages)
    size_S = torch.tensor(advantages, dtype=torch.float64)[torch.tensor([0, 0, 0, 0, 1, 1, 1])].abs()
    assert torch.equal(got_S[~BEYOND], free_S[~BEYOND])
    want_S = free_S.clamp(min=-size_S, max=size_S)
    assert torch.allclose(got_S[BEYOND], want_S[BEYOND], rtol=1e-12, atol=0)


def test_the_cap_leaves_other_terms_alone() -> None:
    """A KL penalty in the loss pulls a capped token as it pulls the others."""
    kl = KlConfig(coef=10.0, place="loss", estimator="k2")
    without, with_kl = (
        build_objective(
            {"name": "tis", "level": "token", "cap": 9.0}, kl=each, takes_parts=True, caps_beyond=True
        )
        for each in (None, kl)
    )
    slope_S = slopes(with_kl, beyond=BEYOND, advantages=(1.0, 1.0)) - slopes(
        without, beyond=BEYOND, advantages=(1.0, 1.0)
    )
    logp_S, ref_S = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (LOGP, BEHAVIOR)
    )
    assert torch.allclose(slope_S, 10.0 * (logp_S - ref_S), rtol=1e-9)


@pytest.mark.parametrize("name", ["reinforce", "tis", "gspo", "vespo", "vcpo", "m2po"])
def test_ratio_masks_only_what_is_old_and_has_moved(path: str, ranks: Ranks, name: str) -> None:
    """The same gradient and ESS as if just those tokens were beyond the bound and masked."""
    trajectories = [t for t in dated(seed=1) if not t.segments]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logps_BL = dense_logprobs(model, trajectories).detach().numpy()
    rng = np.random.default_rng(0)
    near, marked = [], []
    for index, (row, t) in enumerate(zip(logps_BL, trajectories, strict=True)):
        # All tokens of the last sample have moved, so nothing of it is left.
        shift_T = rng.choice([-1.2, 0.9] if index == 2 else [-1.2, -0.3, 0.4, 0.9], size=t.num_tokens)
        logprobs = np.where(t.loss_mask == 1, np.minimum(row[: t.num_tokens] + shift_T, 0), 0).astype(
            np.float32
        )
        near.append(replace(t, logprobs=logprobs))
    group = parts_of(near)
    position = Position.of(group)
    num_marked = 0
    for index, (row, t) in enumerate(zip(logps_BL, near, strict=True)):
        beyond_T = position.beyond(index)
        extreme_T = np.abs(row[: t.num_tokens] - t.logprobs) > np.log(2)
        moved_T = np.zeros(t.num_tokens, bool) if beyond_T is None else beyond_T & extreme_T
        num_marked += int(moved_T.sum())
        fresh = np.where(t.loss_mask == 1, max(group.versions), -1)
        marked.append(replace(t, versions=np.where(moved_T, min(group.versions), fresh).astype(np.int32)))
    assert 0 < num_marked < sum(int(b.sum()) for i in range(3) if (b := position.beyond(i)) is not None)
    results = []
    for each, beyond in ((group, "ratio"), (parts_of(marked), "mask")):
        runner = make_runner(path, ranks, beta1=0.0, settings={"objective": settings_of(name)}, beyond=beyond)
        metrics = runner.run_served([each], step=STEP, num_groups=1, max_staleness=BOUND)
        results.append((metrics, last_gradient(runner)))
    (of_ratio, gradient), (of_mask, want) = results
    for key in ("masked_share", "loss", "ess_ratio", "ess_ratio_token", "lr_scale", "entropy"):
        assert of_ratio[key] == pytest.approx(of_mask[key], rel=1e-9), key
    for key, value in want.items():
        assert float((gradient[key] - value).norm()) <= 1e-9 * float(value.norm()) + 1e-15, key
    assert of_ratio["beyond_log_ratio_abs"] > 0 and 0 < of_ratio["beyond_ess_ratio"] < 1


def test_the_critic_does_not_learn_from_masked_tokens(path: str, ranks: Ranks) -> None:
    """Its targets are the trained tokens; advantages are computed from the values of all sampled ones."""
    runner = make_runner(path, ranks, settings={"advantage": {"name": "gae"}}, beyond="mask")
    group = parts_of(dated())
    position = Position.of(group)
    learned: list[int] = []
    assert runner.critic is not None
    learn = runner.critic.learn

    def recorded(targets: Any, *, step: int) -> dict[str, float]:
        learned.extend(len(target.targets_S) for target in targets)
        assert all(num_targets(t.trajectory) == len(t.targets_S) == len(t.values_S) for t in targets)
        return learn(targets, step=step)

    runner.critic.learn = recorded  # type: ignore[method-assign]
    metrics = runner.run_served([group], step=STEP, num_groups=1, max_staleness=BOUND)
    kept = [
        num_targets(t) if (b := position.beyond(i)) is None else num_targets(as_context(t, b))
        for i, t in enumerate(group.trajectories)
    ]
    assert sum(learned) == sum(kept) < sum(map(num_targets, group.trajectories))
    assert np.isfinite(metrics["value_loss"])


def test_an_example_step_trains_with_every_estimator(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path)
    for advantage in ("grpo", "dr_grpo", "rloo", "opo", "gpg", "reinforce_pp", "running", "gae"):
        runner = make_runner(path, ranks, settings={"advantage": {"name": advantage}}, beyond="mask")
        for step in (4, 5):
            metrics = runner.run_served(example_step(step), step=step, num_groups=4, max_staleness=BOUND)
            assert metrics["grad_norm"] > 0 and metrics["lag_max"] <= BOUND, advantage
