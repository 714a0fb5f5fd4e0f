"""Properties of every registered objective and mask; a new one is tested here automatically.

Objectives with `late_coefficients`, whose losses lack coefficients, and those that compare the samples of a
whole group, which cannot be cut, are tested here for precision and reach only. Other tests cover the rest.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_like.config import DistillConfig
from tests.support.objective_helpers import NORMALIZERS, Rows, evaluate, tokens_of
from trainer.batching.scope import Scope
from trainer.metrics.step_totals import StepTotals
from trainer.objectives import MASKS, OBJECTIVES, Objective, SampledTokens, build_objective
from trainer.objectives.base import StepStats
from trainer.objectives.normalizers import Normalizer

REGISTERED: list[dict[str, Any]] = [
    {"name": name}
    for name, objective in ((name, OBJECTIVES.build({"name": name})) for name in OBJECTIVES.names())
    if not objective.late_coefficients and not objective.whole_groups
]
VARIANTS: list[dict[str, Any]] = [
    {"name": "ppo", "dual_clip": 3.0},
    {"name": "decoupled_ppo", "prox": "interpolated"},
    {"name": "decoupled_ppo", "level": "sequence", "mode": "mask"},
    {"name": "gspo", "clip_low": 0.2, "clip_high": 0.3},
    {"name": "m2po", "variant": "areal"},
    {"name": "topr", "level": "token"},
    {"name": "oapl", "beta2": 1e-3},
    {"name": "vcpo", "baseline": "none"},
    {"name": "lad", "divergence": "hellinger", "eta": 1.0},
    {"name": "lad", "divergence": "tv", "level": "token"},
    *(
        {"name": "tis", "level": level, "normalize": normalize}
        for level in ("token", "sequence", "geometric")
        for normalize in (False, True)
    ),
    *(
        {"name": "tis", "level": level, "mode": "mask", "denominator": "kept", "normalize": normalize}
        for level, normalize in (("token", False), ("sequence", False), ("sequence", True))
    ),
]
MASKED: list[dict[str, Any]] = [
    {"name": "tis", "masks": [{"name": "stapo", "max_prob": 0.3}]},
    {"name": "vespo", "masks": [{"name": "opsm"}, {"name": "band", "low": 0.8, "denominator": "kept"}]},
    {"name": "m2po", "masks": [{"name": "stapo", "max_prob": 0.3}, {"name": "band", "level": "token"}]},
    {"name": "oapl", "masks": [{"name": "band", "level": "token"}]},
    {"name": "tis", "masks": [{"name": "kpop", "max_kl": 0.5}]},
    {"name": "ppo", "masks": [{"name": "trust_region", "mean_kl": 0.5}]},
]
ALL = REGISTERED + VARIANTS + MASKED
WHOLE_GROUPS: list[dict[str, Any]] = [
    {"name": "vcpo"},
    {"name": "vcpo", "baseline_weights": "gradient", "cap": 0.0},
    {"name": "vcpo", "norms": "proxy"},
    {"name": "vcpo", "norms": "proxy", "leave_one_out": True},
    {"name": "vcpo", "norms": "proxy", "baseline": "batch"},
    *(
        {"name": name, "pairs": pairs, "anchor": anchor}
        for name in ("online_dpo", "rebel")
        for pairs, anchor in (("best_worst", "reference"), ("all", "behavior"))
    ),
]
EACH_MASK: list[dict[str, Any]] = [
    {"name": "tis", "level": "token", "masks": [{"name": name}]} for name in MASKS.names()
]
ON_POLICY: dict[str, Callable[[Any, float], float]] = {
    "oapl": lambda objective, advantage: 2 * (objective.beta2 or 0.25) * advantage,
    "sppo": lambda objective, advantage: 2 * (objective.beta or 0.25) * advantage,
    "lad": lambda objective, advantage: lad_advantage(objective.divergence, advantage / objective.eta),
}
"""Objectives whose on-policy gradient is that of REINFORCE with another advantage."""


def lad_advantage(divergence: str, u: float) -> float:
    """-f'(exp(-u)), with the derivatives from a table of f-divergences."""
    x = math.exp(-u)
    slopes = {
        "js": 0.5 * math.log(2 * x / (x + 1)),
        "hellinger": 0.5 * (1 - 1 / math.sqrt(x)),
        "tv": math.copysign(0.5, x - 1),
    }
    return -slopes[divergence]


