"""LAD compared with its definition (the divergence differentiated by autograd), and its optimal policy."""

import math

import pytest
import torch
from torch import Tensor

from areal_like.errors import ConfigError
from tests.support.objective_helpers import evaluate, published, tokens_of
from trainer.objectives import OBJECTIVES, Lad

GENERATORS = {
    "js": lambda x: 0.5 * (x * x.log() - (x + 1) * ((x + 1) / 2).log()),
    "hellinger": lambda x: 0.5 * (x.sqrt() - 1) ** 2,
    "tv": lambda x: 0.5 * (x - 1).abs(),
}


def test_lad_gradient_worked_out_by_hand() -> None:
    """W = e and 1/e, u = 4 and -4: weights W (log 2 - log(1 + e^u / W)) / 2, over five tokens."""
    _, grad = evaluate(Lad(), [published()], normalizer="token_mean")
    assert grad == pytest.approx([-0.640275] * 3 + [0.023712] * 2, abs=1e-6)


@pytest.mark.parametrize("divergence", list(GENERATORS))
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("eta", [0.25, 1.0, 3.0])
def test_gradient_and_value_match_the_divergence(divergence: str, level: str, eta: float) -> None:
    batch = published(advantages=[1.7, -0.4])
    log_ratio_S = batch.logp_S - batch.behavior_logp_S
    log_w, u = (
        (batch.sum_N(log_ratio_S), torch.tensor([1.7, -0.4]) / eta)
        if level == "sequence"
        else (log_ratio_S, batch.advantage_S / eta)
    )
    value = u.exp() * GENERATORS[divergence](log_w.exp() / u.exp())
    (want_S,) = torch.autograd.grad(value.sum(), batch.logp_S)
    losses = Lad(divergence=divergence, level=level, eta=eta).losses(batch, {})
    (got_S,) = torch.autograd.grad(losses.loss_S.sum(), batch.logp_S)
    assert torch.allclose(got_S, want_S, rtol=1e-6)
    assert torch.allclose(
        losses.means["divergence"], batch.spread_S(value) if level == "sequence" else value, rtol=1e-6
    )


def fit(name: str, mu_A: Tensor, advantages: list[float], **settings: object) -> Tensor:
    """Gradient descent on the expected loss of a bandit whose arms are sampled from mu."""
    objective, theta_A = OBJECTIVES.build({"name": name, **settings}), mu_A.log().clone().requires_grad_()
    for _ in range(200):
        pi_A = torch.log_softmax(theta_A, 0)
        batch = tokens_of([[x] for x in pi_A.tolist()], [[x] for x in mu_A.log().tolist()], advantages)
        (slope_A,) = torch.autograd.grad((mu_A * objective.losses(batch, {}).loss_S).sum(), batch.logp_S)
        (grad_A,) = torch.autograd.grad(pi_A, theta_A, grad_outputs=slope_A)
        theta_A = (theta_A.detach() - 10 * grad_A).requires_grad_()
    return torch.softmax(theta_A.detach(), 0)


def test_lad_converges_where_tis_collapses() -> None:
    mu_A, advantages = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), [1.0, 0.5, -1.0, 0.8]
    target_A = mu_A * torch.exp(torch.tensor(advantages, dtype=torch.float64))
    target_A = target_A / target_A.sum()
    for divergence in ("js", "hellinger"):
        assert fit("lad", mu_A, advantages, eta=1.0, divergence=divergence).tolist() == pytest.approx(
            target_A.tolist(), abs=1e-3
        )
    assert fit("tis", mu_A, advantages, level="token", cap=1e9).max() > 0.95


def test_zero_advantage_still_pulls_the_ratio_to_one() -> None:
    objective = Lad()
    assert not objective.skips_zero_advantage
    _, grad = evaluate(objective, [published(advantages=[0.0, 0.0])], normalizer="token_mean")
    assert grad[0] > 0 > grad[-1], "W is e and 1/e: both move towards 1"
    assert math.isfinite(sum(grad))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"divergence": "kl"}, "js, hellinger, tv"), ({"eta": 0}, "above 0"), ({"level": "word"}, "token")],
)
def test_invalid_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES.build({"name": "lad", **settings})
