"""Objectives, masks, shaping and KL in `StepRunner`: with model, micro-batches, ranks, checkpoint state."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.config import Config, KlConfig, TrainerConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import Group
from areal_like.wire.records import Record
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import dense_logprobs, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import reshard
from trainer.metrics.lag import LagTally
from trainer.models.policy import Policy, build_policy
from trainer.objectives import OBJECTIVES
from trainer.step.build import build_step_runner

DIAGNOSTICS = (
    *(
        "ess_ratio",
        "log_w_mean",
        "log_w_std",
        "kl_k3",
        "clipped_fraction",
        "kept_fraction",
        "entropy",
        "grad_norm",
        "lr",
        "lr_scale",
    ),
    *("response_tokens", "prompt_tokens", "truncated_fraction"),
)
WHOLE_STEP: list[dict[str, Any]] = [
    {"objective": {"name": "m2po"}},
    {"objective": {"name": "oapl"}, "kl": {"coef": 0.3, "place": "loss"}},
    {"objective": {"name": "vcpo"}},
    {"objective": {"name": "tis", "masks": [{"name": "stapo", "max_prob": 0.03}]}},
    {"objective": {"name": "ppo"}, "advantage": {"name": "reinforce_pp", "baseline": "group"}},
    {
        "objective": {"name": "vespo"},
        "advantage": {"name": "gpg", "shaping": [{"name": "grpo_lambda", "top": 0.5}]},
    },
    {"objective": {"name": "reinforce"}, "kl": {"coef": 0.3, "estimator": "k3", "place": "reward"}},
    {
        "objective": {
            "name": "tis",
            "masks": [{"name": "kpop"}, {"name": "trust_region", "max_kl": 9.0, "mean_kl": 3.0}],
        }
    },
]
"""Settings that depend on all groups of a step or on whole groups, or run a second model."""
QUICK = 3
"""So many of them show one of each kind."""


def with_changed_prompt_logprobs(groups: list[list[Trajectory]]) -> list[list[Trajectory]]:
    """The same groups with other log-probs at every token that was not sampled."""

    def one(t: Trajectory) -> Trajectory:
        return replace(t, logprobs=np.where(t.loss_mask == 1, t.logprobs, -7.5).astype(np.float32))

    return [[one(t) for t in group] for group in groups]


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    difference = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    return float(difference / torch.stack([grad.norm() for grad in want.values()]).norm())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_cuts_do_not_change_any_objectives_gradient(path: str, ranks: Ranks, name: str) -> None:
    """Nor do shared prefixes or log-probs of tokens that were not sampled. The common diagnostics exist."""
    groups = random_groups(5, prompt=6)
    gradients = []
    changed = with_changed_prompt_logprobs(groups)
    for budget_tokens, data, shares in ((10_000, groups, False), (37, changed, True)):
        runner = make_runner(
            path, ranks, beta1=0.0, budget_tokens=budget_tokens, settings={"objective": {"name": name}}
        )
        runner._shares_prefixes &= shares
        metrics = runner.run(data, step=7)
        gradients.append(last_gradient(runner))
        assert all(np.isfinite(metrics[key]) for key in DIAGNOSTICS)
        assert 0 <= metrics["clipped_fraction"] <= 1 and 0 <= metrics["kept_fraction"] <= 1
    assert metrics["num_microbatches"] > 1
    assert relative_error(gradients[1], gradients[0]) < 1e-9 or metrics["grad_norm"] == 0


@pytest.mark.parametrize("cases", [WHOLE_STEP[:QUICK], *only_in_chaos(WHOLE_STEP[QUICK:])], ids=len)
def test_two_ranks_give_the_gradient_of_one(
    path: str, ranks: Ranks, tmp_path: Path, cases: list[dict[str, Any]]
) -> None:
    run_ranks("steps", str(tmp_path), path, json.dumps(cases), world_size=2)
    for index, settings in enumerate(cases):
        runner = make_runner(path, ranks, beta1=0.0, settings=settings, budget_tokens=10_000)
        runner.run(random_groups(8, prompt=6), step=7)
        for share in ("even", "one-sided", "balanced"):
            got = load_file(tmp_path / f"{index}-{share}.safetensors")
            assert relative_error(got, last_gradient(runner)) < 1e-9, (settings, share)


def test_kl_in_the_reward_changes_advantages(path: str, ranks: Ranks) -> None:
    groups = random_groups(4)
    settings = {
        "objective": {"name": "reinforce"},
        "advantage": {"name": "dr_grpo"},
        "kl": {"coef": 0.3, "estimator": "k1", "place": "reward"},
    }
    metrics = make_runner(path, ranks, settings=settings).run(groups, step=7)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    loss = total_reward = 0.0
    for group in groups:
        with torch.no_grad():
            ref_BL = dense_logprobs(model, group).numpy()
        logps = [ref_BL[i, : t.num_tokens][t.loss_mask == 1] for i, t in enumerate(group)]
        rewards = [
            t.reward - 0.3 * float((t.logprobs[t.loss_mask == 1] - logp).sum())
            for t, logp in zip(group, logps, strict=True)
        ]
        total_reward += sum(rewards)
        # The policy is still the reference, so its log-probs are too.
        loss -= sum((r - np.mean(rewards)) * logp.sum() for r, logp in zip(rewards, logps, strict=True))
    num_tokens = sum(t.num_sampled for group in groups for t in group)
    assert metrics["loss"] == pytest.approx(loss / num_tokens, rel=1e-6)
    assert metrics["shaped_reward"] == pytest.approx(total_reward / 12, rel=1e-6)
    assert metrics["reward"] == pytest.approx(np.mean([t.reward for group in groups for t in group])), (
        "the task's own reward"
    )


def test_entropy_carries_gradient_only_on_request(path: str) -> None:
    policy = Policy.load(path, Ranks.alone(), chunk_tokens=4, master_dtype=torch.float64)
    batch = collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in random_groups(1)[0]])
    assert not policy(batch).entropy_S.requires_grad
    policy.with_entropy_gradient = True
    policy(batch).entropy_S.sum().backward()
    params = [p for p in policy.parameters() if p.grad is not None]
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in params]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(params, direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=step)
            reshard(policy)
            values.append(policy(batch).entropy_S.sum().item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_entropy_bonus_and_kl_penalty_have_effect(tmp_path: Path, ranks: Ranks) -> None:
    """A bonus raises entropy; a penalty in the loss keeps the policy near its initial model."""
    path = write_model(tmp_path)
    groups = random_groups(4)

    def last(entropy_coef: float, kl_coef: float) -> dict[str, float]:
        trainer = TrainerConfig(lr=1e-3, warmup_steps=1, entropy_coef=entropy_coef)
        config = Config(trainer=trainer, kl=KlConfig(coef=kl_coef), objective={"name": "ppo"})
        runner = build_step_runner(config, build_policy(config, path, ranks), ranks, initial=path)
        return [runner.run(groups, step=step) for step in range(6)][-1]

    assert last(1.0, 0.0)["entropy"] > last(0.0, 0.0)["entropy"] + 1e-3
    strong, weak = last(0.0, 30.0), last(0.0, 1e-9)
    assert 0 < strong["kl_ref"] < 0.3 * weak["kl_ref"]


def test_a_penalty_without_a_reference_is_refused(path: str, ranks: Ranks) -> None:
    config = Config(kl=KlConfig(coef=0.1))
    with pytest.raises(ConfigError, match="reference model"):
        build_step_runner(config, build_policy(config, path, ranks), ranks)
    config = Config(kl=KlConfig(coef=0.1, place="reward"))
    with pytest.raises(ConfigError, match="reference model"):
        build_step_runner(config, build_policy(config, path, ranks), ranks)


def test_dual_variables_are_learned_and_restored(
    path: str, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    shaping = [{"name": "overlong"}, {"name": "laconic", "budget_tokens": 2, "rate": 0.1}]
    settings = {"advantage": {"name": "grpo", "shaping": shaping}}
    runner = make_runner(path, ranks, settings=settings)
    groups = random_groups(4)
    metrics = runner.run(groups, step=7)
    mean_tokens = np.mean([t.num_sampled for group in groups for t in group])
    assert (
        metrics["shaping_dual_1"] == pytest.approx(0.1 * (mean_tokens / 2 - 1))
        and "shaping_dual_0" not in metrics
    )
    assert runner.run(groups, step=8)["shaped_reward"] < metrics["shaped_reward"], (
        "the penalty applies from the next step on"
    )
    kept = json.loads(json.dumps(runner.rewards.duals))
    resumed = make_runner(path, ranks, settings=settings)
    resumed.rewards.restore(kept)
    assert resumed.rewards.duals == runner.rewards.duals != [0, 0]
    plain = make_runner(path, ranks)
    plain.rewards.restore(kept)
    assert plain.rewards.duals == [] and "differs from the checkpoint's" in caplog.text


def test_lag_of_each_token_of_a_sample() -> None:
    """The ledger gives the step of a sample's oldest version; each later version counts as one step newer."""
    (trajectory,) = random_groups(1, group_size=1, longest=3)[0]
    versions = np.full(trajectory.num_tokens, -1, dtype=np.int32)
    versions[1:] = [40, 42]
    spanning = replace(trajectory, loss_mask=(versions >= 0).astype(np.uint8), versions=versions)
    tally = LagTally(max_staleness=4)
    position = tally.counted(
        Group(
            step=10,
            position=0,
            ticket_id=1,
            prompt_index=0,
            records=[Record.of(1, 0, spanning)],
            version_steps=[7],
        )
    )
    assert position.lags[0].tolist() == [0, 3, 1]


def test_mismatch_counts_only_tokens_of_the_current_weights(path: str, ranks: Ranks) -> None:
    """All samples have version 5: the current weights at step 5, older weights at step 7."""
    groups = random_groups(3)
    at_five, at_seven = (
        make_runner(path, ranks, settings={"objective": {"name": "sapo"}}).run(groups, step=step)
        for step in (5, 7)
    )
    assert "mismatch_abs" not in at_seven
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    errors = []
    for group in groups:
        if len({t.reward for t in group}) > 1:  # the other groups are not run
            pi_BL = dense_logprobs(model, group).detach().numpy()
            errors += [
                abs(pi_BL[i, : t.num_tokens] - t.logprobs)[t.loss_mask == 1] for i, t in enumerate(group)
            ]
    assert at_five["mismatch_abs"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-6)
