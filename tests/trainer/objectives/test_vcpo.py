"""VCPO: published values, optimality of the baseline for known distributions, and settings."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from areal_like.config import KlConfig
from areal_like.errors import ConfigError
from tests.support.objective_helpers import ADVANTAGES, REWARDS, published, tokens_of
from trainer.batching.packing import PackedBatch
from trainer.batching.scope import Scope
from trainer.distributed.ranks import Ranks
from trainer.gradients.ghost_layers import SegmentRows
from trainer.gradients.ghost_tape import GhostTape
from trainer.gradients.optimal_baseline import optimal_baseline
from trainer.gradients.per_sequence import SequenceGradients
from trainer.objectives import OBJECTIVES, SampledTokens, build_objective
from trainer.objectives.normalizers import Normalizer
from trainer.objectives.vcpo import Vcpo, _log_unmeasured

PAPER = Vcpo(baseline_weights="gradient")
"""As published: the weights are in the norms of the baseline."""

ONE_RANK = cast(Ranks, SimpleNamespace(sum=lambda values: values))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def group_of(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


def stats_of(objective: Vcpo, batch: SampledTokens) -> dict[str, Tensor]:
    return objective.summarize({name: vector.double() for name, vector in objective.observe(batch).items()})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 0.795551),
        ({"step_size": "linear"}, 0.632901),
        ({"rho_ref": 0.55}, 1.0),
        ({"rho_ref": 1}, 0.795551),
        ({"rho_ref": 0.8, "step_size": "linear"}, 0.632901 / 0.8),
        ({"step_size": "none"}, 1.0),
    ],
)
def test_step_size_follows_the_effective_sample_size(settings: dict[str, Any], scale: float) -> None:
    objective = Vcpo(**settings, cap=1.0)
    stats = stats_of(objective, published())
    assert float(stats["rho"]) == pytest.approx(0.632901, abs=1e-6), "the ESS of the untruncated weights"
    assert objective.lr_scale(stats) == pytest.approx(scale, abs=1e-6)
    assert objective.lr_scale({}) == 1.0


def fresh_and_old(fresh: list[float], old: list[float]) -> SampledTokens:
    """Sequences of two tokens with these log W: sampled by the step's own weights, or the second token by
    older ones."""
    return tokens_of(
        [[-1.0, -2.0 + log_w] for log_w in (*fresh, *old)],
        [[-1.0, -2.0]] * (len(fresh) + len(old)),
        [1.0] * (len(fresh) + len(old)),
        lag=[[0.0, 0.0]] * len(fresh) + [[0.0, 1.0]] * len(old),
    )


def test_a_measured_reference_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """rho_f of log W = 0, 1 is (1 + e)^2 / (2 (1 + e^2)); a step counts by its share of fresh sequences."""
    _log_unmeasured.cache_clear()
    objective = Vcpo(rho_ref="measured", step_size="linear")
    rho_f = (1 + math.e) ** 2 / (2 * (1 + math.e**2))
    state = objective.initial_state()

    def after(batch: SampledTokens) -> tuple[float, float]:
        """(rho, rho_ref) of a step; keeps the state."""
        nonlocal state
        stats = stats_of(objective, batch)
        state = objective.next_state(state, stats)
        stats |= {"state": numbers(*state)}
        rho, reference = float(stats["rho"]), objective.step_metrics(stats)["rho_ref"]
        assert objective.lr_scale(stats) == pytest.approx(min(1, rho / reference))
        return rho, reference

    for _ in range(2):
        rho, reference = after(fresh_and_old([], [0.0, 1.0]))
        assert (rho, reference) == (pytest.approx(rho_f), 1.0), "nothing was measured yet"
    assert caplog.text.count("rho_ref stays 1 until there is one") == 1
    rho, reference = after(fresh_and_old([0.0, 1.0], []))
    assert rho == pytest.approx(reference) == pytest.approx(rho_f), "the first estimate, and a full step"
    _, reference = after(fresh_and_old([0.5, 0.5, 0.5], [2.0]))
    early, late = 0.05 * (1 - 0.05 * 0.75), 0.05 * 0.75
    expected = (early * rho_f + late * 1.0) / (early + late)
    assert reference == pytest.approx(expected)
    assert after(fresh_and_old([], [1.0]))[1] == pytest.approx(expected), "unchanged by old sequences"
    assert objective.next_state(state, {}) == state, "a step without data"


def test_a_broken_step_leaves_the_measured_reference() -> None:
    """Its log-probs are not numbers; the optimizer leaves the weights as they are."""
    objective = Vcpo(rho_ref="measured")
    for log_w in ([math.nan, 0.0], [math.inf, 0.0]):
        observed = {"log_w": torch.tensor(log_w).double(), "is_fresh": torch.ones(2).double()}
        assert objective.next_state((0.04, 0.05), objective.summarize(observed)) == (0.04, 0.05)


def test_a_reference_is_measured_only_where_it_is_used() -> None:
    for objective in (Vcpo(), Vcpo(rho_ref="measured", step_size="none")):
        assert objective.initial_state() == () and objective.step_metrics({}) == {}
        assert set(objective.observe(published())) == {"log_w"}
    composed = build_objective({"name": "vcpo", "rho_ref": "measured", "masks": [{"name": "opsm"}]})
    stats = {**stats_of(cast(Vcpo, composed), fresh_and_old([0.0, 1.0], [])), "0/other": numbers(1.0)}
    state = composed.next_state(composed.initial_state(), stats)
    assert state[0] / state[1] == pytest.approx(float(stats["rho"]))
    assert composed.lr_scale(stats | {"state": numbers(*state)}) == pytest.approx(1.0)


def test_published_baselines() -> None:
    w_N, lengths_N = torch.exp(numbers(1, -1)), numbers(3, 2)
    squares_N = w_N.square() * numbers(2, 5)
    assert squares_N.tolist() == pytest.approx([14.778112, 0.676676], abs=1e-6)
    rewards_N = numbers(*REWARDS)
    assert optimal_baseline(squares_N, rewards_N, group_of(2)).tolist() == pytest.approx(
        [0.956216] * 2, abs=1e-6
    )
    assert optimal_baseline(squares_N / lengths_N**2, rewards_N, group_of(2)).tolist() == pytest.approx(
        [0.906597] * 2, abs=1e-6
    )
    # In units of the advantage it is the same baseline minus the mean, divided by the standard deviation.
    shifted = optimal_baseline(squares_N, numbers(*ADVANTAGES), group_of(2))
    assert (0.5 + 0.5 * shifted).tolist() == pytest.approx([0.956216] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("std", "loss", "grad"),
    [(0.5, -0.410888, (-0.039673, 0.175886)), (1.0, -0.205444, (-0.019836, 0.087943))],
)
def test_published_losses_at_a_given_baseline(std: float, loss: float, grad: tuple[float, float]) -> None:
    batch = published()
    losses = PAPER.losses(batch, {})
    loss_S, _, num_seqs = Normalizer(name="seq_mean_token_mean", max_tokens=10).weigh(losses, batch)
    total = (loss_S * batch.spread_S((batch.reward_N - 0.956216) / std)).sum() / num_seqs
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == pytest.approx(loss, abs=1e-6)
    assert batch.logp_S.grad is not None
    assert batch.logp_S.grad.tolist() == pytest.approx([grad[0]] * 3 + [grad[1]] * 2, abs=1e-6)


SEQUENCES, RETURNS = [[0, 0, 1], [2, 1]], [1.0, 0.0]


class Tabular(nn.Module):
    """A softmax over three actions, the same at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(1, 3, bias=False).double()
        self.table.weight.data = numbers(0.5, -0.2, 0.1)[:, None]

    def forward(self, actions_S: Tensor) -> Tensor:
        logits_SV = self.table(torch.ones(len(actions_S), 1, dtype=torch.float64))
        out: Tensor = torch.log_softmax(logits_SV, -1).gather(1, actions_S[:, None]).sum(1)
        return out


