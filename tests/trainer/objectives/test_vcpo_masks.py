"""VCPO with masks: dropped tokens do not affect gradient, baseline and (`denominator=kept`) normalizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.runtime.metrics import Metrics
from areal_like.trajectory import FinishReason, Trajectory
from tests.support.objective_helpers import published
from tests.support.quick import others_in_chaos
from tests.support.trainer_helpers import random_groups
from tests.support.vcpo_ranks import gradient_of, make_runner
from tests.trainer.objectives.test_vcpo_gradients import assert_same_gradient
from trainer.distributed.ranks import Ranks
from trainer.metrics.prometheus import TrainerSeries
from trainer.objectives import build_objective

CAP = 2.0
Keeps = Callable[[Trajectory, Tensor], Tensor]
"""[L] bool from a trajectory and its log-ratios [L]: tokens that are kept."""


def ratio_in_band(trajectory: Trajectory, log_ratio_L: Tensor) -> Tensor:
    return (log_ratio_L.exp() >= 0.8) & (log_ratio_L.exp() <= 1.25)


def not_truncated(trajectory: Trajectory, log_ratio_L: Tensor) -> Tensor:
    return torch.full_like(log_ratio_L, trajectory.finish_reason is not FinishReason.LENGTH, dtype=torch.bool)


BAND: dict[str, Any] = {"name": "band", "level": "token", "low": 0.8, "high": 1.25}
TRUNCATED: dict[str, Any] = {"name": "truncated"}
CASES: dict[str, tuple[list[dict[str, Any]], list[Keeps], list[Keeps]]] = {
    "tokens, kept": ([BAND | {"denominator": "kept"}], [ratio_in_band], [ratio_in_band]),
    "sequences": ([TRUNCATED], [not_truncated], []),
    "both": ([BAND, TRUNCATED | {"denominator": "kept"}], [ratio_in_band, not_truncated], [not_truncated]),
}
"""Masks, their definitions, and the definitions of those that also change the normalizer."""


def masked_groups() -> list[list[Trajectory]]:
    """Random groups; half of the second group's samples and all of the last group's are truncated."""
    groups = random_groups(4, group_size=4, seed=3)
    cut_off = {(1, 0), (1, 3), *((3, i) for i in range(4))}
    return [
        [
            replace(t, finish_reason=FinishReason.LENGTH) if (g, i) in cut_off else t
            for i, t in enumerate(group)
        ]
        for g, group in enumerate(groups)
    ]


def defined(
    path: str,
    groups: list[list[Trajectory]],
    keeps: list[Keeps],
    counts: list[Keeps],
    *,
    proxy: bool,
    over_batch: bool,
) -> tuple[float, dict[str, Tensor]]:
    """(share of tokens kept, gradient) from the definition: each sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    names, params = zip(*model.named_parameters(), strict=True)
    grads, squares, advantages, members, num_seqs, num_kept, num_sampled = [], [], [], [], 0, 0, 0
    for g, group in enumerate(groups):
        rewards = np.array([t.reward for t in group])
        advantages += list((rewards - rewards.mean()) / (rewards.std() or 1.0))
        for t in group:
            at = torch.from_numpy(t.loss_mask == 1).nonzero()[:, 0]
            logps_SV = torch.log_softmax(
                model(input_ids=torch.from_numpy(t.tokens).long()[None]).logits[0, at - 1], -1
            )
            logp_S = logps_SV.gather(1, torch.from_numpy(t.tokens).long()[at, None])[:, 0]
            log_ratio_S = logp_S.detach() - torch.from_numpy(t.logprobs)[at]
            every = torch.ones(len(at), dtype=torch.bool)
            kept_S, counted_S = (
                np.prod([every, *(keep(t, log_ratio_S) for keep in who)], axis=0) for who in (keeps, counts)
            )
            kept_S, counted_S = (
                torch.as_tensor(kept_S, dtype=torch.float64),
                torch.as_tensor(counted_S, dtype=torch.float64),
            )
            weight = torch.exp(log_ratio_S.sum()).clamp(max=CAP) / counted_S.sum().clamp(min=1)
            grads.append(torch.autograd.grad(-weight * (kept_S * logp_S).sum(), params))
            proxy_S = 1 - 2 * logp_S.detach().exp() + logps_SV.detach().exp().square().sum(-1)
            exact = sum(float(x.square().sum()) for x in grads[-1])
            squares.append(float(weight**2 * (kept_S * proxy_S).sum()) if proxy else exact)
            members.append(0 if over_batch else g)
            num_seqs += bool(counted_S.any())
            num_kept, num_sampled = num_kept + float(kept_S.sum()), num_sampled + len(at)
    coefficients = []
    for i, group_i in enumerate(members):
        mass = [(squares[j], advantages[j]) for j, group_j in enumerate(members) if group_j == group_i]
        total = sum(m for m, _ in mass)
        coefficients.append(advantages[i] - (sum(m * a for m, a in mass) / total if total else 0.0))
    summed = [
        sum(c * grad[k] for c, grad in zip(coefficients, grads, strict=True)) / num_seqs
        for k in range(len(params))
    ]
    return num_kept / num_sampled, dict(zip(names, summed, strict=True))


