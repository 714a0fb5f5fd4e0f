"""`advantage=prime`: its formulas by hand, and its reward model compared with the dense model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from tests.support.full_state import gather_full_state
from tests.support.second_model_ranks import PRIME as SETTINGS
from tests.support.trainer_helpers import (
    VOCAB,
    flattened,
    joined,
    random_groups,
    run_ranks,
    without_measured,
    write_model,
)
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.advantages.prime import Prime, cross_entropy
from trainer.batching.packing import is_target
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import IncompleteStepError, Ranks
from trainer.models.policy import build_policy
from trainer.step.build import build_step_runner
from trainer.step.recipe import StepRecipe
from trainer.step.runner import StepRunner

RANKS = "tests.support.second_model_ranks"


def test_the_papers_advantage_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.5])
    process = [np.array([0.2, 0.4]), np.array([-0.3]), np.array([0.1, 0.0, 0.2])]
    # Means .3 -.3 .1; baselines of the others -.1 .2 0; outcomes minus the others .75 -.75 0.
    got = Prime().of_group(rewards, process)
    for advantages_S, want in zip(
        got, ([0.8 + 0.75, 0.5 + 0.75], [-0.5 - 0.75], [0.3, 0.2, 0.2]), strict=True
    ):
        assert advantages_S.tolist() == pytest.approx(want)
    discounted = Prime(gamma=0.5, process=2.0).of_group(rewards, process)
    assert discounted[0].tolist() == pytest.approx([2 * (0.3 + 0.5 * 0.5) + 0.75, 2 * 0.5 + 0.75])


def test_without_process_rewards_it_is_rloo() -> None:
    rewards = np.array([0.1 + 0.2, 0.3, 1.0])
    process = [np.array([0.5, -1.0]), np.array([2.0]), np.array([0.0])]
    got = Prime(process=0.0).of_group(rewards, process)
    mean = rewards.mean()
    assert [a_S[0] for a_S in got] == pytest.approx([1.5 * (r - mean) for r in rewards])
    equal = Prime().of_group(np.array([0.1 + 0.2, 0.3]), [np.zeros(2), np.zeros(1)])
    assert [a_S.tolist() for a_S in equal] == [[0.0, 0.0], [0.0]]
    assert Prime().of_group(np.array([1.0]), [np.ones(2)])[0].tolist() == [0.0, 0.0]
    empty = Prime().of_group(np.array([1.0, 0.0]), [np.zeros(0), np.array([0.5])])
    assert len(empty[0]) == 0 and empty[1].tolist() == pytest.approx([0.5 - 1.0])


def test_the_cross_entropy_and_its_slope() -> None:
    logits, outcomes = np.array([0.0, 2.0, -800.0, 800.0]), np.array([1.0, 0.25, 1.0, 1.0])
    losses, slopes = cross_entropy(logits, outcomes)
    sigma = 1 / (1 + np.exp(-2.0))
    assert losses.tolist() == pytest.approx(
        [np.log(2), -0.25 * np.log(sigma) - 0.75 * np.log(1 - sigma), 800.0, 0.0]
    )
    assert slopes.tolist() == pytest.approx([-0.5, sigma - 0.25, -1.0, 0.0])


def runner_of(path: str, ranks: Ranks, **settings: Any) -> StepRunner:
    return make_runner(path, ranks, settings=SETTINGS, **settings)


def dense(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def test_rewards_and_the_update_match_the_dense_model(path: str, ranks: Ranks) -> None:
    """The second step, in which phi differs from ref; samples of several segments count as one."""
    runner = runner_of(path, ranks, beta1=0.0)
    assert runner.prm is not None
    runner.run(random_groups(4, seed=1), step=0)
    before = {name: tensor.clone() for name, tensor in gather_full_state(runner.prm.model)}
    groups = [
        [replace(t, reward=3.0 * t.reward - 1) for t in random_groups(1, seed=2)[0]],
        [joined(group) for group in random_groups(2, seed=3)],
    ]
    metrics = runner.run(groups, step=1)

    plain = [t for group in groups for t in group]
    phi, ref = dense(path), dense(path)
    phi.load_state_dict(before, strict=False)
    sums = []
    for t in plain:
        total = torch.zeros((), dtype=torch.float64)
        for part in t.segment_slices:
            tokens, wanted = torch.from_numpy(t.tokens[part])[None].long(), is_target(t)[part]
            logps = []
            for model in (phi, ref):
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
                picked = torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
                logps.append(picked[torch.from_numpy(wanted[1:])].sum())
            total = total + 0.5 * (logps[0] - logps[1].detach())
        sums.append(total)
    logits = torch.stack(sums)
    outcomes = torch.tensor([min(max(t.reward, 0.0), 1.0) for t in plain], dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes)
    assert metrics["prm_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["prm_reward_mean"] == pytest.approx(logits.mean().item(), rel=1e-5, abs=1e-8)
    clipped = np.mean([not 0 <= t.reward <= 1 for t in plain])
    assert metrics["prm_outcomes_clipped"] == pytest.approx(clipped) and clipped > 0
    loss.backward()
    gradient = last_gradient(runner.prm)
    wanted_by_name = {name: param.grad for name, param in phi.named_parameters() if param.grad is not None}
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-5
    for name, found in gradient.items():
        torch.testing.assert_close(found, wanted_by_name[name], rtol=1e-5, atol=1e-9, msg=name)


def test_the_first_steps_rewards_are_zero(path: str, ranks: Ranks) -> None:
    """phi is ref, so the advantages are RLOO's."""
    groups = random_groups(4)
    prime = runner_of(path, ranks)
    rloo = make_runner(path, ranks, settings={"advantage": {"name": "rloo"}})
    first, plain = prime.run(groups, step=0), rloo.run(groups, step=0)
    assert first["prm_loss"] == pytest.approx(np.log(2))
    # Both models' forwards are the same computation, but a CPU may round a log-prob otherwise in the second.
    assert first["prm_reward_mean"] == pytest.approx(0, abs=2 * np.spacing(np.log(VOCAB)))
    assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-9)
    assert prime.run(groups, step=1)["grad_norm"] != pytest.approx(rloo.run(groups, step=1)["grad_norm"])