def sampled_uniformly(model: Tabular, actions: list[list[int]], returns: list[float]) -> SampledTokens:
    """These sequences, sampled uniformly, with log-probs under the model; advantages are the returns."""
    flat_S = torch.tensor([a for row in actions for a in row])
    rows = [[math.log(1 / 3)] * len(row) for row in actions]
    collision = torch.softmax(model.table.weight.detach()[:, 0], 0).square().sum()
    return dataclasses.replace(
        tokens_of(rows, rows, returns, returns),
        logp_S=model(flat_S),
        collision_S=collision.expand(len(flat_S)),
    )


@pytest.mark.parametrize(
    ("normalizer", "ascent", "loss"),
    [
        ("seq_mean_token_sum", [0.629877, -0.205893, -0.423984], -0.643104),
        ("seq_mean_token_mean", [0.286326, -0.068227, -0.218099], -0.112180),
    ],
)
def test_tabular_gradient_matches_published_values(normalizer: str, ascent: list[float], loss: float) -> None:
    model = Tabular()
    objective = Vcpo(normalizer=normalizer, norms="exact", baseline_weights="gradient")
    gradients = cast(SequenceGradients, objective.gradients(cast(Any, model), ONE_RANK))
    norm = Normalizer(name=normalizer, max_tokens=10)
    with gradients:
        for actions, reward in zip(SEQUENCES, RETURNS, strict=True):
            batch = sampled_uniformly(model, [actions], [reward])
            loss_S, _, _ = norm.weigh(objective.losses(batch, {}), batch)
            gradients.add(
                loss_S,
                tokens=batch,
                batch=cast(PackedBatch, SimpleNamespace(is_continued=False, context=None)),
            )
        sums = gradients.finish()
    assert model.table.weight.grad is not None
    assert (-model.table.weight.grad[:, 0]).tolist() == pytest.approx(ascent, abs=1e-6)
    assert sums["loss"][0] == pytest.approx(loss, abs=1e-6)
    baseline = 0.815548 if normalizer == "seq_mean_token_sum" else 0.662742
    assert float(sums["baseline"][0]) / float(sums["baseline"][1]) == pytest.approx(baseline, abs=1e-6)


