"""Decoupled PPO around a snapshot or an average of the policy: what it follows, its loss, its state."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.config import Config, ModelConfig
from areal_like.errors import ConfigError
from tests.support.full_state import gather_full_state
from tests.support.objective_helpers import evaluate, tokens_of
from tests.support.trainer_helpers import dense_logprobs, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, shards_of
from trainer.models.policy import build_policy
from trainer.objectives import build_objective
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner

AVERAGE = {"objective": {"name": "decoupled_ppo", "prox": "average", "decay": 0.5}}
SNAPSHOT = {"objective": {"name": "decoupled_ppo", "prox": "snapshot", "interval": 2}}


def weights_of(runner: StepRunner) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the policy's weights and of the proximal policy's."""
    assert runner.proximal is not None
    return tuple(  # type: ignore[return-value]
        {name: tensor.clone() for name, tensor in gather(shards_of(model))}
        for model in (runner.policy, runner.proximal.model)
    )


def test_average_is_the_weighted_mean_of_all_weights(tmp_path: Path, ranks: Ranks) -> None:
    """At decay 1/2 after two steps: (theta_0 / 4 + theta_1 / 2 + theta_2) / 1.75."""
    runner = make_runner(write_model(tmp_path), ranks, settings=AVERAGE)
    thetas = [weights_of(runner)[0]]
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
        theta, average = weights_of(runner)
        thetas.append(theta)
    moved = 0.0
    for name, value in average.items():
        want = (thetas[0][name] / 4 + thetas[1][name] / 2 + thetas[2][name]) / 1.75
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
        moved = max(moved, float((value - theta[name]).abs().max()))
    assert moved > 1e-3


def test_snapshot_is_replaced_at_its_interval(tmp_path: Path, ranks: Ranks) -> None:
    runner = make_runner(write_model(tmp_path), ranks, settings=SNAPSHOT)
    initial = last = weights_of(runner)[0]
    for step in range(4):
        runner.run(random_groups(4, seed=step), step=step)
        theta, snapshot = weights_of(runner)
        if step % 2 == 1:
            last = theta
        assert all(torch.equal(value, last[name]) for name, value in snapshot.items()), step
    assert any(not torch.equal(value, initial[name]) for name, value in last.items())


def test_loss_is_that_of_the_lagging_weights(tmp_path: Path, ranks: Ranks) -> None:
    """The metrics of the second step equal the objective's on dense log-probs of both models."""
    path = write_model(tmp_path / "model")
    settings = {"objective": {"name": "decoupled_ppo", "prox": "snapshot", "interval": 9}}
    runner = make_runner(path, ranks, settings={**settings, "advantage": {"name": "dr_grpo"}})
    runner.run(random_groups(4, seed=0), step=0)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    moved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    moved.load_state_dict(dict(gather_full_state(runner.policy)), strict=False)
    groups = random_groups(4, seed=1)
    metrics = runner.run(groups, step=1)
    objective = build_objective(settings["objective"])
    loss, num_tokens = 0.0, 0
    rows = []
    for group in groups:
        with torch.no_grad():
            pi_BL, prox_BL = (dense_logprobs(model, group) for model in (moved, dense))
        mean = sum(t.reward for t in group) / len(group)
        logp, prox, behavior = (
            [
                [float(x) for x, m in zip(row, t.loss_mask, strict=False) if m]
                for row, t in zip(rows_BL, group, strict=True)
            ]
            for rows_BL in (pi_BL, prox_BL, [torch.from_numpy(t.logprobs) for t in group])
        )
        advantages = [t.reward - mean for t in group]
        of_group, _ = evaluate(objective, [tokens_of(logp, behavior, advantages, prox_logp=prox)])
        num = sum(len(row) for row in logp)
        loss, num_tokens = loss + of_group * num, num_tokens + num
        rows += [
            abs(a - b) for one, other in zip(logp, prox, strict=True) for a, b in zip(one, other, strict=True)
        ]
    assert max(rows) > 0.01, "the policy has moved away from the snapshot"
    assert metrics["loss"] == pytest.approx(loss / num_tokens, rel=1e-6)


@pytest.mark.parametrize("settings", [AVERAGE, SNAPSHOT], ids=["average", "snapshot"])
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, ranks: Ranks, settings: dict[str, dict[str, object]], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    unbroken = make_runner(path, ranks, dtype=torch.float32, settings=settings)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    for step in range(5):
        unbroken.run(random_groups(4, seed=step), step=step)
        if step == 2:
            saved = checkpoints.save(
                3, unbroken.policy, unbroken.optimizer, ranks, proximal=unbroken.proximal, extra={}
            )
    checkpoints.wait()
    resumed = make_runner(path, ranks, dtype=torch.float32, settings=settings)
    checkpoints.load(3, resumed.policy, resumed.optimizer, ranks, proximal=resumed.proximal)
    for step in (3, 4):
        resumed.run(random_groups(4, seed=step), step=step)
    for a, b in zip(weights_of(unbroken), weights_of(resumed), strict=True):
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    rows = load_file(saved / "rows" / "proximal-00000-of-00001.safetensors")
    assert {name.split(".")[0] for name in rows} == {"master"}, "no moments are stored for it"

    # A checkpoint without one: the proximal policy starts from the policy of the checkpoint.
    plain = make_runner(path, ranks, dtype=torch.float32)
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoints.save(7, unbroken.policy, plain.optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.load(7, resumed.policy, resumed.optimizer, ranks, proximal=resumed.proximal)
    theta, copy = weights_of(resumed)
    assert all(torch.equal(value, theta[name]) for name, value in copy.items())
    assert "without a proximal policy" in caplog.text
    checkpoints.close()


def test_two_ranks_follow_as_one(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    run_ranks(
        "lagging", str(tmp_path), path, json.dumps(AVERAGE), world_size=2, module="tests.support.method_ranks"
    )
    runner = make_runner(path, ranks, settings=AVERAGE)
    losses = [runner.run(random_groups(4, seed=step), step=step)["loss"] for step in range(3)]
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-9)
    got = load_file(tmp_path / "proximal.safetensors")
    for name, value in weights_of(runner)[1].items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9)


def test_a_configured_job_builds_the_copy(tmp_path: Path, ranks: Ranks) -> None:
    """In bfloat16 too, the copy has float32 masters; without the model's files there is an error."""
    path = write_model(tmp_path, dtype=torch.float32)
    config = Config(
        model=ModelConfig(dtype="bfloat16"), objective={**AVERAGE["objective"], "masks": [{"name": "kpop"}]}
    )
    policy = build_policy(config, path, ranks)
    runner = build_step_runner(config, policy, ranks, initial=path)
    assert runner.proximal is not None
    assert {shard.dtype for shard in runner.proximal.shards.values()} == {torch.float32}
    metrics = [runner.run(random_groups(4, seed=step), step=step) for step in range(2)]
    assert all(row["grad_norm"] > 0 for row in metrics) and runner.proximal.num_updates == 2
    with pytest.raises(ConfigError, match="needs a proximal policy"):
        build_step_runner(config, policy, ranks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prox": "old"}, "interpolated, snapshot, average"),
        ({"interval": 0}, "interval"),
        ({"decay": 1.0}, "decay"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective({"name": "decoupled_ppo", **settings})
