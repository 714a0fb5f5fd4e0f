"""Losses and gradients against those that TRL's own functions had (`record_trl.py`, TRL 1.16.0).

CPOTrainer and ORPOTrainer are in `trl.experimental` of that version. Its DPOTrainer has no label smoothing in
the loss `sigmoid`: cDPO is compared with CPOTrainer's formula on log-ratios.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_like.config.preferences import PreferenceOptimizationConfig
from areal_like.errors import ConfigError
from trainer.preferences import losses
from trainer.preferences.methods import (
    Completions,
    Kto,
    PairMethod,
    build_method,
    ranked_right,
    share_ranked_right,
)

RECORDED = json.loads(Path(__file__).with_name("trl.json").read_text())
TOLERANCE = 1e-5
METHODS = ("dpo", "ipo", "kto", "simpo", "orpo")
KL = torch.tensor(0.25, dtype=torch.float64)
LABELS = torch.tensor([True, False, True, False])


def cases(*names: str) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{case['name']}-{number}")
        for name in names
        for number, case in enumerate(RECORDED["cases"][name])
    ]


def method_of(name: str, settings: dict[str, float]) -> PairMethod | Kto:
    given: dict[str, Any] = {"method": {"cdpo": "dpo"}.get(name, name), **settings}
    return build_method(PreferenceOptimizationConfig(**given))


def alternating(values: Any) -> Tensor:
    """All chosen, then all rejected, as chosen and rejected in turn."""
    return torch.tensor(values, dtype=torch.float64).unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def losses_of(name: str, settings: dict[str, float], given: Completions, **kto: Tensor) -> Tensor:
    """Losses of pairs, of which the even completions are chosen and the next ones rejected; or of KTO."""
    method = method_of(name, settings)
    if isinstance(method, Kto):
        return method.losses(given, kto["is_desirable_N"], kto["kl"])
    score_N = method.scores(given)
    return method.losses(score_N[0::2] - score_N[1::2])


def near(ours: Tensor, theirs: Any) -> None:
    """Equal to 1e-5, or 1e-5 of the value: theirs are float32."""
    torch.testing.assert_close(
        ours.detach(), torch.as_tensor(theirs, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(("name", "case"), cases("dpo", "cdpo", "ipo"))
def test_losses_of_pairs_are_those_of_trl(name: str, case: dict[str, Any]) -> None:
    logp_N = alternating(case["logp"]).requires_grad_()
    given = Completions(
        logp_N=logp_N, ref_logp_N=alternating(case["ref"]), num_tokens_N=alternating(case["lengths"])
    )
    loss = losses_of(name, case["settings"], given).mean()
    loss.backward()
    near(loss, case["loss"])
    assert logp_N.grad is not None
    near(logp_N.grad, alternating(case["grad"]))
    if name != "cdpo":
        reward_N = method_of(name, case["settings"]).rewards(given).detach()
        margin = reward_N[0::2] - reward_N[1::2]
        near(margin.mean(), case["margin"])
        assert float(ranked_right(margin).mean()) == pytest.approx(case["accuracy"])


@pytest.mark.parametrize(("name", "case"), cases("kto"))
def test_kto_is_that_of_trl(name: str, case: dict[str, Any]) -> None:
    logp_N = torch.tensor(case["logp"], dtype=torch.float64, requires_grad=True)
    ref_N, kl_logp_M, kl_ref_M = (
        torch.tensor(case[key], dtype=torch.float64) for key in ("ref", "kl_logp", "kl_ref")
    )
    kl = losses.mismatched_kl(kl_logp_M - kl_ref_M)
    near(kl, case["kl"])
    given = Completions(logp_N=logp_N, ref_logp_N=ref_N, num_tokens_N=torch.ones_like(ref_N))
    label_N = torch.tensor(case["label"])
    loss = losses_of(name, case["settings"], given, is_desirable_N=label_N, kl=kl).mean()
    loss.backward()
    near(loss, case["loss"])
    assert logp_N.grad is not None
    near(logp_N.grad, case["grad"])


@pytest.mark.parametrize(("name", "case"), cases("simpo", "orpo"))
def test_losses_without_reference_are_those_of_trl(name: str, case: dict[str, Any]) -> None:
    """From logits on, with ORPO's supervised term: the gradient reaches every logit as in TRL."""
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    tokens, length_N = torch.tensor(case["tokens"]), torch.tensor(case["lengths"]) - 1
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    inside = torch.arange(logp.shape[1])[None] < length_N[:, None]
    order = torch.arange(len(tokens)).unflatten(0, (2, -1)).T.flatten()
    logp_N, length_N = (logp * inside).sum(1)[order], length_N[order]
    given = Completions(logp_N=logp_N, ref_logp_N=torch.zeros_like(logp_N), num_tokens_N=length_N)
    loss = losses_of(name, case["settings"], given).mean()
    sft_weight = method_of(name, case["settings"]).sft_weight
    loss = loss - sft_weight * logp_N[0::2].sum() / length_N[0::2].sum()
    loss.backward()
    near(loss, case["loss"])
    assert logits.grad is not None
    near(logits.grad, case["grad"])


