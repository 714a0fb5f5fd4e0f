"""GAE compared with its definition; the critic with a dense model, cuts, ranks, checkpoints and a task."""

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.config import Config, SamplingConfig, TrainerConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.runtime.metrics import Metrics
from areal_like.trajectory import Trajectory
from benchmarks.staleness_cell import Sampler
from tests.support.full_state import gather_full_state
from tests.support.second_model_ranks import CRITIC as SETTINGS
from tests.support.trainer_helpers import random_groups, run_ranks, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.advantages import ADVANTAGES, FloatArray
from trainer.advantages.critic import Critic, value_loss
from trainer.advantages.gae import Gae, gae
from trainer.batching.positions import Position
from trainer.batching.segments import trained_segments
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.metrics.prometheus import TrainerSeries
from trainer.models.policy import build_policy
from trainer.models.tiny import build_tiny_model
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner

RANKS = "tests.support.second_model_ranks"

PLAIN = {"advantage": {"name": "gae"}}


# --- the recursion ---


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.97, 0.0), (1.0, 0.95)])
def test_gae_recursion_equals_its_sum(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 9):
        rewards_S, values_S = rng.standard_normal(length), rng.standard_normal(length)
        after_S = [*values_S[1:], 0.0]
        deltas = [r + gamma * w - v for r, v, w in zip(rewards_S, values_S, after_S, strict=True)]
        sums = [sum((gamma * lam) ** (k - s) * deltas[k] for k in range(s, length)) for s in range(length)]
        (got_S,) = gae([rewards_S], [values_S], gammas=[gamma], lam=lam)
        assert got_S.tolist() == pytest.approx(sums, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_samples_have_the_same_bits_alone_and_together(lam: float) -> None:
    """Of many lengths, with a discount for each token: as by the recursion, token by token."""
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(1, 400, 60).tolist(), 0, 1, 100, 2000]
    rewards, values = ([rng.standard_normal(n) for n in lengths] for _ in range(2))
    discounts = [rng.choice([0.0, 0.5, 1.0], n, p=[0.02, 0.08, 0.9]) for n in lengths]
    estimator = Gae(gamma=0.99, lam=lam, lam_critic=0.5)
    together = estimator.of_samples(rewards, values, discounts=discounts)
    for rewards_S, values_S, discounts_S, (advantages_S, targets_S) in zip(
        rewards, values, discounts, together, strict=True
    ):
        (alone,) = estimator.of_samples([rewards_S], [values_S], discounts=[discounts_S])
        running, next_value, want = 0.0, 0.0, []
        for reward, value, discount in zip(
            reversed(rewards_S), reversed(values_S), reversed(discounts_S), strict=True
        ):
            gamma = 0.99 * discount
            running = (reward + gamma * next_value - value) + gamma * lam * running
            next_value = value
            want.append(running)
        assert advantages_S.tolist() == alone[0].tolist() == want[::-1]
        assert targets_S.tolist() == alone[1].tolist()


def test_lambda_one_gives_return_minus_value() -> None:
    rewards_S, values_S = np.array([-0.1, 0.0, -0.2, 1.0]), np.array([0.3, 0.1, 0.9, 0.4])
    returns_S = np.array([0.7, 0.8, 0.8, 1.0])
    estimator = Gae(lam=1.0)
    ((advantages_S, targets_S),) = estimator.of_samples([rewards_S], [values_S], discounts=[1.0])
    assert advantages_S.tolist() == pytest.approx((returns_S - values_S).tolist())
    assert targets_S.tolist() == pytest.approx(returns_S.tolist())


def test_policy_and_critic_have_their_own_lambda() -> None:
    rewards_S, values_S = np.array([0.0, 1.0]), np.array([0.5, 0.25])
    ((advantages_S, targets_S),) = Gae(lam=0.0).of_samples([rewards_S], [values_S], discounts=[1.0])
    assert advantages_S.tolist() == [-0.25, 0.75] and targets_S.tolist() == [1.0, 1.0]