def test_tabular_norms_weights_and_sample_size() -> None:
    model = Tabular()
    batch = sampled_uniformly(model, SEQUENCES, RETURNS)
    assert batch.log_w_N.exp().tolist() == pytest.approx([1.317764, 0.638026], abs=1e-6)
    assert float(stats_of(Vcpo(), batch)["rho"]) == pytest.approx(0.892226, abs=1e-6)
    assert Vcpo().lr_scale(stats_of(Vcpo(), batch)) == pytest.approx(0.944577, abs=1e-6)
    tape = GhostTape(model)
    tape.attach()
    sampled_uniformly(model, SEQUENCES, RETURNS).logp_S.sum().backward()  # type: ignore[no-untyped-call]
    rows = SegmentRows.of([3, 2])
    assert tape.squares(rows, rows).tolist() == pytest.approx([1.337785, 1.290681], abs=1e-6)
    scores = [dict(tape.combined(numbers(*pick)))["table.weight"][:, 0].tolist() for pick in ([1, 0], [0, 1])]
    tape.detach()
    assert scores[0] == pytest.approx([0.615537, 0.312496, -0.928033], abs=1e-6)
    assert scores[1] == pytest.approx([-0.922975, 0.541664, 0.381311], abs=1e-6)


@pytest.mark.parametrize("baseline_weights", ["gradient", "score"])
@pytest.mark.parametrize("baseline", ["group", "batch"])
def test_proxy_norms_are_exact_for_a_tabular_policy(baseline: str, baseline_weights: str) -> None:
    """With one token per sequence, the gradient with respect to the logits is the whole gradient."""
    model = Tabular()
    batch = sampled_uniformly(model, [[0], [1], [2], [2]], [1.0, 0.0, 0.5, 0.25])
    pi_N = batch.logp_S.detach().exp()
    others = torch.softmax(model.table.weight.detach()[:, 0], 0).square().sum()
    squares_N = (3 * pi_N if baseline_weights == "gradient" else 1.0) ** 2 * (1 - 2 * pi_N + others)
    want = optimal_baseline(squares_N, batch.reward_N, group_of(4))
    objective = Vcpo(norms="proxy", baseline=baseline, baseline_weights=baseline_weights)
    assert objective.scope is (Scope.BATCH if baseline == "batch" else Scope.GROUP)
    losses = objective.losses(batch, stats_of(objective, batch))
    assert losses.means["baseline"].tolist() == pytest.approx(want.tolist(), rel=1e-12)
    (grad_S,) = torch.autograd.grad(losses.loss_S.sum(), batch.logp_S)
    assert grad_S.tolist() == pytest.approx((-3 * pi_N * (batch.reward_N - want)).tolist(), rel=1e-12)


