"""Online DPO and REBEL: by hand, against plain torch formulas, and against TRL where it is installed."""

import itertools
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from benchmarks.trl import PYTHON as TRL_PYTHON
from tests.support.full_state import gather_full_state
from tests.support.objective_helpers import BEHAVIOR_LOGP, LOGP, Rows, evaluate, published, tokens_of
from tests.support.trainer_helpers import random_groups, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.distributed.ranks import Ranks
from trainer.objectives import Oapl, Rebel, SampledTokens, build_objective
from trainer.objectives.pairs import pairs_of

LENGTHS = (3, 1, 4, 2, 5)
REWARDS = [1.0, 0.25, 1.0, 0.0, 0.0]


def rows(seed: int) -> Rows:
    numbers = np.random.default_rng(seed)
    return [(-numbers.uniform(0.05, 2.0, length)).tolist() for length in LENGTHS]


def one_group(rewards: Sequence[float] = REWARDS) -> SampledTokens:
    return tokens_of(rows(1), rows(2), [0.0] * 5, rewards, ref_logp=rows(3))


def plain_loss(settings: dict[str, Any], batch: SampledTokens, logp_S: Tensor) -> Tensor:
    """The loss of one group from the definition: loops over pairs, autograd through all of it."""
    anchor = batch.ref_logp_S if settings.get("anchor") == "reference" else batch.behavior_logp_S
    assert anchor is not None
    scores = [(logp_S - anchor)[batch.sample_S == i].sum() for i in range(len(LENGTHS))]
    rewards = batch.reward_N.tolist()
    chosen = list(itertools.combinations(range(len(scores)), 2))
    if settings["pairs"] == "best_worst":
        chosen = [(rewards.index(max(rewards)), len(rewards) - 1 - rewards[::-1].index(min(rewards)))]
    losses = []
    for i, j in chosen:
        difference, margin = scores[i] - scores[j], rewards[i] - rewards[j]
        if settings["name"] == "rebel":
            losses.append((settings["beta"] * difference - margin) ** 2)
        elif margin:
            losses.append(-F.logsigmoid(settings["beta"] * difference * math.copysign(1, margin)))
    return torch.stack(losses).mean() if losses else logp_S.sum() * 0


@pytest.mark.parametrize("name", ["online_dpo", "rebel"])
@pytest.mark.parametrize("pairs", ["best_worst", "all"])
@pytest.mark.parametrize("anchor", ["reference", "behavior"])
@pytest.mark.parametrize("rewards", [REWARDS, [0.5] * 5, [0.0, 0.0, 0.0, 0.0, 1.0]], ids=str)
def test_losses_are_the_plain_formulas(name: str, pairs: str, anchor: str, rewards: list[float]) -> None:
    settings = {"name": name, "pairs": pairs, "anchor": anchor, "beta": 0.4}
    batch = one_group(rewards)
    loss, grad = evaluate(build_objective(settings), [batch])
    logp_S = batch.logp_S.detach().clone().requires_grad_()
    want = plain_loss(settings, batch, logp_S)
    (want_S,) = torch.autograd.grad(want, logp_S)
    assert loss == pytest.approx(want.item(), rel=1e-12)
    assert grad == pytest.approx(want_S.tolist(), rel=1e-12, abs=1e-15)
    assert any(grad) is not (name == "online_dpo" and len(set(rewards)) == 1)


def test_published_pair_by_hand() -> None:
    """s = 1, -1: DPO at beta .5 is log(1 + 1/e) = .313262, its slope -.5 / (1 + e) = -.134471.

    REBEL at beta .25 has the residual .25 * 2 - 1 = -.5: loss .25, slope 2 * .25 * -.5 = -.25.
    """
    dpo = {"name": "online_dpo", "beta": 0.5, "anchor": "behavior"}
    loss, grad = evaluate(build_objective(dpo), [published()])
    assert loss == pytest.approx(0.313262, abs=1e-6)
    assert grad == pytest.approx([-0.134471] * 3 + [0.134471] * 2, abs=1e-6)
    loss, grad = evaluate(build_objective({"name": "rebel", "beta": 0.25}), [published()])
    assert (loss, grad) == (pytest.approx(0.25), pytest.approx([-0.25] * 3 + [0.25] * 2))
    losses = build_objective(dpo).losses(published(), {})
    margins = losses.means["pair_margin"][losses.chosen["pair_margin"]]
    assert margins.tolist() == pytest.approx([1.0])


def test_groups_weigh_alike() -> None:
    """Two groups of a micro-batch, one without a pair: half the loss of the other alone."""
    two = tokens_of([*LOGP, *LOGP], [*BEHAVIOR_LOGP, *BEHAVIOR_LOGP], [0.0] * 4, [1.0, 0.0, 1.0, 1.0])
    two.group_N[2:] = 1
    objective = build_objective({"name": "online_dpo", "beta": 0.5, "anchor": "behavior"})
    loss, grad = evaluate(objective, [two])
    assert loss == pytest.approx(0.313262 / 2, abs=1e-6)
    assert grad == pytest.approx([-0.134471 / 2] * 3 + [0.134471 / 2] * 2 + [0] * 5, abs=1e-6)


