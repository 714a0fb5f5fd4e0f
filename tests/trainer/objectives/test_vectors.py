"""Published losses and gradients of all objectives but TIS, to 1e-6 in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from areal_like.errors import ConfigError
from tests.support.objective_helpers import ADVANTAGES, BEHAVIOR_LOGP, LOGP, evaluate, published, tokens_of
from trainer.objectives import OBJECTIVES, Dcpo, DecoupledPpo, M2po, Maspo, Oapl, SampledTokens, Vespo
from trainer.objectives.oapl import SoftAdvantage, default_beta2

DECOUPLED = {"name": "decoupled_ppo", "clip": 0.2}
WIDE_GSPO = {"name": "gspo", "clip_low": 0.5, "clip_high": 0.5}

VECTORS: list[tuple[dict[str, Any], str, float, list[float]]] = [
    ({"name": "ppo"}, "token_mean", -0.361248, [-0.244281, 0, -0.180967, 0, 0]),
    ({**DECOUPLED, "mode": "none"}, "token_mean", -0.630383, [-0.244281, -0.491921, 0, 0.148164, 0]),
    ({**DECOUPLED, "cap": 2}, "token_mean", -0.580531, [-0.244281, -0.442068, 0, 0.148164, 0]),
    ({**DECOUPLED, "cap": 2, "mode": "mask"}, "token_mean", -0.138463, [-0.244281, 0, 0, 0.148164, 0]),
    (
        {**DECOUPLED, "cap": 2, "level": "sequence"},
        "token_mean",
        -0.907527,
        [-0.364424, -0.364424, 0, 0.109762, 0],
    ),
    (
        {**DECOUPLED, "cap": 2, "level": "geometric"},
        "token_mean",
        -0.540708,
        [-0.261121, -0.261121, 0, 0.134064, 0],
    ),
    ({"name": "gspo"}, "seq_mean_token_mean", -0.000350, [0, 0, 0, 0, 0]),
    (WIDE_GSPO, "seq_mean_token_mean", -0.394541, [-0.232602, -0.232602, -0.232602, 0.151633, 0.151633]),
    (
        {"name": "sapo"},
        "seq_mean_token_mean",
        -0.463570,
        [-0.201093, -0.250855, -0.150465, 0.181817, 0.115863],
    ),
    (
        {"name": "cispo", "high": 1.28},
        "token_mean",
        0.248739,
        [-0.244281, -0.256, -0.180967, 0.148164, 0.099317],
    ),
    (
        {"name": "cispo", "high": 5},
        "token_mean",
        0.508252,
        [-0.244281, -0.491921, -0.180967, 0.148164, 0.099317],
    ),
    ({"name": "vespo"}, "token_mean", -0.080912, [-0.008529, -0.008529, -0.008529, 0.035253, 0.035253]),
    (
        {"name": "vespo"},
        "seq_mean_token_mean",
        -0.110024,
        [-0.007107, -0.007107, -0.007107, 0.044067, 0.044067],
    ),
    (
        {"name": "vespo"},
        "seq_mean_token_sum",
        -0.202280,
        [-0.021322, -0.021322, -0.021322, 0.088133, 0.088133],
    ),
]


@pytest.mark.parametrize(("settings", "normalizer", "loss", "grad"), VECTORS, ids=str)
def test_published_vectors(settings: dict[str, Any], normalizer: str, loss: float, grad: list[float]) -> None:
    got_loss, got_grad = evaluate(OBJECTIVES.build(settings), [published()], normalizer=normalizer)
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_grad == pytest.approx(grad, abs=1e-6)


@pytest.mark.parametrize(
    ("beta1", "beta2", "loss", "grad", "tolerance"),
    [
        (1.0, 1e-3, 0.263428, [-0.000378885] * 3 + [0.000619115] * 2, 1e-9),
        (1.0, 0.5, 0.014427, [0.060057] * 5, 1e-6),
        (0.5, 0.1, 0.207041, [-0.018311] * 3 + [0.061689] * 2, 1e-6),
    ],
)
def test_oapl(beta1: float, beta2: float, loss: float, grad: list[float], tolerance: float) -> None:
    objective = Oapl(beta1=beta1, beta2=beta2)
    advantages = SoftAdvantage(beta1=beta1).of_rewards(np.array([1.0, 0.0])).tolist()
    got_loss, got_grad = evaluate(objective, [published(advantages=advantages)], normalizer="token_mean")
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_grad == pytest.approx(grad, abs=tolerance)


def test_oapl_does_not_depend_on_cuts_within_a_group() -> None:
    objective = Oapl(beta2=0.5)
    a, b = SoftAdvantage().of_rewards(np.array([1.0, 0.0])).tolist()
    loss, grad = evaluate(
        objective, [tokens_of(LOGP[:1], BEHAVIOR_LOGP[:1], [a]), tokens_of(LOGP[1:], BEHAVIOR_LOGP[1:], [b])]
    )
    assert loss == pytest.approx(0.014427, abs=1e-6) and grad == pytest.approx([0.060057] * 5, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "at_one", "at_half"),
    [
        ([1, 0], 0.620115, 0.716890),
        ([1, 0, 0, 0], 0.357374, 0.477229),
        ([1, 1, 0, 0], 0.620115, 0.716890),
        ([1, 1, 1, 1], 1, 1),
        ([0, 0, 0, 0], 0, 0),
    ],
)
def test_oapl_value(rewards: list[float], at_one: float, at_half: float) -> None:
    for beta1, value in ((1.0, at_one), (0.5, at_half)):
        got = np.array(rewards) - SoftAdvantage(beta1=beta1).of_rewards(np.array(rewards, dtype=float))
        assert got.tolist() == pytest.approx([value] * len(rewards), abs=1e-6)
    assert np.isfinite(SoftAdvantage(beta1=1e-3).of_rewards(np.array([1e4, 0.0]))).all()


def test_oapl_default_beta2_follows_the_length_limit() -> None:
    assert default_beta2(64) == 0.25
    assert default_beta2(4096) == pytest.approx(1e-3, rel=0.03)
    assert default_beta2(10) == 0.3 and default_beta2(32_000) == 1e-3
    batch = published()
    assert evaluate(Oapl(max_tokens=64), [batch]) == evaluate(Oapl(beta2=0.25), [batch])


def test_gspo_beyond_a_mean_log_ratio_of_ten_has_no_gradient() -> None:
    for mean in (9.0, 30.0):
        batch = tokens_of([[-1.0, -1.0]], [[-1.0 - mean, -1.0 - mean]], [-1.0])
        loss, grad = evaluate(OBJECTIVES.build(WIDE_GSPO), [batch], normalizer="seq_mean_token_mean")
        s = math.exp(min(mean, 10.0))
        assert loss == pytest.approx(s) and grad == pytest.approx([s / 2] * 2 if mean < 10 else [0.0] * 2)


def test_vespo_kernel() -> None:
    weights = [0.01, 0.1, 0.5, 1, 1.5, 2, 4, 8]
    rows = {
        True: [0.001949, 0.148797, 1.120422, 1, 0.502043, 0.199148, 0.001975, 0],
        False: [0.000007, 0.006050, 0.339785, 1, 1.241593, 1.082682, 0.158640, 0.000426],
    }
    vespo = Vespo()

    def phi(log_w: list[float], *, positive: bool) -> list[float]:
        log_w_N = torch.tensor(log_w, dtype=torch.float64)
        return vespo.phi_N(log_w_N, positive_N=torch.full_like(log_w_N, positive, dtype=torch.bool)).tolist()

    for positive, row in rows.items():
        assert phi([math.log(w) for w in weights], positive=positive) == pytest.approx(row, abs=1e-6)
        assert phi([math.nan], positive=positive) == [0]
    assert phi([math.log(2 / 3)], positive=True) == pytest.approx([1.208125], abs=1e-6)
    assert phi([25, -30, -1], positive=True) == pytest.approx([0, 2.008554e-15, 0.901551], rel=1e-6)
    assert phi([25, -30, -1], positive=False) == pytest.approx([0, 7.389056e-24, 0.176266], rel=3e-6)


def test_dual_clip_bounds_the_loss_of_bad_tokens() -> None:
    def step(logp: float, dual_clip: float) -> tuple[float, list[float]]:
        objective = OBJECTIVES.build({"name": "ppo", "dual_clip": dual_clip})
        return evaluate(objective, [tokens_of([[logp]], [[-3.0]], [-1.0])])

    assert step(-1.0, 3.0) == (3.0, [0.0])
    loss, grad = step(-1.0, 0.0)
    assert loss == pytest.approx(math.exp(2)) and grad == pytest.approx([math.exp(2)])
    assert step(-2.5, 3.0)[0] == pytest.approx(math.exp(0.5)), "below the ceiling the loss is unchanged"


def test_interpolated_prox() -> None:
    lag = [[6 - 1 - v for v in row] for row in ([3, 3, 4], [5, 5])]
    objective = DecoupledPpo(prox="interpolated")
    assert not objective.needs
    prox_logp_S = objective.prox_logp_S(published(lag=lag))
    assert prox_logp_S.tolist() == pytest.approx([-0.866667, -1.4, -0.55, -0.7, -1.2], abs=1e-6)


def test_m2po_drops_the_fewest_tokens() -> None:
    def kept(threshold: float) -> list[bool]:
        batch: SampledTokens = published()
        objective = M2po(threshold=threshold, variant="areal")
        stats = objective.summarize({name: v.double() for name, v in objective.observe(batch).items()})
        return objective.losses(batch, stats).means["kept_fraction"].tolist()

    assert kept(0.2) == [True] * 5
    assert kept(0.1) == [True, False, True, True, True]
    assert kept(0.04) == [True, False, False, True, True]
    assert kept(0.001) == [False] * 5


def test_maspo_gate() -> None:
    half = torch.tensor([math.log(0.5)], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert Maspo().sigma_S(half, one).item() == pytest.approx(1.268079, abs=1e-6)
    assert Maspo().sigma_S(half, -one).item() == pytest.approx(0.5**-0.3 / 1.03, abs=1e-6)
    assert Maspo().gate_S(1.5 * one, half, one).item() == pytest.approx(0.925209, abs=1e-6)
    assert Maspo().gate_S(1.5 * one, half, -one).item() == 1 == Maspo().gate_S(0.5 * one, half, one).item()
    assert Maspo().sigma_S(torch.tensor([-1000.0]), torch.ones(1)).item() == pytest.approx(10)


def test_dcpo_bounds() -> None:
    low_S, high_S = Dcpo().bounds_S(torch.tensor([0.9, 0.01, 1e-300], dtype=torch.float64).log())
    assert low_S.tolist() == pytest.approx([0.768742, 0.5, 0.5], abs=1e-6)
    assert high_S.tolist() == pytest.approx([1.187184, 5, 5], abs=1e-6)


def test_topr_tapers_only_bad_sequences() -> None:
    _, grad = evaluate(OBJECTIVES.build({"name": "topr"}), [published()])
    weights = [1.0] * 3 + [math.exp(-1)] * 2
    assert grad == pytest.approx([-w * a / 5 for w, a in zip(weights, [1, 1, 1, -1, -1], strict=True)])
    _, grad = evaluate(OBJECTIVES.build({"name": "topr"}), [tokens_of(BEHAVIOR_LOGP, LOGP, [-1.0, 1.0])])
    assert grad == pytest.approx([math.exp(-1) / 5] * 3 + [-0.2] * 2)
    _, grad = evaluate(OBJECTIVES.build({"name": "topr"}), [tokens_of(LOGP, BEHAVIOR_LOGP, [-1.0, 1.0])])
    assert grad == pytest.approx([0.2] * 3 + [-0.2] * 2), (
        "a bad sequence that has become likelier has weight 1"
    )


def test_dppo_drops_far_moved_tokens_and_pulls_all() -> None:
    old, new = [[math.log(0.3), math.log(0.3)]], [[math.log(0.6), math.log(0.45)]]
    _, up = evaluate(OBJECTIVES.build({"name": "dppo_tv"}), [tokens_of(new, old, [1.0])])
    pull = [2e-3 * math.log(2) / 2, 2e-3 * math.log(1.5) / 2]
    assert up == pytest.approx([pull[0], pull[1] - 1.5 / 2])
    _, down = evaluate(OBJECTIVES.build({"name": "dppo_tv"}), [tokens_of(new, old, [-1.0])])
    assert down == pytest.approx([pull[0] + 2 / 2, pull[1] + 1.5 / 2]), (
        "a bad token that has become likelier is not dropped"
    )
    _, back = evaluate(OBJECTIVES.build({"name": "dppo_tv", "pull": 0}), [tokens_of(old, new, [-1.0])])
    assert back == pytest.approx([0, 1 / 1.5 / 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo", "clip_low": 0}, "clip_low"),
        ({"name": "ppo", "dual_clip": 1.1}, "dual_clip=1.1"),
        (
            {"name": "decoupled_ppo", "prox": "none"},
            "use one of recomputed, interpolated",
        ),
        ({"name": "decoupled_ppo", "mode": "clip"}, "use one of truncate, mask, none"),
        ({"name": "gspo", "clip_high": 0}, "clip_high"),
        ({"name": "sapo", "tau_negative": 0}, "tau_negative"),
        ({"name": "maspo", "sigma": 0}, "sigma"),
        ({"name": "dcpo", "max_ratio": 1}, "max_ratio"),
        ({"name": "cispo", "high": 0}, "objective.high"),
        ({"name": "topr", "level": "batch"}, "objective.level"),
        ({"name": "dppo_tv", "high": 0}, "high"),
        ({"name": "m2po", "threshold": 0}, "threshold"),
        ({"name": "m2po", "variant": "verl"}, "use authors or areal"),
        ({"name": "vespo", "k_positive": 0}, "objective.k_positive must be above 0"),
        ({"name": "oapl", "beta2": -1}, "beta2"),
    ],
)
def test_error_messages_for_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES.build(settings)


def test_example_matches_the_published_inputs() -> None:
    batch = published()
    assert batch.log_w_N.tolist() == pytest.approx([1, -1]) and ADVANTAGES == [1, -1]
