"""The step: packed, cut and sharded gradients equal that of one padded batch; streaming, counts, metrics."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.config import Config, TrainerConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import dense_logprobs, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import DTYPES, SHARES, last_gradient, make_runner
from trainer.advantages import ADVANTAGES, Advantage, DrGrpo
from trainer.batching.packing import collate
from trainer.batching.scope import Scope
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import IncompleteStepError, Ranks
from trainer.models.policy import Policy, build_policy
from trainer.objectives import Need, Reinforce, SampledTokens, StepStats, TokenLosses
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner

MODELS = {"float64": "gpt2", "float32": "qwen3"}
"""RMSNorm always computes in float32, so the float64 test needs a model with LayerNorm."""


def padded_gradient(
    path: str, groups: list[list[Trajectory]], *, normalize: bool
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of sequence TIS, cap 2, token mean, by definition, on one padded float64 batch."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    trajectories = [t for group in groups for t in group]
    logp_BL = dense_logprobs(model, trajectories)
    mask_BL, behavior_logp_BL = torch.zeros_like(logp_BL), torch.zeros_like(logp_BL)
    for row, t in enumerate(trajectories):
        mask_BL[row, : t.num_tokens] = torch.from_numpy(t.loss_mask).double()
        behavior_logp_BL[row, : t.num_tokens] = torch.from_numpy(t.logprobs).double()
    advantages = []
    for group in groups:
        rewards = np.array([t.reward for t in group])
        advantages += list((rewards - rewards.mean()) / rewards.std() if rewards.std() > 0 else 0 * rewards)
    w_B = torch.exp(((logp_BL - behavior_logp_BL) * mask_BL).sum(1).detach()).clamp(max=2.0)
    if normalize:
        w_B = w_B / w_B.mean()
    loss = -(w_B * torch.tensor(advantages) * (logp_BL * mask_BL).sum(1)).sum() / mask_BL.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradient(got: dict[str, Tensor], want: dict[str, Tensor], *, relative: float) -> None:
    assert got.keys() == want.keys()
    for name, grad in got.items():
        error = (grad.double() - want[name]).norm() / want[name].norm()
        assert error < relative, f"{name}: relative error {error:.2e}"


@pytest.mark.long
def test_two_ranks_match_one_padded_batch(tmp_path: Path) -> None:
    paths = {dtype: write_model(tmp_path / dtype, MODELS[dtype]) for dtype in DTYPES}
    run_ranks("gradients", str(tmp_path), *paths.values(), world_size=2)
    for dtype, path in paths.items():
        tolerance = {"float64": 1e-9, "float32": 1e-5}[dtype]
        for normalize in (False, True):
            want_loss, want = padded_gradient(path, random_groups(8), normalize=normalize)
            for share in SHARES:
                name = f"{dtype}-{share}-{'normalized' if normalize else 'plain'}"
                metrics = json.loads((tmp_path / f"{name}.json").read_text())
                assert metrics["loss"] == pytest.approx(want_loss, rel=tolerance * 10)
                assert metrics["num_groups"] == 8 and metrics["zero_advantage_groups"] == 3
                assert metrics["num_microbatches"] > 2
                assert metrics["sample_metrics"] == {f"of_{g}": 1.0 for g in range(8)}
                assert metrics["reward_parts"] == {"half": metrics["reward"] / 2}
                assert metrics["by_label"]["even"]["num_samples"] == 12
                assert_same_gradient(load_file(tmp_path / f"{name}.safetensors"), want, relative=tolerance)


@pytest.mark.long
def test_ranks_wait_for_groups_and_abandon_together(tmp_path: Path) -> None:
    run_ranks("outage", str(tmp_path), write_model(tmp_path / "model"), world_size=2)


@pytest.mark.parametrize("budget_tokens", [12, 37, 10_000])
def test_any_token_budget_matches_one_padded_batch(tmp_path: Path, ranks: Ranks, budget_tokens: int) -> None:
    path = write_model(tmp_path, MODELS["float64"])
    groups = random_groups(5)
    want_loss, want = padded_gradient(path, groups, normalize=False)
    runner = make_runner(path, ranks, beta1=0.0, budget_tokens=budget_tokens)
    metrics = runner.run(groups, step=0)
    assert metrics["loss"] == pytest.approx(want_loss, rel=1e-9)
    norm = torch.stack([g.norm() for g in want.values()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert_same_gradient(last_gradient(runner), want, relative=1e-9)


def test_microbatches_run_while_later_groups_are_awaited(tmp_path: Path, ranks: Ranks) -> None:
    runner = make_runner(write_model(tmp_path), ranks, budget_tokens=12)
    forwards: list[int] = []
    runner.policy.register_forward_hook(lambda *_: forwards.append(1))
    seen = []

    def arriving() -> Iterator[list[Trajectory]]:
        for group in random_groups(6):
            seen.append(len(forwards))
            yield group

    runner.run(arriving(), step=0)
    assert seen[0] == 0 and seen[-1] > 0 and seen == sorted(seen)


@pytest.mark.parametrize("normalize", [False, True])
def test_an_abandoned_step_changes_nothing(tmp_path: Path, ranks: Ranks, normalize: bool) -> None:
    """Also with statistics of the whole step (`normalize`), and whatever the number of micro-batches run."""
    path, groups = write_model(tmp_path), random_groups(6)
    want = make_runner(path, ranks, normalize=normalize, budget_tokens=16)
    abandoned = make_runner(path, ranks, normalize=normalize, budget_tokens=16)
    metrics = [want.run(groups, step=step)["loss"] for step in range(2)]
    abandoned.run(groups, step=0)
    state = gather_full_state(abandoned.policy)
    num_microbatches = 0
    for limit in (0, 1, 3, 100):
        forwards: list[int] = []
        hook = abandoned.policy.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            if limit < 100:
                stack.enter_context(pytest.raises(IncompleteStepError, match="step 1 was abandoned"))
            loss = abandoned.run(
                groups, step=1, is_abandoned=lambda limit=limit, seen=forwards: len(seen) >= limit
            )["loss"]
        if limit < 100:
            assert len(forwards) == limit and abandoned.optimizer.num_updates == 1
            now = gather_full_state(abandoned.policy)
            assert all(torch.equal(a[1], b[1]) for a, b in zip(now, state, strict=True))
        num_microbatches = len(forwards)
    assert num_microbatches > 3 and loss == metrics[1]
    for (_, a), (_, b) in zip(
        gather_full_state(abandoned.policy), gather_full_state(want.policy), strict=True
    ):
        assert torch.equal(a, b)
    for name in want.optimizer.shards:
        ours, theirs = want.optimizer.moments(name), abandoned.optimizer.moments(name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_step_without_gradient_still_updates_momentum(tmp_path: Path, ranks: Ranks) -> None:
    runner = make_runner(write_model(tmp_path), ranks)
    runner.run(random_groups(4), step=0)
    before = dict(gather_full_state(runner.policy))
    metrics = runner.run(random_groups(1), step=1)
    assert (
        metrics["grad_norm"] == 0
        and metrics["zero_advantage_groups"] == 1
        and metrics["num_microbatches"] == 0
    )
    assert runner.optimizer.num_updates == 2
    assert any(not torch.equal(before[name], after) for name, after in gather_full_state(runner.policy))


def test_a_non_finite_gradient_leaves_the_weights(tmp_path: Path, ranks: Ranks) -> None:
    runner = make_runner(write_model(tmp_path), ranks, advantage=DrGrpo())
    before = gather_full_state(runner.policy)
    (group,) = random_groups(1, group_size=2)
    overflowing = [replace(t, reward=r) for t, r in zip(group, (-8e307, 8e307), strict=True)]
    metrics = runner.run([overflowing], step=0)
    assert not np.isfinite(metrics["grad_norm"]) and runner.optimizer.num_updates == 0
    assert all(torch.equal(a[1], b[1]) for a, b in zip(gather_full_state(runner.policy), before, strict=True))


def test_clipping_reports_the_norm_before_clipping(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path), random_groups(4)
    free = make_runner(path, ranks, beta1=0.0)
    norm = free.run(groups, step=0)["grad_norm"]
    clipped = make_runner(path, ranks, beta1=0.0, max_grad_norm=norm / 4)
    assert clipped.run(groups, step=0)["grad_norm"] == pytest.approx(norm, rel=1e-12)
    quarter = {name: grad / 4 for name, grad in last_gradient(free).items()}
    assert_same_gradient(last_gradient(clipped), quarter, relative=1e-9)


def test_configured_runner_learns_and_reports_metrics(tmp_path: Path, ranks: Ranks) -> None:
    """Trained on the same data in every step, the rewarded answers must become likelier."""
    path = write_model(tmp_path)
    config = Config(trainer=TrainerConfig(lr=1e-3, warmup_steps=2, tokens_per_microbatch=64))
    runner = build_step_runner(config, build_policy(config, path, ranks), ranks)
    groups = random_groups(4)
    good = collate(
        [
            TrainingSample(trajectory=t, advantage=1.0, group=0)
            for g in groups[1:3]
            for t in g
            if t.reward == 1
        ]
    )
    before = runner.policy(good).logprobs_S.sum().item()
    history = [runner.run(groups, step=step) for step in range(8)]
    assert runner.policy(good).logprobs_S.sum().item() > before + 1
    assert history[0]["lr"] == pytest.approx(5e-4) and history[1]["lr"] == pytest.approx(1e-3)
    first = history[0]
    assert first["num_sequences"] == 12 and first["num_groups"] == 4
    assert 0 < first["ess_ratio"] <= 1 and first["entropy"] > 0 and first["kl_k3"] >= 0
    assert first["response_tokens"] == pytest.approx(np.mean([t.num_sampled for g in groups for t in g]))
    phases = sum(first[name] for name in ("wait_s", "compute_s", "reduce_s", "update_s"))
    assert phases <= first["step_s"]


@dataclass(frozen=True, kw_only=True)
class Whitened(Advantage):
    """Whitens over the step: an advantage of scope BATCH."""

    scope = Scope.BATCH

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [t.reward for t in group]

    def rescale(
        self, *, advantages_S: NDArray[np.float64], groups_S: NDArray[np.int64]
    ) -> tuple[float, float]:
        assert len(advantages_S) == len(groups_S)
        return -float(advantages_S.mean()), 1 / float(advantages_S.std())


def test_batch_scope_advantage_sees_every_sampled_token(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path), random_groups(3)
    policy = Policy.load(path, ranks, master_dtype=torch.float64)
    runner = StepRunner(
        policy,
        ShardedAdamW(policy, ranks, lr=0.0),
        ranks,
        objective=Reinforce(),
        advantage=ADVANTAGES.build({"_target_": f"{__name__}.Whitened"}),
        normalizer=Normalizer(name="token_mean", max_tokens=10),
        budget_tokens=30,
    )
    trajectories = [t for group in groups for t in group]
    rewards_S = np.repeat([t.reward for t in trajectories], [t.num_sampled for t in trajectories])
    white_S = torch.from_numpy((rewards_S - rewards_S.mean()) / rewards_S.std())
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logps_BL = dense_logprobs(reference, trajectories)
    logp_S = torch.cat([logps_BL[i, : t.num_tokens][t.loss_mask == 1] for i, t in enumerate(trajectories)])
    assert runner.run(groups, step=0)["loss"] == pytest.approx(-(white_S * logp_S).mean().item(), rel=1e-9)


class ReadsEverything(Reinforce):
    """Checks every input that an objective may read, and scales the learning rate by the mean reward."""

    needs = frozenset({Need.REF, Need.PROX})
    whole_groups = True
    skips_zero_advantage = False

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        assert batch.prox_logp_S is not None and batch.ref_logp_S is not None
        assert (
            torch.equal(batch.prox_logp_S, batch.logp_S)
            and not batch.prox_logp_S.requires_grad
            and not batch.ref_logp_S.requires_grad
        )
        assert set(batch.group_N.bincount().tolist()) <= {0, 3}, "a group was split"
        return TokenLosses(
            loss_S=-batch.logp_S, means={"distance_to_ref": (batch.ref_logp_S - batch.logp_S.detach()).abs()}
        )

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        return {"rewards": batch.reward_N}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        return {"mean_reward": observed["rewards"].mean()}

    def lr_scale(self, stats: StepStats) -> float:
        return float(stats["mean_reward"])


def test_reference_inputs_and_lr_scale_of_an_objective(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path), random_groups(4)
    policy = Policy.load(path, ranks)
    runner = StepRunner(
        policy,
        ShardedAdamW(policy, ranks, lr=0.1),
        ranks,
        objective=ReadsEverything(),
        advantage=DrGrpo(),
        normalizer=Normalizer(name="token_mean", max_tokens=10),
        budget_tokens=60,
        reference=Policy.load(path, ranks),
    )
    metrics = [runner.run(groups, step=step) for step in range(2)]
    mean_reward = np.mean([t.reward for group in groups for t in group])
    assert metrics[0]["lr"] == pytest.approx(0.1 * mean_reward) and metrics[0]["num_microbatches"] > 1
    assert metrics[0]["distance_to_ref"] < 1e-6 < metrics[1]["distance_to_ref"]


class NeedsReference(Reinforce):
    needs = frozenset({Need.REF})


def test_a_missing_reference_model_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    policy = Policy.load(write_model(tmp_path), ranks)
    with pytest.raises(ConfigError, match="needs a reference model"):
        StepRunner(
            policy,
            ShardedAdamW(policy, ranks, lr=0.0),
            ranks,
            objective=NeedsReference(),
            advantage=Whitened(),
            normalizer=Normalizer(name="token_mean", max_tokens=10),
            budget_tokens=30,
        )
