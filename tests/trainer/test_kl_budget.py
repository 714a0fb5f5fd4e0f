"""`kl.budget`: the coefficient of the KL penalty follows the measured KL."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_like.config import KlConfig, from_mapping
from areal_like.errors import ConfigError
from tests.support.trainer_helpers import dense_logprobs, random_groups
from tests.support.trainer_ranks import make_runner
from trainer.batching.packing import is_target
from trainer.distributed.ranks import Ranks
from trainer.objectives.kl_control import KlControl
from trainer.step.runner import StepRunner

SMALL = 1e-4
"""A budget in nats that the first step exceeds."""


def test_the_papers_rule_by_hand() -> None:
    control = KlControl(KlConfig(coef=0.2, budget=6.0, gain=0.1))
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (6.0, 0.0), (5.4, -0.1), (-3.0, -0.2)):
        before = control.coef
        control.update(kl)
        assert control.coef == pytest.approx(before * (1 + 0.1 * error), rel=1e-12)
    before = control.coef
    for kl in (math.nan, math.inf, -math.inf):
        control.update(kl)
    assert control.coef == before
    constant = KlControl(KlConfig(coef=0.2))
    constant.update(60.0)
    assert constant.coef == 0.2


def test_a_budget_out_of_reach_has_an_end() -> None:
    for kl, want in ((1e9, 1e4), (0.0, 1e-4)):
        control = KlControl(KlConfig(coef=1.0, budget=1.0, gain=1.0))
        for _ in range(1000):
            control.update(kl)
        assert control.coef == want


def test_the_kl_arrives_at_the_budget() -> None:
    """A policy whose KL falls as the coefficient rises, with a delay of a few steps."""
    control = KlControl(KlConfig(coef=0.01, budget=0.5, gain=0.1))
    kl = 0.0
    for _ in range(500):
        kl += 0.2 * (1 / (1 + 10 * control.coef) - kl)
        control.update(kl)
    assert kl == pytest.approx(0.5, rel=0.02) and control.coef == pytest.approx(0.1, rel=0.04)


def runner_of(path: str, ranks: Ranks, **kl: Any) -> StepRunner:
    return make_runner(path, ranks, settings={"objective": {"name": "reinforce"}, "kl": {"coef": 0.3, **kl}})


def run(runner: StepRunner, step: int) -> dict[str, Any]:
    return runner.run(random_groups(2, group_size=3, seed=step), step=step)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_coefficient_of_each_step(path: str, ranks: Ranks, place: str) -> None:
    settings = {"place": place, "estimator": "k2", "budget": SMALL, "gain": 0.5}
    adaptive, constant = runner_of(path, ranks, **settings), runner_of(path, ranks, place=place)
    expected = KlControl(KlConfig(coef=0.3, **settings))
    rows = [run(adaptive, step) for step in range(3)]
    for row in rows:
        assert row["kl_coef"] == expected.coef
        expected.update(row["kl_ref"])
    assert [row["kl_coef"] for row in rows] != [0.3] * 3
    same = [run(constant, step) for step in range(3)]
    assert [row["kl_coef"] for row in same] == [0.3] * 3
    assert rows[0]["grad_norm"] == same[0]["grad_norm"] and rows[2]["grad_norm"] != same[2]["grad_norm"]
    assert "kl_coef" not in constant.state()


def test_the_kl_in_rewards_is_measured(path: str, ranks: Ranks) -> None:
    """Over the sampled tokens of all samples, from the recorded log-probs."""
    runner = runner_of(path, ranks, place="reward", estimator="k1", budget=SMALL)
    groups = random_groups(2, group_size=3, seed=0)
    trajectories = [t for group in groups for t in group]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        reference_BL = dense_logprobs(model, trajectories).numpy()
    log_ratios = [
        (t.logprobs - reference_BL[b, : t.num_tokens])[is_target(t)] for b, t in enumerate(trajectories)
    ]
    expected = np.concatenate(log_ratios).mean()
    assert runner.run(groups, step=0)["kl_ref"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_resumed_run_has_the_same_coefficients(path: str, ranks: Ranks, place: str) -> None:
    settings = {"place": place, "budget": SMALL}
    unbroken, resumed = runner_of(path, ranks, **settings), runner_of(path, ranks, **settings)
    run(unbroken, 0)
    run(unbroken, 1)
    state = json.loads(json.dumps(unbroken.state()))
    weights = copy.deepcopy(unbroken.policy.state_dict())
    expected = run(unbroken, 2)
    run(resumed, 0)  # a rollback: the state is replaced
    resumed.restore(state)
    resumed.policy.load_state_dict(weights)
    got = run(resumed, 2)
    assert got["kl_coef"] == expected["kl_coef"] != 0.3
    assert (got["loss"], got["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    # From a checkpoint without it the coefficient begins again.
    resumed.restore({"shaping_duals": [], "advantage_state": []})
    assert run(resumed, 3)["kl_coef"] == 0.3


def test_an_abandoned_step_changes_nothing(path: str, ranks: Ranks) -> None:
    runner = runner_of(path, ranks, place="reward", budget=SMALL)
    with pytest.raises(Exception, match="abandoned"):
        runner.run(random_groups(2, group_size=3, seed=0), step=0, is_abandoned=lambda: True)
    assert runner.state()["kl_coef"] == 0.3


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"budget": 0.1}, r"kl\.budget=0\.1 .*: set kl\.coef above 0"),
        ({"budget": 0.1, "coef": 1.0, "gain": 1.5}, r"kl\.gain=1\.5"),
        ({"budget": 0.1, "coef": 1.0, "gain": 0.0}, r"kl\.gain"),
        ({"gain": 0.2, "coef": 1.0}, r"kl\.gain=0\.2 has no effect .*: set kl\.budget"),
        ({"budget": -1.0, "coef": 1.0}, r"kl\.budget"),
        ({"budget": 0.1, "coef": 1.0, "estimator": "k1"}, r"kl\.place=loss and kl\.estimator=k1"),
    ],
)
def test_refused_budgets(kl: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({"kl": kl})