def test_losses_without_margin_have_known_values() -> None:
    """Of a policy that is the reference, and of completions that are equally probable."""
    zero = torch.zeros(1, dtype=torch.float64)
    log2 = torch.tensor([2.0]).double().log()
    near(losses.dpo(zero, beta=0.3), log2)
    near(losses.dpo(zero, beta=0.3, label_smoothing=0.2), log2)
    near(losses.ipo(zero, beta=0.5), [1.0])
    near(losses.kto(zero, torch.tensor([True]), zero[0], beta=0.3, desirable_weight=3.0), [1.5])
    near(losses.orpo(zero, beta=2.0), 2 * log2)
    near(losses.log_odds(-log2), zero)
    near(losses.simpo(zero, beta=2.0, gamma=0.0), log2)


def test_label_smoothing_has_its_minimum_at_the_share() -> None:
    """cDPO's loss is least where sigmoid(beta m) is the share of right labels."""
    margin_P = torch.linspace(-10, 30, 4001, dtype=torch.float64)
    best = margin_P[losses.dpo(margin_P, beta=0.5, label_smoothing=0.1).argmin()]
    assert float(torch.sigmoid(0.5 * best)) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_log_probs_are_finite(name: str, dtype: torch.dtype) -> None:
    logp_N = torch.tensor(
        [0.0, 0.0, -1e4, 0.0, 0.0, -1e4, -1e-9, -0.69314718], dtype=dtype, requires_grad=True
    )
    zeros, ones = torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)
    given = Completions(logp_N=logp_N, ref_logp_N=zeros, num_tokens_N=ones)
    loss = losses_of(name, {}, given, is_desirable_N=LABELS.repeat(2), kl=KL.to(dtype)).sum()
    loss.backward()
    assert bool(loss.isfinite()) and logp_N.grad is not None and bool(logp_N.grad.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_losses_prefer_the_chosen(name: str) -> None:
    """A step against the gradient raises the rewards of good completions relative to bad ones."""
    logp_N = torch.tensor([-3.0, -2.0, -5.0, -5.0], dtype=torch.float64, requires_grad=True)
    given = Completions(logp_N=logp_N, ref_logp_N=logp_N.detach() + 0.1, num_tokens_N=torch.full((4,), 3.0))
    losses_of(name, {}, given, is_desirable_N=LABELS, kl=KL).sum().backward()
    assert logp_N.grad is not None
    assert bool((-logp_N.grad[0::2] > -logp_N.grad[1::2]).all())


def test_rotation_pairs_each_prompt_with_another() -> None:
    assert losses.rotated(4) == [3, 0, 1, 2]
    assert float(losses.mismatched_kl(torch.tensor([-3.0, 1.0]))) == 0


def test_ranking_share_counts_pairs() -> None:
    """With labels each good completion is compared with each bad one; ties count half."""
    rewards, labels = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0]), torch.tensor([True, False, True, False, False])
    by_hand = [
        float(good > bad) + 0.5 * float(good == bad) for good in rewards[labels] for bad in rewards[~labels]
    ]
    assert share_ranked_right(rewards, labels) == pytest.approx(sum(by_hand) / len(by_hand))
    assert math.isnan(share_ranked_right(rewards, torch.ones(5, dtype=torch.bool)))
    assert ranked_right(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.5}, "preferences.gamma=0.5 has no effect with preferences.method=dpo"),
        ({"method": "kto", "label_smoothing": 0.1}, "it belongs to dpo, simpo"),
        ({"method": "orpo", "reference": "other"}, "it belongs to dpo, ipo, kto"),
        ({"label_smoothing": 0.6}, "label_smoothing=0.6: use 0 to 0.5"),
        ({"method": "dpoo"}, "did you mean dpo"),
        ({"method": "kto", "batch_rows": 1}, "so a step needs at least 2"),
    ],
)
def test_settings_of_other_methods_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceOptimizationConfig(**settings)
