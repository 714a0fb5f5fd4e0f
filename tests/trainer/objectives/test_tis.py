"""Truncated and masked importance sampling: published losses and gradients, normalized weights, settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_like.errors import ConfigError
from tests.support.objective_helpers import (
    ADVANTAGES,
    BEHAVIOR_LOGP,
    LOGP,
    REWARDS,
    evaluate,
    tokens_of,
)
from trainer.objectives import OBJECTIVES, Objective, SampledTokens, TokenLosses

VECTORS: list[tuple[dict[str, Any], str, float, list[float]]] = [
    ({"name": "reinforce"}, "token_mean", -0.08, [-0.2, -0.2, -0.2, 0.2, 0.2]),
    (
        {"name": "tis", "level": "token", "cap": 2},
        "token_mean",
        0.407139,
        [-0.244281, -0.4, -0.180967, 0.148164, 0.099317],
    ),
    (
        {"name": "tis", "level": "token", "cap": 2},
        "seq_mean_token_mean",
        0.198922,
        [-0.203567, -0.333333, -0.150806, 0.185205, 0.124146],
    ),
    (
        {"name": "tis", "level": "sequence", "cap": 2},
        "token_mean",
        0.78663,
        [-0.4, -0.4, -0.4, 0.073576, 0.073576],
    ),
    (
        {"name": "tis", "level": "sequence", "cap": 8},
        "token_mean",
        1.145771,
        [-0.543656, -0.543656, -0.543656, 0.073576, 0.073576],
    ),
    (
        {"name": "tis", "level": "sequence", "cap": 8},
        "seq_mean_token_mean",
        0.865905,
        [-0.453047, -0.453047, -0.453047, 0.09197, 0.09197],
    ),
    (
        {"name": "tis", "level": "geometric", "cap": 2},
        "token_mean",
        0.346018,
        [-0.279122, -0.279122, -0.279122, 0.121306, 0.121306],
    ),
    (
        {"name": "tis", "level": "token", "mode": "mask", "low": 0.5, "high": 5},
        "token_mean",
        0.696954,
        [-0.244281, -0.491921, -0.180967, 0.148164, 0],
    ),
    (
        {"name": "tis", "level": "token", "mode": "mask", "low": 0.5, "high": 2},
        "token_mean",
        0.155841,
        [-0.244281, 0, -0.180967, 0.148164, 0],
    ),
    (
        {"name": "tis", "level": "token", "mode": "mask", "low": 0.5, "high": 2, "denominator": "kept"},
        "token_mean",
        0.259735,
        [-0.407134, 0, -0.301612, 0.246939, 0],
    ),
    (
        {"name": "tis", "level": "sequence", "mode": "mask", "low": 0.5, "high": 3},
        "token_mean",
        1.359141,
        [-0.543656, -0.543656, -0.543656, 0, 0],
    ),
    (
        {"name": "tis", "level": "sequence", "mode": "mask", "low": 0.5, "high": 3, "denominator": "kept"},
        "token_mean",
        2.265235,
        [-0.906094, -0.906094, -0.906094, 0, 0],
    ),
]


@pytest.mark.parametrize(("settings", "normalizer", "loss", "grad"), VECTORS)
def test_published_vectors(settings: dict[str, Any], normalizer: str, loss: float, grad: list[float]) -> None:
    got_loss, got_grad = evaluate(
        OBJECTIVES.build(settings),
        [tokens_of(LOGP, BEHAVIOR_LOGP, ADVANTAGES, REWARDS)],
        normalizer=normalizer,
    )
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_grad == pytest.approx(grad, abs=1e-6)


def test_normalized_weights_have_mean_one() -> None:
    objective = OBJECTIVES.build({"name": "tis", "level": "sequence", "cap": 8, "normalize": True})
    _, grad = evaluate(objective, [tokens_of(LOGP, BEHAVIOR_LOGP, ADVANTAGES)])
    weights = [-grad[0] * 5, grad[3] * 5]
    assert sum(weights) / 2 == pytest.approx(1.0) and weights[0] / weights[1] == pytest.approx(math.exp(2))


def test_a_step_infinitely_off_policy_is_not_normalized() -> None:
    objective = OBJECTIVES.build({"name": "tis", "level": "sequence", "normalize": True})
    far = [[logp - 12.0 for logp in row] for row in BEHAVIOR_LOGP]
    _, grad = evaluate(objective, [tokens_of(far, BEHAVIOR_LOGP, ADVANTAGES)])
    assert 0 < max(map(abs, grad)) < 1e-8


def test_a_fully_masked_batch_has_zero_gradient() -> None:
    for normalize in (True, False):
        settings = {
            "name": "tis",
            "mode": "mask",
            "low": 4,
            "high": 5,
            "denominator": "kept",
            "normalize": normalize,
        }
        loss, grad = evaluate(OBJECTIVES.build(settings), [tokens_of(LOGP, BEHAVIOR_LOGP, ADVANTAGES)])
        assert loss == 0 and not any(grad)


@dataclass(frozen=True, kw_only=True)
class SoftReinforce(Objective):
    power: float = 1.0

    def losses(self, batch: SampledTokens, stats: Mapping[str, Tensor]) -> TokenLosses:
        weight_S = torch.exp(self.power * batch.log_ratio_S.clamp(max=1.0))
        return TokenLosses(loss_S=-weight_S * batch.advantage_S * batch.logp_S)


def test_custom_objective_by_dotted_path() -> None:
    custom = OBJECTIVES.build({"_target_": f"{__name__}.SoftReinforce", "power": "0"})
    assert evaluate(custom, [tokens_of(LOGP, BEHAVIOR_LOGP, ADVANTAGES)])[0] == pytest.approx(-0.08)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "tiss"}, "choose one of .*reinforce, .*tis"),
        ({"name": "tis", "capp": 3}, r"unknown key `objective.capp` .* did you mean cap"),
        ({"name": "tis", "cap": "much"}, "objective.cap: want a number"),
        ({"name": "tis", "level": "word"}, "use one of token, sequence, geometric"),
        ({"name": "tis", "low": 3, "high": 2}, "low < high"),
        ({"name": "tis", "mode": "clip"}, "use truncate or mask"),
        ({"name": "tis", "normalize": "yes"}, "want bool"),
        ({"_target_": "nowhere.Mine"}, "No module named 'nowhere'"),
        ({"_target_": "Mine"}, "write module.Class"),
        ({"_target_": "trainer.step.runner.Nothing"}, "has no Nothing"),
        ({"_target_": "trainer.step.runner.StepRunner"}, "not a subclass of"),
    ],
)
def test_error_messages_for_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES.build(settings)