def test_the_reward_model_learns_which_samples_are_right(path: str, ranks: Ranks) -> None:
    runner = runner_of(path, ranks)
    groups = random_groups(4, group_size=2, seed=5)
    rows = [runner.run(groups, step=step) for step in range(12)]
    assert rows[-1]["prm_loss"] < 0.5 * rows[0]["prm_loss"] and rows[-1]["prm_accuracy"] == 1


def test_an_abandoned_step_leaves_the_reward_model(path: str, ranks: Ranks) -> None:
    runner = runner_of(path, ranks)
    assert runner.prm is not None
    runner.run(random_groups(2), step=0)
    before = {name: tensor.clone() for name, tensor in gather_full_state(runner.prm.model)}
    with pytest.raises(IncompleteStepError):
        runner.run(random_groups(2, seed=1), step=1, num_groups=3)
    assert runner.prm.optimizer.num_updates == 1
    for name, tensor in gather_full_state(runner.prm.model):
        assert torch.equal(tensor, before[name]), name


def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    unbroken = runner_of(path, ranks, dtype=torch.float32)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=path)
    rows = []
    for step in range(4):
        rows.append(unbroken.run(random_groups(2, seed=step), step=step))
        if step == 1:
            checkpoints.save(2, ranks=ranks, extra=unbroken.state(), **unbroken.saved)
    checkpoints.wait()
    resumed = runner_of(path, ranks, dtype=torch.float32, has_weights=False)
    assert resumed.prm is not None and unbroken.prm is not None
    resumed.restore(checkpoints.load(2, ranks=ranks, **resumed.saved))
    for step in (2, 3):
        row = resumed.run(random_groups(2, seed=step), step=step)
        assert flattened(without_measured(row)) == flattened(without_measured(rows[step]))
    for (name, a), (_, b) in zip(
        gather_full_state(unbroken.prm.model), gather_full_state(resumed.prm.model), strict=True
    ):
        assert torch.equal(a, b), name
    assert (tmp_path / "checkpoints" / "step_000002" / "rows" / "prm-00000-of-00001.safetensors").exists()
    # A checkpoint of a run without it: it begins with the initial model.
    checkpoints.save(3, unbroken.policy, unbroken.optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.load(3, ranks=ranks, **resumed.saved)
    assert "without a reward model: it starts from its initial weights" in caplog.text
    checkpoints.close()


@pytest.mark.long
def test_cuts_and_ranks_change_nothing(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", "qwen2")
    run_ranks("gradients", str(tmp_path), path, "prm", world_size=2, module=RANKS)
    runner = runner_of(path, ranks, beta1=0.0, budget_tokens=1000)
    for step in range(2):
        metrics = runner.run(random_groups(8, seed=step), step=step)
    assert runner.prm is not None
    for share in ("even", "uneven", "one-sided"):
        for name, gradient in (("policy", last_gradient(runner)), ("prm", last_gradient(runner.prm))):
            got = load_file(tmp_path / f"{share}-{name}.safetensors")
            assert got.keys() == gradient.keys() and any(gradient[key].abs().max() > 1e-4 for key in gradient)
            for key in gradient:
                torch.testing.assert_close(
                    got[key], gradient[key], rtol=1e-7, atol=1e-9, msg=f"{share} {key}"
                )
        row = json.loads((tmp_path / f"{share}.json").read_text())
        for key in ("prm_loss", "prm_accuracy", "prm_reward_mean", "prm_grad_norm", "loss", "grad_norm"):
            assert row[key] == pytest.approx(metrics[key], rel=1e-7), (share, key)


@pytest.mark.long
def test_its_checkpoint_loads_at_any_world_size(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", "qwen2")
    runner = runner_of(path, ranks)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=path)
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
    checkpoints.save(2, ranks=ranks, extra={}, **runner.saved)
    checkpoints.wait()
    run_ranks("resume", str(tmp_path), path, "prm", world_size=2, module=RANKS)
    runner.run(random_groups(4, seed=2), step=2)
    again = runner_of(path, ranks)
    assert runner.prm is not None and again.prm is not None
    checkpoints.load(3, ranks=ranks, **again.saved)
    assert again.prm.optimizer.num_updates == runner.prm.optimizer.num_updates == 3
    for (name, a), (_, b) in zip(
        gather_full_state(runner.prm.model), gather_full_state(again.prm.model), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"model": {"lora": {"rank": 4}}}, r"model\.lora\.rank=4 does not go .* advantage\.name=prime"),
        ({"kl": {"coef": 0.1, "reference": "x"}}, r"kl\.reference=x does not go .* advantage\.name=prime"),
        ({"advantage": {"turn_discount": 0.5}}, r"advantage\.turn_discount=0\.5 does not go"),
        ({"sampling": {"group_size": 1}}, r"sampling\.group_size=1 does not go"),
        ({"buffer": {"overdue": "close"}}, r"advantage\.name=prime needs .* whole groups"),
        ({"advantage": {"beta": 0.0}}, "beta"),
        ({"advantage": {"gamma": 1.5}}, r"advantage\.gamma=1\.5"),
    ],
)
def test_refused_combinations(sections: dict[str, Any], keys: str) -> None:
    advantage = {"name": "prime", **sections.get("advantage", {})}
    with pytest.raises(ConfigError, match=keys):
        StepRecipe.of(from_mapping({**sections, "advantage": advantage}))


def test_the_configured_runner_has_a_reward_model(path: str, ranks: Ranks) -> None:
    config = from_mapping({"advantage": {"name": "prime"}, "trainer": {"lr": 1e-3, "warmup_steps": 1}})
    assert config.overdue == "wait"
    runner = build_step_runner(config, build_policy(config, path, ranks), ranks, initial=path)
    assert runner.prm is not None and runner.prm.optimizer.learning_rate(0) == 2e-3
    with pytest.raises(ConfigError, match="needs a reward model, and none was built"):
        build_step_runner(config, build_policy(config, path, ranks), ranks)