def test_value_clip_removes_the_gradient_beyond_it() -> None:
    value_S = torch.tensor([0.1, 0.9, 0.9, -0.9], dtype=torch.float64, requires_grad=True)
    old_S, target_S = (
        torch.zeros(4, dtype=torch.float64),
        torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
    )
    loss_S = value_loss(value_S, old_S, target_S, clip=0.5)
    assert loss_S.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.5**2, 0.5 * 1.9**2, 0.5 * 0.5**2])
    (gradient_S,) = torch.autograd.grad(loss_S.sum(), value_S)
    assert gradient_S.tolist() == pytest.approx([-0.9, 0, 1.9, 0])
    assert value_loss(value_S, old_S, target_S, clip=0.0).tolist() == pytest.approx(
        [0.405, 0.005, 1.805, 0.005]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0}, "gamma"),
        ({"lam": 1.1}, "lam"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"lamb": 1}, "did you mean lam"),
    ],
)
def test_error_messages_for_invalid_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ADVANTAGES.build({"name": "gae", **settings})


# --- values ---


def with_head(runner: StepRunner) -> tuple[Critic, Tensor, float]:
    """The runner's critic with a head that is not zero, the head's weight [D] and its bias."""
    assert runner.critic is not None
    shards = runner.critic.optimizer.shards
    weight, bias = shards["model.lm_head.weight"], shards["model.lm_head.bias"]
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        bias.fill_(0.25)
    return runner.critic, weight[0].detach().clone(), 0.25