@pytest.mark.parametrize(
    ("case", "norms", "baseline"),
    others_in_chaos(
        [
            (case, *norms)
            for case in CASES
            for norms in (("ghost", "group"), ("exact", "group"), ("proxy", "group"), ("proxy", "batch"))
        ],
        quick=[
            ("both", "ghost", "group"),
            ("sequences", "exact", "group"),
            ("tokens, kept", "proxy", "batch"),
        ],
    ),
)
def test_masked_gradient_matches_the_definition(
    path: str, ranks: Ranks, case: str, norms: str, baseline: str
) -> None:
    groups = masked_groups()
    masks, keeps, counts = CASES[case]
    metrics, gradient = gradient_of(
        make_runner(path, ranks, cap=CAP, norms=norms, baseline=baseline, masks=masks), groups
    )
    kept, want = defined(path, groups, keeps, counts, proxy=norms == "proxy", over_batch=baseline == "batch")
    assert metrics["kept_fraction"] == pytest.approx(kept) and 0.1 < kept < 0.8
    assert_same_gradient(gradient, want, relative=1e-12)


def test_masks_do_not_change_the_step_size(path: str, ranks: Ranks) -> None:
    """The effective sample size measures the staleness of the whole batch, masked tokens included."""
    groups = masked_groups()
    plain, masked = (
        make_runner(path, ranks, cap=CAP, masks=masks).run(groups, step=0)
        for masks in ([], [TRUNCATED, BAND])
    )
    assert masked["ess_ratio"] == plain["ess_ratio"] < 1
    assert masked["lr_scale"] == plain["lr_scale"] < 1


def test_every_diagnostic_is_a_prometheus_series(path: str, ranks: Ranks) -> None:
    groups, metrics = masked_groups(), Metrics()
    series = TrainerSeries(metrics)
    row = make_runner(path, ranks, lr=2e-9, masks=[TRUNCATED, BAND], dtype=torch.float32).run(groups, step=5)
    series.stepped(
        5,
        row
        | {
            "tokens_trained": 1,
            "wait_data_s": 0.0,
            "freeze_s": 0.0,
            "lag_mean": 0.0,
            "lag_max": 0,
            "max_staleness": 4,
        },
    )
    shown = {name: metrics.registry.get_sample_value(f"areal_trainer_{name}") for name in row}
    for name in (
        *(
            "ess_ratio",
            "log_w_mean",
            "log_w_std",
            "kl_k3",
            "clipped_fraction",
            "kept_fraction",
            "entropy",
            "grad_norm",
            "lr",
            "lr_scale",
        ),
        *("response_tokens", "prompt_tokens", "truncated_fraction", "mismatch_abs", "zero_advantage_groups"),
    ):
        assert shown[name] == row[name] != 0, name
    samples = [t for group in groups for t in group]
    assert shown["truncated_fraction"] == 6 / 16
    assert shown["response_tokens"] == pytest.approx(np.mean([t.num_sampled for t in samples]))
    assert shown["prompt_tokens"] == pytest.approx(np.mean([t.num_tokens - t.num_sampled for t in samples]))
    assert shown["lr"] == pytest.approx(2e-9 * shown["lr_scale"]) and shown["lr_scale"] < 1


def test_a_fully_dropped_group_has_no_gradient(path: str, ranks: Ranks) -> None:
    groups = masked_groups()
    for norms in ("ghost", "exact", "proxy"):
        metrics = make_runner(path, ranks, norms=norms, masks=[TRUNCATED]).run(groups[3:], step=0)
        assert metrics["grad_norm"] == 0 and metrics["kept_fraction"] == 0 and metrics["num_tokens"] > 0


def test_masks_keep_the_objectives_declarations() -> None:
    for settings in ({}, {"norms": "exact"}, {"norms": "proxy"}, {"norms": "proxy", "baseline": "batch"}):
        bare, composed = (
            build_objective({"name": "vcpo", **settings, **masks}) for masks in ({}, {"masks": [TRUNCATED]})
        )
        for name in (
            "scope",
            "needs",
            "whole_groups",
            "one_sequence_per_microbatch",
            "late_coefficients",
            "skips_zero_advantage",
            "normalizer",
        ):
            assert getattr(composed, name) == getattr(bare, name)
        batch = replace(
            published(truncated=[True, False]), collision_S=torch.full((5,), 0.1, dtype=torch.float64)
        )
        stats = composed.summarize(
            {name: vector.double() for name, vector in composed.observe(batch).items()}
        )
        assert composed.lr_scale(stats) == bare.lr_scale(
            bare.summarize({"log_w": batch.log_w_N, **_rest(bare, batch)})
        )


def _rest(objective: Any, batch: Any) -> dict[str, Tensor]:
    return {name: vector.double() for name, vector in objective.observe(batch).items()}