def test_pairs_of_ties() -> None:
    reward_N, group_N = torch.tensor([1.0, 2.0, 2.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 0, 1])

    def found(*, only_extremes: bool, ties: bool) -> list[list[int]]:
        paired_NN = pairs_of(reward_N, group_N, only_extremes=only_extremes, ties=ties)
        return [[int(x) for x in pair] for pair in paired_NN.nonzero()]

    assert found(only_extremes=True, ties=False) == [[1, 3]]
    assert found(only_extremes=False, ties=False) == [[1, 0], [1, 3], [2, 0], [2, 3]]
    assert found(only_extremes=False, ties=True) == [[0, 3], [1, 0], [1, 2], [1, 3], [2, 0], [2, 3]]


def test_rebel_is_oapl_with_the_best_constant() -> None:
    """The mean over pairs of (e_i - e_j)^2 is 2 G / (G - 1) times the variance of e_i = beta s_i - R_i."""
    batch = one_group()
    loss, _ = evaluate(Rebel(beta=0.3), [batch])
    errors = 0.3 * batch.log_w_N - batch.reward_N
    assert loss == pytest.approx(float(2 * 5 / 4 * errors.var(unbiased=False)), rel=1e-12)
    assert Rebel(max_tokens=64).losses(batch, {}).means["residual_abs"].mean() > 0
    assert Rebel().max_tokens == Oapl().max_tokens


@pytest.mark.parametrize(
    "settings",
    [{"pairs": "some"}, {"anchor": "prox"}, {"name": "online_dpo", "beta": 0}, {"beta": -1}],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.(\w+=|beta must be)"):
        build_objective({"name": "rebel", **settings})


# --- in a step ---


def answer(rng: np.random.Generator, prompt: list[int], *, reward: float) -> Trajectory:
    tokens = np.array([*prompt, *rng.integers(3, 20, int(rng.integers(2, 7)))], dtype=np.int32)
    mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
    return Trajectory(
        tokens=tokens,
        loss_mask=mask,
        logprobs=np.where(mask, -2.5, 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=reward,
        finish_reason=FinishReason.STOP,
    )


def test_steps_move_pairs_apart(tmp_path: Path, ranks: Ranks) -> None:
    """Of the same groups, over and over: losses fall, and DPO's margin rises."""
    path, groups = write_model(tmp_path), random_groups(5, prompt=4)
    for name in ("online_dpo", "rebel"):
        runner = make_runner(path, ranks, settings={"objective": {"name": name, "beta": 0.2}})
        metrics = [runner.run(groups, step=step) for step in range(6)]
        assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"], name
    runner = make_runner(path, ranks, settings={"objective": {"name": "online_dpo"}})
    margins = [runner.run(groups, step=step)["pair_margin"] for step in range(4)]
    assert margins[0] == pytest.approx(0, abs=1e-12) and margins[-1] > 0.05


@pytest.mark.skipif(not TRL_PYTHON.exists(), reason="needs `make trl`")
def test_dpo_step_has_the_gradient_of_trl(tmp_path: Path, ranks: Ranks) -> None:
    """Loss and gradient of a step, after one step away from the reference, are those of TRL's DPOTrainer."""
    path, rng = write_model(tmp_path / "reference"), np.random.default_rng(0)
    prompts = [rng.integers(3, 20, 4).tolist() for _ in range(4)]
    groups = [[answer(rng, prompt, reward=r) for r in (0.0, 1.0)] for prompt in prompts]
    settings = {"objective": {"name": "online_dpo", "beta": 0.3}}
    runner = make_runner(path, ranks, beta1=0.0, settings=settings)
    runner.run(groups, step=0)
    moved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    moved.load_state_dict(dict(gather_full_state(runner.policy)), strict=False)
    moved.save_pretrained(tmp_path / "moved")
    metrics = runner.run(groups, step=1)
    pairs = [
        {
            "prompt_ids": prompt,
            "chosen_ids": better.tokens[4:].tolist(),
            "rejected_ids": worse.tokens[4:].tolist(),
        }
        for prompt, (worse, better) in zip(prompts, groups, strict=True)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps({"beta": 0.3, "pairs": pairs}))
    script = Path(__file__).parents[2] / "support" / "trl_dpo.py"
    names = ("moved", "reference", "pairs.json", "out.safetensors")
    done = subprocess.run(
        [TRL_PYTHON, str(script), *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "out.safetensors")
    assert metrics["pair_margin"] > 1e-3, "the policy has left the reference"
    assert metrics["loss"] == pytest.approx(float(theirs.pop("loss")), rel=1e-6)
    ours = last_gradient(runner)
    assert theirs.keys() <= ours.keys() and len(theirs) > 5
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name].double(), gradient.double(), rtol=1e-5, atol=1e-8, msg=name)