def test_without_baseline_vcpo_equals_tis() -> None:
    tis = OBJECTIVES.build({"name": "tis", "level": "sequence", "cap": 2.0})
    vcpo = Vcpo(baseline="none", cap=2.0).losses(published(), {})
    assert torch.equal(vcpo.loss_S, tis.losses(published(), {}).loss_S)
    plain = Vcpo(baseline="none", cap=0).losses(published(), {})
    assert torch.equal(plain.loss_S, OBJECTIVES.build({"name": "reinforce"}).losses(published(), {}).loss_S)


def test_baselines_of_several_groups_and_leave_one_out() -> None:
    squares_N, returns_N = numbers(1, 2, 3, 4, 5), numbers(1, 0, 2, 3, 7)
    groups_N = torch.tensor([9, 4, 9, 4, 2])
    assert optimal_baseline(squares_N, returns_N, groups_N).tolist() == pytest.approx([7 / 4, 2, 7 / 4, 2, 7])
    others = optimal_baseline(squares_N, returns_N, groups_N, leave_one_out=True)
    assert others.tolist() == pytest.approx([2, 3, 1, 0, 7]), (
        "a group of one sequence is its own baseline: coefficient zero"
    )


def test_equal_returns_give_exactly_zero_coefficients() -> None:
    squares_N, returns_N = torch.rand(7, dtype=torch.float64), torch.full((7,), 0.1, dtype=torch.float64)
    for leave_one_out in (False, True):
        assert torch.equal(
            optimal_baseline(squares_N, returns_N, group_of(7), leave_one_out=leave_one_out), returns_N
        )
    nothing = optimal_baseline(torch.zeros(2), numbers(1, 0), group_of(2))
    assert nothing.tolist() == [0.5, 0.5], "all weights underflowed"
    dominated = optimal_baseline(
        numbers(1e300, 1e-30, 1e-30), numbers(1, 0, 0.5), group_of(3), leave_one_out=True
    )
    assert torch.isfinite(dominated).all() and dominated.min() >= 0 and dominated.max() <= 1


def test_sample_size_of_extreme_weights() -> None:
    for logp in (-1000.0, 0.0):
        batch = tokens_of([[logp], [-1.0]], [[-1000.0 - logp], [-1.0]], ADVANTAGES)
        stats = stats_of(Vcpo(), batch)
        assert float(stats["rho"]) == pytest.approx(0.5), "one weight of two outweighs the other"
        assert Vcpo().lr_scale(stats) == pytest.approx(0.5**0.5)