def rows(seed: int, lengths: Sequence[int], *, high: float) -> Rows:
    numbers = random.Random(seed)
    return [[-numbers.uniform(0.05, high) for _ in range(length)] for length in lengths]


LENGTHS = (3, 1, 4, 2, 5)
DATA: dict[str, Any] = {
    "logp": rows(1, LENGTHS, high=2.0),
    "behavior_logp": rows(2, LENGTHS, high=2.0),
    "advantages": [1.0, -1.5, 0.5, -0.25, 2.0],
    "prox_logp": rows(3, LENGTHS, high=2.0),
    "entropy": [[-x for x in row] for row in rows(4, LENGTHS, high=3.0)],
    "lag": [[float(i % 3) for i, _ in enumerate(row)] for row in rows(5, LENGTHS, high=1.0)],
}


def batch_of(places: Sequence[int], **changes: Any) -> SampledTokens:
    """The sequences of DATA at these indices, in this order."""
    data = {**DATA, **changes}
    return tokens_of(**{name: [values[i] for i in places] for name, values in data.items()})


def by_sequence(places: Sequence[int], grad: Sequence[float]) -> dict[int, list[float]]:
    at = 0
    out = {}
    for place in places:
        out[place] = list(grad[at : at + LENGTHS[place]])
        at += LENGTHS[place]
    return out


def stats_of(objective: Objective, batch: SampledTokens) -> StepStats:
    if objective.scope is not Scope.BATCH:
        return {}
    return objective.summarize(
        {name: vector.detach().double() for name, vector in objective.observe(batch).items()}
    )


@pytest.mark.parametrize("settings", REGISTERED + VARIANTS, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_on_policy_the_gradient_is_reinforce(settings: dict[str, Any], normalizer: str) -> None:
    objective = build_objective(settings)
    on_policy = DATA["behavior_logp"]
    batch = batch_of(range(5), logp=on_policy, prox_logp=on_policy)
    of = ON_POLICY.get(settings["name"], lambda _, advantage: advantage)
    plain_batch = batch_of(
        range(5),
        logp=on_policy,
        prox_logp=on_policy,
        advantages=[of(objective, advantage) for advantage in DATA["advantages"]],
    )
    _, plain = evaluate(
        build_objective({"name": "reinforce"}), [plain_batch], normalizer=objective.normalizer or normalizer
    )
    _, grad = evaluate(objective, [batch], normalizer=normalizer)
    assert grad == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_order_and_cuts_do_not_change_the_gradient(settings: dict[str, Any], normalizer: str) -> None:
    objective = build_objective(settings)
    loss, grad = evaluate(objective, [batch_of(range(5))], normalizer=normalizer)
    want = by_sequence(range(5), grad)
    assert any(grad) or settings["name"] == "gspo", "the data must give a gradient"
    for cut in ([[3, 0, 4, 1, 2]], [[0], [1, 2], [3, 4]], [[4, 2], [1], [3, 0]]):
        got_loss, got = evaluate(objective, [batch_of(part) for part in cut], normalizer=normalizer)
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for place, values in by_sequence([i for part in cut for i in part], got).items():
            assert values == pytest.approx(want[place], rel=1e-12)


@pytest.mark.parametrize("settings", ALL + WHOLE_GROUPS, ids=str)
def test_a_loss_reaches_only_its_own_tokens_log_prob(settings: dict[str, Any]) -> None:
    objective = build_objective(settings)
    batch = replace(
        batch_of(range(5), rewards=[1.0, 0.0, 0.5, 0.25, 0.75]),
        collision_S=torch.full((sum(LENGTHS),), 0.1, dtype=torch.float64),
    )
    loss_S = objective.losses(batch, stats_of(objective, batch)).loss_S
    for t in range(len(loss_S)):
        (grad_S,) = torch.autograd.grad(loss_S[t], batch.logp_S, retain_graph=True)
        grad_S[t] = 0
        assert not grad_S.any()


def in_dtype(batch: SampledTokens, dtype: torch.dtype, *, rounded_to: torch.dtype) -> SampledTokens:
    """The batch with all floats rounded to a type, in tensors of another."""
    floats = {
        field.name: value.detach().to(rounded_to).to(dtype)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor) and value.is_floating_point()
    }
    floats["logp_S"].requires_grad_()
    return replace(batch, **floats)