def dense_values(path: str, trajectory: Trajectory, weight_D: Tensor, bias: float) -> FloatArray:
    """Values of the states before the sampled tokens, computed by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        hidden_TD = model.base_model(
            input_ids=torch.from_numpy(trajectory.tokens.astype(np.int64))[None]
        ).last_hidden_state[0]
    before = np.flatnonzero(trajectory.loss_mask) - 1
    return np.asarray((hidden_TD[before] @ weight_D + bias).numpy())


# Tied, untied, and with a head in another place.
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_values_and_advantages_match_the_dense_model(tmp_path: Path, ranks: Ranks, architecture: str) -> None:
    """Tokens that were not sampled (prompt, tool output) have no value, reward or advantage."""
    path, groups = write_model(tmp_path, architecture), random_groups(3)
    runner = make_runner(path, ranks, settings={"advantage": {"name": "gae", "gamma": 0.9, "lam": 0.7}})
    critic, weight_D, bias = with_head(runner)
    trajectories = [t for group in groups for t in group]
    wanted = [dense_values(path, t, weight_D, bias) for t in trajectories]
    for got_S, want_S in zip(critic.values(trajectories), wanted, strict=True):
        assert got_S.tolist() == pytest.approx(want_S.tolist(), abs=1e-9)

    samples = with_advantages(runner, groups)
    rewards = [np.append(np.zeros(t.num_sampled - 1), t.reward) for t in trajectories]
    plain = gae(rewards, wanted, gammas=[0.9] * len(rewards), lam=0.7)
    every_S = np.concatenate(plain)
    for sample, raw_S in zip(samples, plain, strict=True):
        advantage_T = np.asarray(sample.advantage)
        sampled = sample.trajectory.loss_mask == 1
        assert advantage_T[sampled].tolist() == pytest.approx(
            ((raw_S - every_S.mean()) / every_S.std()).tolist(), abs=1e-9
        )


def with_advantages(runner: StepRunner, groups: list[list[Trajectory]]) -> list[TrainingSample]:
    positions = [Position.plain(group, step=0) for group in groups]
    assert runner._step_advantages is not None
    scored, _ = runner._step_advantages.of_positions(positions)
    return [trained_segments(sample) for each in scored for sample in each.samples]


def test_kl_penalty_is_subtracted_at_each_token(tmp_path: Path, ranks: Ranks) -> None:
    """With gamma = lam = 1 and zero values, an advantage is the sum of later rewards only."""
    path, groups = write_model(tmp_path), random_groups(2)
    runner = make_runner(path, ranks, settings=SETTINGS | {"advantage": {"name": "gae", "lam": 1.0}})
    penalized, penalties = runner.rewards.shape_step(groups)
    raw = []
    for before, after, penalty_S in zip(
        itertools.chain(*groups), itertools.chain(*penalized), itertools.chain(*penalties), strict=True
    ):
        assert len(penalty_S) == before.num_sampled and after.reward == pytest.approx(
            before.reward - penalty_S.sum()
        )
        raw.append(before.reward - np.cumsum(penalty_S[::-1])[::-1])
    every_S = np.concatenate(raw)
    for sample, raw_S in zip(with_advantages(runner, groups), raw, strict=True):
        got_S = np.asarray(sample.advantage)[sample.trajectory.loss_mask == 1]
        assert got_S.tolist() == pytest.approx(((raw_S - every_S.mean()) / every_S.std()).tolist(), abs=1e-9)


# --- learning ---


def test_critic_updates_and_warmup(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path), random_groups(6)
    losses = {}
    for updates in (1, 4):
        settings = {
            "advantage": {
                "name": "gae",
                "critic_updates": updates,
                "critic_warmup_steps": 2,
                "value_clip": 0.0,
            }
        }
        runner = make_runner(path, ranks, settings=settings)
        before = gather_full_state(runner.policy)
        rows = [runner.run(groups, step=step) for step in range(3)]
        assert rows[0]["value_mean"] == 0 and rows[0]["explained_variance"] == pytest.approx(0), (
            "the head starts at zero"
        )
        assert (rows[1]["lr"], rows[2]["lr"]) == (0, 1e-2)
        assert not any(
            torch.equal(a, b) for (_, a), (_, b) in zip(before, gather_full_state(runner.policy), strict=True)
        )
        losses[updates] = [row["value_loss"] for row in rows]
        fresh = make_runner(path, ranks, settings=settings)
        fresh.run(groups, step=0)
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(before, gather_full_state(fresh.policy), strict=True)
        )
    assert losses[1][0] == losses[4][0] and losses[4][1] < losses[1][1] < losses[1][0]


def test_explained_variance_of_equal_targets_is_nan(tmp_path: Path, ranks: Ranks) -> None:
    runner = make_runner(write_model(tmp_path), ranks, settings=PLAIN)
    assert math.isnan(runner.run([random_groups(1)[0]], step=0)["explained_variance"])


def test_critic_metrics_are_prometheus_series(tmp_path: Path, ranks: Ranks) -> None:
    metrics = Metrics()
    series = TrainerSeries(metrics)
    row = make_runner(write_model(tmp_path), ranks, settings=PLAIN).run(random_groups(4), step=0)
    series.stepped(0, row | {"tokens_trained": 1, "wait_data_s": 0.0, "freeze_s": 0.0})
    exposed = metrics.exposition().decode()
    for name in ("value_loss", "explained_variance", "critic_grad_norm"):
        assert f"areal_trainer_{name} {row[name]}" in exposed


def test_missing_critic_or_greedy_setting_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path, dtype=torch.float32)
    config = from_mapping({"advantage": {"name": "gae"}})
    with pytest.raises(ConfigError, match="needs a critic"):
        build_step_runner(config, build_policy(config, path, ranks), ranks)
    for advantage, greedy in (("remax", False), ("grpo", True)):
        config = Config(advantage={"name": advantage}, sampling=SamplingConfig(greedy_baseline=greedy))
        with pytest.raises(ConfigError, match=rf"set sampling\.greedy_baseline={str(not greedy).lower()}"):
            build_step_runner(config, build_policy(config, path, ranks), ranks)


@pytest.mark.chaos
def test_cuts_and_ranks_do_not_change_gae_gradients(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", "qwen2")
    run_ranks("gradients", str(tmp_path), path, "critic", world_size=2, module=RANKS)
    runner = make_runner(path, ranks, beta1=0.0, settings=SETTINGS, budget_tokens=1000)
    for step in range(2):
        metrics = runner.run(random_groups(8, seed=step), step=step)
    assert runner.critic is not None
    for share in ("even", "uneven", "one-sided"):
        for name, gradient in (("policy", last_gradient(runner)), ("critic", last_gradient(runner.critic))):
            got = load_file(tmp_path / f"{share}-{name}.safetensors")
            assert got.keys() == gradient.keys() and any(gradient[key].abs().max() > 1e-4 for key in gradient)
            for key in gradient:
                torch.testing.assert_close(
                    got[key], gradient[key], rtol=1e-7, atol=1e-9, msg=f"{share} {name} {key}"
                )
        row = json.loads((tmp_path / f"{share}.json").read_text())
        for key in (
            "value_loss",
            "value_mean",
            "explained_variance",
            "critic_grad_norm",
            "loss",
            "grad_norm",
            "shaped_reward",
        ):
            assert row[key] == pytest.approx(metrics[key], rel=1e-7), (share, key)


@pytest.mark.chaos
def test_critic_checkpoint_loads_at_any_world_size(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "model", "qwen2")
    runner = make_runner(path, ranks, settings=SETTINGS)
    assert runner.critic is not None
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9, tokenizer_path=path)
    for step in range(2):
        runner.run(random_groups(4, seed=step), step=step)
    checkpoints.save(2, runner.policy, runner.optimizer, ranks, critic=runner.critic, extra={})
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})  # of a run without a critic
    checkpoints.save(2, runner.policy, runner.optimizer, ranks, critic=runner.critic, extra={})
    checkpoints.wait()
    run_ranks("resume", str(tmp_path), path, "critic", world_size=2, module=RANKS)
    runner.run(random_groups(4, seed=2), step=2)

    again = make_runner(path, ranks, settings=SETTINGS)
    assert again.critic is not None
    checkpoints.load(3, again.policy, again.optimizer, ranks, critic=again.critic)
    assert again.critic.optimizer.num_updates == runner.critic.optimizer.num_updates == 6
    for (name, a), (_, b) in zip(
        gather_full_state(runner.critic.model), gather_full_state(again.critic.model), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)
    for key, shard in runner.critic.optimizer.shards.items():
        torch.testing.assert_close(
            runner.critic.optimizer.moments(key), again.critic.optimizer.moments(key), rtol=1e-7, atol=1e-9
        )
        assert shard.shape == again.critic.optimizer.shards[key].shape
    rows = tmp_path / "checkpoints" / "step_000003" / "rows"
    assert "master.lm_head.weight" in load_file(rows / "critic-00000-of-00002.safetensors")

    checkpoints.load(1, again.policy, again.optimizer, ranks, critic=again.critic)
    assert "without a critic: the critic starts from its initial weights" in caplog.text


@pytest.mark.chaos
def test_the_critic_learns_values_on_the_sorting_task(tmp_path: Path, ranks: Ranks) -> None:
    """The policy is held fixed, so that only the critic can raise the explained variance."""
    num_steps = 18
    build_tiny_model(tmp_path, seed=0, warm_start_steps=200, swap_prob=0.1, hidden_size=64, num_layers=2)
    config = Config(
        advantage={"name": "gae", "critic_lr": 1e-3, "critic_updates": 4, "critic_warmup_steps": num_steps},
        trainer=TrainerConfig(num_steps=num_steps, lr_schedule="constant"),
    )
    policy = build_policy(config, str(tmp_path), ranks)
    runner = build_step_runner(config, policy, ranks, initial=str(tmp_path))
    sampler = Sampler(str(tmp_path), config)
    rows = [
        runner.run(sampler.groups(range(step * 64, step * 64 + 64), size=2), step=step)
        for step in range(num_steps)
    ]
    explained = [row["explained_variance"] for row in rows]
    assert explained[0] == pytest.approx(0) and statistics.mean(explained[-6:]) > 0.05 > statistics.mean(
        explained[:6]
    )
    mean_reward, mean_value = (
        statistics.mean(row[name] for row in rows[-6:]) for name in ("reward", "value_mean")
    )
    assert 0.3 < mean_reward < 0.7 and mean_value == pytest.approx(mean_reward, abs=0.1)
