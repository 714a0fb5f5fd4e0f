"""Cases that the authors' released code has computed, in float64: `released_code/*.json`.

VESPO (FloyedShen/VESPO aa1f304), OAPL (danieldritter/OAPL 6153219), VCPO (mit-han-lab/vcpo c7f030f, as its
README has it), M2PO (Infini-AI-Lab/M2PO af54a3e) and DCPO (lime-RL/DCPO 01787b0: its bounds and its clip,
where its dual clip has no effect). Near, stale, far and extreme batches, groups without a spread of rewards,
groups whose samples are not adjacent. The inputs are exact as written, the outputs rounded to twelve digits.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.objective_helpers import evaluate, tokens_of
from trainer.gradients.optimal_baseline import optimal_baseline
from trainer.objectives import Dcpo, M2po, Oapl, SampledTokens, Vespo
from trainer.objectives.importance import ess_ratio
from trainer.objectives.oapl import SoftAdvantage
from trainer.objectives.vcpo import Vcpo

TOLERANCE = 1e-6
CASES = Path(__file__).parent / "released_code"


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in json.loads((CASES / f"{name}.json").read_text())]


def batch_of(case: dict[str, Any], advantages: list[float]) -> SampledTokens:
    ends = list(itertools.accumulate(case["lengths"], initial=0))
    logp, behavior_logp = (
        [case[key][begin:end] for begin, end in itertools.pairwise(ends)] for key in ("logp", "behavior_logp")
    )
    return tokens_of(logp, behavior_logp, advantages)


def members(case: dict[str, Any]) -> dict[int, list[int]]:
    """Group -> its sequences."""
    groups = sorted(set(case["group"]))
    return {group: [i for i, of in enumerate(case["group"]) if of == group] for group in groups}


@pytest.mark.parametrize("normalizer", ["seq_mean_token_mean", "token_mean"])
@pytest.mark.parametrize("case", cases("vespo"))
def test_vespo(case: dict[str, Any], normalizer: str) -> None:
    loss, grad = evaluate(
        Vespo(**case["settings"]), [batch_of(case, case["advantage"])], normalizer=normalizer
    )
    assert loss == pytest.approx(case[f"loss_{normalizer}"], abs=TOLERANCE, rel=TOLERANCE)
    assert grad == pytest.approx(case[f"grad_logp_{normalizer}"], abs=TOLERANCE)


@pytest.mark.parametrize("case", cases("oapl"))
def test_oapl(case: dict[str, Any]) -> None:
    soft = SoftAdvantage(beta1=case["settings"]["beta1"])
    advantages = [0.0] * len(case["reward"])
    for group, indices in members(case).items():
        rewards = np.array([case["reward"][i] for i in indices])
        found = soft.of_rewards(rewards)
        assert (rewards - found).tolist() == pytest.approx(
            [case["value"][group]] * len(indices), abs=TOLERANCE
        )
        for index, advantage in zip(indices, found, strict=True):
            advantages[index] = float(advantage)
    loss, grad = evaluate(Oapl(**case["settings"]), [batch_of(case, advantages)])
    assert loss == pytest.approx(case["loss"], abs=TOLERANCE, rel=TOLERANCE)
    assert grad == pytest.approx(case["grad_logp"], abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("case", cases("vcpo"))
def test_vcpo(case: dict[str, Any]) -> None:
    objective = Vcpo(**case["settings"], baseline_weights="gradient")
    batch = batch_of(case, case["reward"])
    losses = objective.losses(batch, {})
    (grad_S,) = torch.autograd.grad(losses.loss_S.sum(), batch.logp_S)
    weight_N = -batch.mean_N(grad_S)  # the loss is -w log pi; A - b* comes later
    assert weight_N.tolist() == pytest.approx(case["weight"], abs=TOLERANCE)
    assert ess_ratio(batch.log_w_N.detach()) == pytest.approx(case["ess_ratio"], abs=TOLERANCE)
    stats = objective.summarize({"log_w": batch.log_w_N.detach()})
    assert objective.lr_scale(stats) == pytest.approx(case["lr_scale"], abs=TOLERANCE)
    rewards_N = torch.tensor(case["reward"], dtype=torch.float64)
    squares_N = weight_N.square() * torch.tensor(case["grad_norm_sq"], dtype=torch.float64)
    baseline_N = optimal_baseline(squares_N, rewards_N, torch.tensor(case["group"]))
    for group, indices in members(case).items():
        assert baseline_N[indices].tolist() == pytest.approx(
            [case["baseline"][group]] * len(indices), abs=TOLERANCE
        )
        std = float(rewards_N[indices].std(correction=0)) or 1.0
        coefficients = (weight_N * (rewards_N - baseline_N))[indices] / std
        assert coefficients.tolist() == pytest.approx(
            [case["coefficient"][i] for i in indices], abs=TOLERANCE, rel=TOLERANCE
        )


@pytest.mark.parametrize("case", cases("m2po"))
def test_m2po(case: dict[str, Any]) -> None:
    objective = M2po(**case["settings"])
    batch = batch_of(case, case["advantage"])
    stats = objective.summarize({name: v.double() for name, v in objective.observe(batch).items()})
    tau = float(stats["bound"].sqrt())
    assert (None if np.isinf(tau) else tau) == pytest.approx(case["tau"], abs=TOLERANCE)
    assert objective.losses(batch, stats).means["clipped_fraction"].tolist() == case["clipped"]
    loss, grad = evaluate(objective, [batch])
    assert loss == pytest.approx(case["loss"], abs=TOLERANCE, rel=TOLERANCE)
    assert grad == pytest.approx(case["grad_logp"], abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("case", cases("dcpo"))
def test_dcpo(case: dict[str, Any]) -> None:
    """The release caps the upper bound at 10 at least; the default here is 5."""
    objective = Dcpo(**case["settings"])
    batch = batch_of(case, case["advantage"])
    low_S, high_S = objective.bounds_S(batch.behavior_logp_S)
    assert low_S.tolist() == pytest.approx(case["low"], abs=TOLERANCE)
    assert high_S.tolist() == pytest.approx(case["high"], abs=TOLERANCE)
    loss, grad = evaluate(objective, [batch])
    assert loss == pytest.approx(case["loss"], abs=TOLERANCE, rel=TOLERANCE)
    assert grad == pytest.approx(case["grad_logp"], abs=TOLERANCE, rel=TOLERANCE)


def test_m2po_clips_harmful_tokens_alone() -> None:
    """By hand: log r = -1 .1 .1 .1 at A = 1. Three tokens count, their mean square is below the bound.

    The first, which has moved away from its reward, is trained on. AReaL's variant drops it.
    """
    tokens = tokens_of([[-2.0, -0.9, -0.9, -0.9]], [[-1.0] * 4], [1.0])
    ratios = np.exp([-1.0, 0.1, 0.1, 0.1])
    _, grad = evaluate(M2po(), [tokens])
    assert grad == pytest.approx((-ratios / 4).tolist())
    _, grad = evaluate(M2po(variant="areal"), [tokens])
    assert grad == pytest.approx([0.0, *(-ratios[1:] / 4)])