def far_apart(extreme: float) -> tuple[Rows, Rows]:
    """Log-probs of which some differ by a thousand."""
    mild = -0.5
    near, far = min(extreme, 0.0) or mild, min(-extreme, 0.0) or mild
    return [[near, mild], [mild, mild], [near] * 3], [[far, mild], [mild, mild], [far] * 3]


CASES: dict[str, SampledTokens] = {
    "near": batch_of(range(5)),
    "on-policy": batch_of(range(5), logp=DATA["behavior_logp"], prox_logp=DATA["behavior_logp"]),
    "without an advantage": batch_of(range(5), advantages=[0.0] * 5),
    "one token each": tokens_of([[-0.1], [-2.0], [-0.4]], [[-0.3], [-0.2], [-0.4]], [1.0, -1.0, 0.5]),
    **{
        f"far, {extreme}, {sign}": tokens_of(
            *far_apart(extreme), [sign, -sign, sign], lag=[[2.0] * 2, [2.0] * 2, [2.0] * 3]
        )
        for extreme in (1000.0, -1000.0)
        for sign in (1.0, -1.0)
    },
}


@pytest.mark.parametrize("settings", ALL + WHOLE_GROUPS + EACH_MASK, ids=str)
def test_float32_gives_the_losses_of_float64(settings: dict[str, Any]) -> None:
    """The trainer computes in float32, on log-probs that an engine may have rounded to bfloat16."""
    objective = build_objective(settings)
    for name, case in CASES.items():
        spread_N = 0.0 if name == "without an advantage" else torch.arange(len(case.length_N)) % 3 / 2.0
        case = replace(
            case,
            reward_N=torch.zeros_like(case.length_N) + spread_N,
            collision_S=case.logp_S.detach().exp() ** 2 + 0.01,
        )
        for rounded_to in (torch.float32, torch.bfloat16):
            results = []
            for dtype in (torch.float64, torch.float32):
                batch = in_dtype(case, dtype, rounded_to=rounded_to)
                losses = objective.losses(batch, stats_of(objective, batch))
                (grad_S,) = torch.autograd.grad(losses.loss_S.sum(), batch.logp_S, allow_unused=True)
                results.append((losses.loss_S.detach(), grad_S, *losses.means.values()))
            for want, got in zip(*results, strict=True):
                where = f"{name}, {rounded_to}"
                assert got.isfinite().all(), where
                atol = 1e-6 * (1 + float(want.double().abs().sum()))
                torch.testing.assert_close(
                    got.double(), want.double(), rtol=1e-5, atol=atol, msg=lambda m, w=where: f"{w}: {m}"
                )