def test_baseline_is_unbiased_and_optimal_in_the_population() -> None:
    """For known mu, pi and r, the mean does not depend on the baseline and the variance is least at b*."""
    generator = torch.Generator().manual_seed(0)
    num_samples = 200_000
    logits_V, reward_V = numbers(0.4, -0.3, 0.9, 0.0), numbers(1.0, 0.2, -0.5, 0.6)
    mu_V = numbers(0.4, 0.3, 0.1, 0.2)
    pi_V = torch.softmax(logits_V, 0)
    action_N = torch.multinomial(mu_V, num_samples, replacement=True, generator=generator)
    rows = pi_V.log()[action_N, None].tolist(), mu_V.log()[action_N, None].tolist()
    batch = tokens_of(*rows, [1.0] * num_samples)
    (grad_S,) = torch.autograd.grad(PAPER.losses(batch, {}).loss_S.sum(), batch.logp_S)
    weight_N = -grad_S  # one token per sequence
    assert float(weight_N.max()) < Vcpo().cap, "truncation would bias the mean"
    score_NV = torch.eye(4, dtype=torch.float64)[action_N] - pi_V
    g_NV = weight_N[:, None] * score_NV
    squares_V = (pi_V / mu_V).square() * (torch.eye(4) - pi_V).square().sum(1)
    best = float((mu_V * squares_V * reward_V).sum() / (mu_V * squares_V).sum())

    estimated = float(optimal_baseline(g_NV.square().sum(1), reward_V[action_N], group_of(num_samples))[0])
    residual_N = squares_V[action_N] * (reward_V[action_N] - best) / float((mu_V * squares_V).sum())
    assert abs(estimated - best) < 3 * float(residual_N.std()) / num_samples**0.5

    true_V = pi_V * (reward_V - (pi_V * reward_V).sum())  # grad of sum pi r
    at_best_N = (g_NV * (reward_V[action_N] - best)[:, None]).square().sum(1)
    mean_reward = float((mu_V * reward_V).sum())
    assert abs(best - mean_reward) > 0.05, "the example must have a baseline that differs from the mean"
    for other in (0.0, mean_reward, float((pi_V * reward_V).sum()), best - 0.2, best + 0.2):
        terms_NV = g_NV * (reward_V[action_N] - other)[:, None]
        assert ((terms_NV.mean(0) - true_V).abs() < 3 * terms_NV.std(0) / num_samples**0.5).all()
        # The means are equal, so the difference of variances is that of the second moments.
        excess_N = terms_NV.square().sum(1) - at_best_N
        assert float(excess_N.mean()) > 3 * float(excess_N.std()) / num_samples**0.5


def test_requirements_of_each_setting() -> None:
    ghost, exact, proxy = (Vcpo(norms=norms) for norms in ("ghost", "exact", "proxy"))
    assert ghost.whole_groups and not ghost.one_sequence_per_microbatch and ghost.late_coefficients
    assert exact.one_sequence_per_microbatch and not exact.whole_groups and exact.late_coefficients
    assert proxy.whole_groups and not proxy.late_coefficients and proxy.needs
    assert not ghost.skips_zero_advantage and Vcpo(step_size="none").skips_zero_advantage
    assert not Vcpo(baseline="batch").whole_groups


def test_automatic_norms_of_large_models_are_by_proxy() -> None:
    assert (Vcpo().for_model(10**9).norms, Vcpo().for_model(10**9 + 1).norms) == ("ghost", "proxy")
    assert Vcpo(norms="exact").for_model(8 * 10**9).norms == "exact"
    masked = build_objective({"name": "vcpo", "masks": [{"name": "band"}]}, max_tokens=8)
    assert masked.late_coefficients and not masked.for_model(8 * 10**9).late_coefficients


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"norms": "ghosts"},
            "norms=ghosts: did you mean ghost[?] use one of auto, ghost, exact, proxy",
        ),
        ({"step_size": "cubic"}, "use one of sqrt, linear, none"),
        ({"rho_ref": 0}, "rho_ref above 0"),
        ({"cap": -1}, "objective.cap must be at least 0"),
        ({"leave_one_out": True, "baseline": "batch"}, "leave_one_out needs objective.baseline=group"),
        ({"leave_one_out": True, "norms": "exact"}, "not objective.norms=exact"),
    ],
)
def test_error_messages_for_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OBJECTIVES.build({"name": "vcpo", **settings})


def test_other_loss_terms_are_refused_unless_by_proxy() -> None:
    kl = KlConfig(coef=0.1, place="loss")
    with pytest.raises(ConfigError, match="allows no other terms in its loss"):
        build_objective({"name": "vcpo"}, kl=kl)
    build_objective({"name": "vcpo", "norms": "proxy"}, kl=kl)
