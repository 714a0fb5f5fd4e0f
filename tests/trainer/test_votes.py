"""A sample of several segments has one vote: each method against its formula on whole samples.

The steps have samples of one, two and three segments. A budget of 400 tokens takes them in one micro-batch,
60 in several, and with 12 most samples of several segments are cut over micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import votes
from tests.support.quick import only_in_chaos, others_in_chaos
from tests.support.trainer_helpers import run_ranks
from tests.support.trainer_ranks import last_gradient, make_runner
from tests.support.votes import Sample
from trainer.distributed.ranks import Ranks

Losses = Callable[[Sample], Tensor]
MASKED = {"name": "tis", "mode": "mask", "low": 0.5, "high": 5.0}
WEIGHTS: list[tuple[dict[str, Any], Losses]] = [
    ({"name": "tis", "level": "sequence"}, votes.tis),
    ({"name": "tis", "level": "geometric", "cap": 1.02}, votes.geometric_tis),
    ({**MASKED, "level": "sequence"}, votes.masked_tis),
    ({"name": "vespo"}, votes.vespo),
    ({"name": "topr"}, votes.topr),
    ({"name": "lad"}, votes.lad),
    ({"name": "gspo", "clip_low": 0.03, "clip_high": 0.03}, votes.gspo),
]
MASKS: list[tuple[dict[str, Any], Losses]] = [
    ({"name": "opsm", "delta": 0.02}, votes.opsm),
    ({"name": "band", "low": 0.97, "high": 1.03}, votes.band),
    ({"name": "trust_region", "max_kl": 0.3, "mean_kl": 0.06, "denominator": "original"}, votes.trust_region),
]
VCPO: list[dict[str, Any]] = [
    {"norms": "proxy", "baseline": "group"},
    {"norms": "proxy", "baseline": "group", "leave_one_out": True},
    {"norms": "proxy", "baseline": "batch", "baseline_weights": "gradient"},
    {"norms": "ghost", "baseline": "group", "leave_one_out": True},
    {"norms": "ghost", "baseline": "batch"},
    {"norms": "exact", "baseline": "group", "baseline_weights": "gradient"},
    {"norms": "exact", "baseline": "batch"},
]
GROUPS = votes.branching_groups()


def divided(losses: Sequence[Tensor], samples: Sequence[Sample], normalizer: str) -> Tensor:
    total = torch.stack(list(losses)).sum()
    if normalizer == "seq_mean_token_mean":
        return torch.stack([loss / len(x.mu) for loss, x in zip(losses, samples, strict=True)]).mean()
    return total / (sum(len(x.mu) for x in samples) if normalizer == "token_mean" else len(samples))


def check(
    path: str,
    ranks: Ranks,
    objective: dict[str, Any],
    want: Callable[[Any, list[Sample]], Tensor],
    *,
    budget_tokens: int,
    normalizer: str = "token_mean",
) -> dict[str, Any]:
    """Compares the gradient, the loss and the effective sample size of a step; returns its metrics."""
    model = votes.load(path)
    samples = votes.samples_of(model, GROUPS)
    loss = want(model, samples)
    runner = make_runner(
        path,
        ranks,
        beta1=0.0,
        settings={"objective": objective, "advantage": {"name": "dr_grpo"}},
        budget_tokens=budget_tokens,
        normalizer=normalizer,
    )
    metrics = runner.run(GROUPS, step=7)
    close(last_gradient(runner), votes.gradients_of(model, loss))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-8, abs=1e-10)
    assert metrics["ess_ratio"] == pytest.approx(votes.ess_ratio(samples), rel=1e-8)
    assert metrics["num_sequences"] == 12 and metrics["segments"] == 2
    return metrics


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= 1e-8 * float(value.norm()) + 1e-12, name


def label(settings: Any) -> str:
    if not isinstance(settings, dict):
        return ""
    return str(settings.get("name", "-".join(map(str, settings.values()))))


@pytest.mark.parametrize("budget_tokens", [*only_in_chaos(400, 60), 12])
@pytest.mark.parametrize(("objective", "loss"), WEIGHTS, ids=label)
def test_weights_are_those_of_samples(
    path: str, ranks: Ranks, objective: dict[str, Any], loss: Losses, budget_tokens: int
) -> None:
    normalizer = "seq_mean_token_mean" if objective["name"] == "gspo" else "token_mean"
    metrics = check(
        path,
        ranks,
        objective,
        lambda _, samples: divided([loss(x) for x in samples], samples, normalizer),
        budget_tokens=budget_tokens,
        normalizer=normalizer,
    )
    if "clipped_fraction" in metrics and objective["name"] in ("tis", "gspo", "topr"):
        assert 0 < metrics["clipped_fraction"] + 1 - metrics["kept_fraction"] < 1, "some and not all"


@pytest.mark.parametrize("budget_tokens", [400, *only_in_chaos(60), 12])
@pytest.mark.parametrize(("mask", "loss"), MASKS, ids=label)
def test_a_mask_drops_whole_samples(
    path: str, ranks: Ranks, mask: dict[str, Any], loss: Losses, budget_tokens: int
) -> None:
    metrics = check(
        path,
        ranks,
        {"name": "reinforce", "masks": [mask]},
        lambda _, samples: divided([loss(x) for x in samples], samples, "token_mean"),
        budget_tokens=budget_tokens,
    )
    assert 0 < metrics["kept_fraction"] < 1


@pytest.mark.parametrize("normalizer", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
@pytest.mark.parametrize("budget_tokens", [60, *only_in_chaos(12)])
def test_a_sample_counts_once_in_normalizers(
    path: str, ranks: Ranks, normalizer: str, budget_tokens: int
) -> None:
    check(
        path,
        ranks,
        {"name": "reinforce"},
        lambda _, samples: divided([votes.reinforce(x) for x in samples], samples, normalizer),
        budget_tokens=budget_tokens,
        normalizer=normalizer,
    )


@pytest.mark.parametrize("budget_tokens", [400, 12])
def test_the_mean_weight_is_that_of_samples(path: str, ranks: Ranks, budget_tokens: int) -> None:
    def loss(_: Any, samples: list[Sample]) -> Tensor:
        mean = sum(min(x.w, 2.0) for x in samples) / len(samples)
        return divided([votes.tis(x) / mean for x in samples], samples, "token_mean")

    check(path, ranks, {"name": "tis", "normalize": True}, loss, budget_tokens=budget_tokens)


@pytest.mark.parametrize("budget_tokens", [400, 12])
def test_a_sample_is_regressed_as_a_whole(path: str, ranks: Ranks, budget_tokens: int) -> None:
    def loss(_: Any, samples: list[Sample]) -> Tensor:
        of = [[y for y in samples if y.group == x.group] for x in samples]
        return torch.stack([votes.oapl(x, group) for x, group in zip(samples, of, strict=True)]).mean()

    check(path, ranks, {"name": "oapl", "beta2": votes.BETA}, loss, budget_tokens=budget_tokens)


def test_pairs_are_those_of_samples(path: str, ranks: Ranks) -> None:
    def loss(_: Any, samples: list[Sample]) -> Tensor:
        groups = [samples[at : at + votes.GROUP_SIZE] for at in range(0, len(samples), votes.GROUP_SIZE)]
        return torch.stack([votes.rebel(group) for group in groups]).mean()

    check(path, ranks, {"name": "rebel", "beta": votes.BETA}, loss, budget_tokens=100)


def vcpo_loss(settings: dict[str, Any]) -> Callable[[Any, list[Sample]], Tensor]:
    return lambda model, samples: votes.vcpo(
        model,
        samples,
        norms=settings["norms"],
        scope=settings["baseline"],
        leave_one_out=settings.get("leave_one_out", False),
        weighted=settings.get("baseline_weights") == "gradient",
    )


@pytest.mark.parametrize("settings", others_in_chaos(VCPO, quick=VCPO[4:6]), ids=label)
def test_vcpo_has_one_term_for_each_sample(path: str, ranks: Ranks, settings: dict[str, Any]) -> None:
    """The norm of a sample's gradient includes the products of its segments' gradients."""
    is_whole = settings["baseline"] == "group" and settings["norms"] != "exact"
    # Cut samples too, where they can be; with norms=ghost the products of parts are left out then.
    budgets = [400, 100] if is_whole else [400, 60] if settings["norms"] == "ghost" else [400, 60, 12]
    for budget_tokens in budgets:
        metrics = check(
            path,
            ranks,
            {"name": "vcpo", **settings},
            vcpo_loss(settings),
            budget_tokens=budget_tokens,
        )
        assert metrics["lr_scale"] == pytest.approx(metrics["ess_ratio"] ** 0.5, rel=1e-8)


@pytest.mark.chaos
def test_two_ranks_give_the_gradient_of_samples(tmp_path: Path, path: str) -> None:
    """Divided evenly, all on one rank, and by the balancer, in several micro-batches and with cut samples."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "tis", "masks": [MASKS[1][0]]}, "band"),
        ({"name": "vcpo", **VCPO[2]}, "proxy"),
        ({"name": "vcpo", **VCPO[5]}, "exact"),
    ]
    run_ranks(
        "gradients",
        str(tmp_path),
        path,
        json.dumps([objective for objective, _ in cases]),
        world_size=2,
        module="tests.support.vote_ranks",
    )
    model = votes.load(path)
    samples = votes.samples_of(model, GROUPS)
    for number, (_, name) in enumerate(cases):
        if name == "band":
            kept = [votes.tis(x) * (0.97 <= x.s <= 1.03) for x in samples]
            loss = divided(kept, samples, "token_mean")
        else:
            loss = vcpo_loss(VCPO[2] if name == "proxy" else VCPO[5])(model, samples)
        want = votes.gradients_of(model, loss)
        found = sorted(tmp_path.glob(f"{number}-*.safetensors"))
        assert len(found) == 6
        for each in found:
            close(load_file(each), want)
            metrics = json.loads(each.with_suffix(".json").read_text())
            assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-8)
            assert metrics["ess_ratio"] == pytest.approx(votes.ess_ratio(samples), rel=1e-8)