@pytest.mark.parametrize("settings", ALL + WHOLE_GROUPS + EACH_MASK + [{"name": "distill"}], ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_no_number_is_read_during_a_step(settings: dict[str, Any], normalizer: str) -> None:
    """On a GPU the host would wait for it. A tensor without memory cannot be read."""
    for coef in (0.0, 0.5):
        distill = DistillConfig(teachers={"default": "x"}, coef=coef) if coef else None
        if coef and not build_objective(settings).takes_token_advantages:
            continue
        objective = build_objective(settings, distill=distill)
        batch = replace(
            batch_of(range(5), rewards=[1.0, 0.0, 0.5, 0.25, 0.75]),
            collision_S=torch.full((sum(LENGTHS),), 0.1, dtype=torch.float64),
        )
        stats = stats_of(objective, batch)
        tensors = {each.name: getattr(batch, each.name) for each in fields(batch)}
        blank = {name: each.detach().to("meta") for name, each in tensors.items() if each is not None}
        blank["logp_S"].requires_grad_()
        batch = replace(batch, **blank)
        losses = objective.losses(batch, stats)
        norm = Normalizer(name=objective.normalizer or normalizer, max_tokens=10)
        loss_S, *counted = norm.weigh(losses, batch)
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        StepTotals().observe(batch, losses, counted=counted, live=True)
        assert all(vector.is_meta for vector in objective.observe(batch).values())


@pytest.mark.parametrize("settings", ALL + WHOLE_GROUPS, ids=str)
@pytest.mark.parametrize("denominator", ["original", "kept"])
def test_with_all_tokens_masked_there_is_no_gradient(settings: dict[str, Any], denominator: str) -> None:
    mask = {"name": "truncated", "denominator": denominator}
    objective = build_objective({**settings, "masks": [*settings.get("masks", []), mask]})
    batch = replace(
        batch_of(range(5), truncated=[True] * 5), collision_S=torch.full((sum(LENGTHS),), 0.1).double()
    )
    loss, grad = evaluate(objective, [in_dtype(batch, torch.float32, rounded_to=torch.float32)])
    assert loss == 0 and not any(grad)


def weighted(logp_S: Tensor, grad_S: Tensor) -> Tensor:
    """-sg(w) A log pi: the loss is its own gradient times log pi."""
    return grad_S * logp_S


def gated(_: Tensor, grad_S: Tensor) -> Tensor:
    """-sg(F) r A: the loss is its own gradient."""
    return grad_S


DETACHED = {
    "reinforce": weighted,
    "tis": weighted,
    "cispo": weighted,
    "topr": weighted,
    "vespo": weighted,
    "vcpo": weighted,
    "lad": weighted,
    "distill": weighted,
    "maspo": gated,
}
"""Losses with detached weights; all others are tested by finite differences."""


@pytest.mark.parametrize("settings", REGISTERED + VARIANTS, ids=str)
def test_gradient_matches_finite_differences(settings: dict[str, Any]) -> None:
    objective = build_objective(settings)
    batch = batch_of(range(5))
    stats = stats_of(objective, batch)
    if "bound" in stats and settings.get("variant") != "areal":
        # The token that sets M2PO's bound lies on the clip's edge, where there is no derivative.
        stats["bound"] = 0.99 * stats["bound"]
    loss_S = objective.losses(batch, stats).loss_S
    (grad_S,) = torch.autograd.grad(loss_S.sum(), batch.logp_S)
    if settings["name"] in DETACHED:
        assert torch.allclose(DETACHED[settings["name"]](batch.logp_S, grad_S), loss_S, rtol=1e-12)
        return
    # An interpolated prox moves with log pi; it is held fixed here, as in the gradient.
    if settings.get("prox") == "interpolated":
        prox_logp_S = objective.prox_logp_S(batch)  # type: ignore[attr-defined]
        settings, changes = {**settings, "prox": "recomputed"}, {"prox_logp": split(prox_logp_S)}
        objective = build_objective(settings)
    else:
        changes = {}
    step = 1e-6
    for t in range(len(grad_S)):
        values = []
        for sign in (1, -1):
            flat = batch.logp_S.detach().clone()
            flat[t] += sign * step
            values.append(
                objective.losses(batch_of(range(5), logp=split(flat), **changes), stats).loss_S.sum().item()
            )
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad_S[t].item(), rel=1e-6, abs=1e-8)


def split(flat_S: Tensor) -> Rows:
    return [part.tolist() for part in torch.split(flat_S.detach(), LENGTHS)]
