"""The masks `kpop` and `trust_region`, by hand on the published example, and at the edges of float32."""

import math
from typing import Any

import pytest
import torch

from areal_like.errors import ConfigError
from tests.support.objective_helpers import BEHAVIOR_LOGP, LOGP, evaluate, published, tokens_of
from trainer.objectives import build_objective
from trainer.objectives.trust_region import bernoulli_kl

TOKEN_TIS = {"name": "tis", "level": "token", "cap": 5}
BY_HAND: list[tuple[dict[str, Any], float, list[float]]] = [
    # Of the tokens, max(KL(pi || mu), KL(mu || pi)) is .0139 .1266 .0069 | .0344 .0736.
    ({"name": "kpop", "max_kl": 0.05}, 0.155841, [-0.244281, 0, -0.180967, 0.148164, 0]),
    (
        {"name": "kpop", "max_kl": 0.05, "denominator": "kept"},
        0.259735,
        [-0.407134, 0, -0.301612, 0.246939, 0],
    ),
    # .0623 is the last token's KL(pi || mu), .0736 its KL(mu || pi).
    ({"name": "kpop", "max_kl": 0.065}, 0.155841, [-0.244281, 0, -0.180967, 0.148164, 0]),
    ({"name": "kpop", "max_kl": 0.08}, -0.032861, [-0.244281, 0, -0.180967, 0.148164, 0.099317]),
    # .0623 of mu's direction: .1025 of the second token is below .11, its other direction, .1266, is not.
    ({"name": "kpop", "max_kl": 0.11}, -0.032861, [-0.244281, 0, -0.180967, 0.148164, 0.099317]),
    # k2 is .02 .405 .005 | .045 .245; the means of k3 are .19528 | .11870. Dropped sequences do not count.
    ({"name": "trust_region", "max_kl": 0.4, "mean_kl": 0}, -0.842165, [0, 0, 0, 0.370409, 0.248293]),
    ({"name": "trust_region", "max_kl": 0, "mean_kl": 0.15}, -0.842165, [0, 0, 0, 0.370409, 0.248293]),
    (
        {"name": "trust_region", "max_kl": 0.4, "mean_kl": 0, "denominator": "original"},
        -0.336866,
        [0, 0, 0, 0.148164, 0.099317],
    ),
    (
        {"name": "trust_region", "level": "token", "max_kl": 0.3},
        -0.041077,
        [-0.305351, 0, -0.226209, 0.185205, 0.124146],
    ),
    ({"name": "trust_region", "max_kl": 0.2, "mean_kl": 0}, 0, [0] * 5),
]


@pytest.mark.parametrize(("mask", "loss", "grad"), BY_HAND, ids=str)
def test_masks_match_values_by_hand(mask: dict[str, Any], loss: float, grad: list[float]) -> None:
    got_loss, got_grad = evaluate(build_objective({**TOKEN_TIS, "masks": [mask]}), [published()])
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_grad == pytest.approx(grad, abs=1e-6)


def test_rejection_leaves_the_weight_alone() -> None:
    """A token that a mask drops still counts in its sequence's importance weight."""
    masks = [{"name": "trust_region", "level": "token", "max_kl": 0.3}]
    _, grad = evaluate(build_objective({"name": "tis", "cap": 8, "masks": masks}), [published()])
    weight = math.exp(1)
    assert grad == pytest.approx([-weight / 4, 0, -weight / 4, math.exp(-1) / 4, math.exp(-1) / 4], rel=1e-9)


def test_kpop_bounds_likely_tokens_more_than_rare_ones() -> None:
    """A ratio of 10 is kept at a probability of 1e-3; a ratio of 1.25 is dropped at one of .75."""
    log = math.log
    logp, behavior_logp = [[log(1e-2), log(0.94)]], [[log(1e-3), log(0.75)]]
    objective = build_objective({**TOKEN_TIS, "masks": [{"name": "kpop"}]})
    batch = tokens_of(logp, behavior_logp, [1.0])
    assert objective.losses(batch, {}).means["kept_fraction"].tolist() == [True, False]


def test_kl_of_coins_is_finite_and_exact() -> None:
    """By the definition in float64; a probability that float32 rounds to 1 has no infinite divergence."""
    for p, q in ((0.3, 0.6), (0.999, 0.5), (1e-6, 0.2)):
        want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        got = bernoulli_kl(torch.tensor(p).double().log(), torch.tensor(q).double().log())
        assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-12)
    one, nearly = torch.tensor(0.0), torch.tensor(-1e-6)
    assert 0 <= float(bernoulli_kl(nearly, one)) < 1e-4 and abs(float(bernoulli_kl(one, nearly))) < 1e-4
    assert float(bernoulli_kl(torch.tensor(-1.0), one)) > 5
    never = torch.tensor(-1000.0)
    assert float(bernoulli_kl(never, one)) > 5 and float(bernoulli_kl(one, never)) > 5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"name": "kpop", "max_kl": 0}, "above 0"),
        ({"name": "trust_region", "level": "geometric"}, "sequence or token"),
        ({"name": "trust_region", "max_kl": 0, "mean_kl": 0}, "above 0"),
        ({"name": "trust_region", "level": "token", "max_kl": 0}, "above 0"),
        ({"name": "trust_region", "mean_kl": -1.0}, "trust_region: .*mean_kl must be at least 0, not -1.0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(mask: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective({**TOKEN_TIS, "masks": [mask]})


def test_on_policy_nothing_is_dropped() -> None:
    masks = [{"name": "kpop", "max_kl": 1e-9}, {"name": "trust_region", "max_kl": 1e-9, "mean_kl": 1e-9}]
    for logp in (LOGP, BEHAVIOR_LOGP):
        objective = build_objective({"name": "reinforce", "masks": masks})
        batch = tokens_of(logp, logp, [1.0, -1.0])
        assert objective.losses(batch, {}).means["kept_fraction"].all()
