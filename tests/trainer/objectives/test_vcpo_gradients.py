"""VCPO's gradient: ghost norms and autograd match the definition for all architectures, cuts and ranks."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.precision import Fp32Head
from areal_like.trajectory import Trajectory
from tests.support.quick import only_in_chaos, others_in_chaos
from tests.support.trainer_helpers import dense_logprobs, flattened, random_groups, run_ranks, write_model
from tests.support.vcpo_ranks import VARIANTS, gradient_of, make_runner, shares_of
from trainer.distributed.ranks import Ranks
from trainer.gradients.ghost_layers import SegmentRows
from trainer.gradients.ghost_tape import GhostTape

CAP = 2.0
"""Low enough to truncate some of the random sequences."""
QUICK = ("ghost-others", "ghost-masks", "exact-batch-scores", "proxy-batch-masks")
"""Of `VARIANTS`: each way to compute norms, both baselines, and masks."""


def defined(
    path: str,
    groups: list[list[Trajectory]],
    *,
    over_batch: bool = False,
    leave_one_out: bool = False,
    token_mean: bool = False,
    baseline_weights: str = "gradient",
) -> tuple[float, float, dict[str, Tensor]]:
    """(loss, mean baseline, gradient) from the definition: each sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    names, params = zip(*model.named_parameters(), strict=True)
    losses, grads, advantages, members, weights = [], [], [], [], []
    num_tokens = 0
    for g, group in enumerate(groups):
        rewards = np.array([t.reward for t in group])
        advantages += list((rewards - rewards.mean()) / (rewards.std() or 1.0))
        for t in group:
            mask_L = torch.from_numpy(t.loss_mask).double()
            pi_L = dense_logprobs(model, [t])[0] * mask_L
            w = torch.exp((pi_L - torch.from_numpy(t.logprobs) * mask_L).sum().detach()).clamp(max=CAP)
            loss = -w * pi_L.sum() / (1 if token_mean else mask_L.sum())
            weights.append(float(w))
            grads.append(torch.autograd.grad(loss, params))
            losses.append(loss.item())
            members.append(0 if over_batch else g)
            num_tokens += int(mask_L.sum())
    squares = [sum(float(g.square().sum()) for g in grad) for grad in grads]
    if baseline_weights == "score":
        squares = [square / weight**2 for square, weight in zip(squares, weights, strict=True)]
    baselines = []
    for i, group_i in enumerate(members):
        others = [
            j for j, group_j in enumerate(members) if group_j == group_i and not (leave_one_out and j == i)
        ]
        baselines.append(sum(squares[j] * advantages[j] for j in others) / sum(squares[j] for j in others))
    coefficients = [a - b for a, b in zip(advantages, baselines, strict=True)]
    divisor = num_tokens if token_mean else len(losses)
    total = [
        sum(c * grad[k] for c, grad in zip(coefficients, grads, strict=True)) / divisor
        for k in range(len(params))
    ]
    loss = sum(c * x for c, x in zip(coefficients, losses, strict=True)) / divisor
    return loss, float(np.mean(baselines)), dict(zip(names, total, strict=True))


def assert_same_gradient(got: dict[str, Tensor], want: dict[str, Tensor], *, relative: float) -> None:
    """Compares each parameter, relative to the norm of the whole gradient (a part's may be nearly zero)."""
    assert got.keys() == want.keys()
    scale = torch.stack([grad.double().norm() for grad in want.values()]).norm()
    for name, grad in got.items():
        assert (grad.double() - want[name]).norm() < relative * scale, name


@pytest.mark.parametrize(
    ("norms", "architecture"),
    others_in_chaos(
        itertools.product(("ghost", "exact"), ("gpt2", "llama", "qwen3", "qwen2")),
        quick=[("ghost", "gpt2"), ("ghost", "qwen3"), ("exact", "gpt2")],
    ),
)
def test_gradient_matches_the_definition(tmp_path: Path, ranks: Ranks, architecture: str, norms: str) -> None:
    """RMSNorm always computes in float32; GPT-2, with LayerNorm, biases and a tied head, is exact."""
    path, groups = write_model(tmp_path, architecture), random_groups(4, group_size=4)
    relative = 1e-12 if architecture == "gpt2" else 1e-6
    for over_batch in (False, True):
        runner = make_runner(path, ranks, norms=norms, baseline="batch" if over_batch else "group", cap=CAP)
        metrics, gradient = gradient_of(runner, groups)
        loss, baseline, want = defined(path, groups, over_batch=over_batch)
        assert metrics["loss"] == pytest.approx(loss, rel=10 * relative)
        assert metrics["baseline"] == pytest.approx(baseline, rel=10 * relative)
        assert_same_gradient(gradient, want, relative=relative)


@pytest.mark.parametrize("norms", ["ghost", *only_in_chaos("exact")])
def test_a_baseline_of_scores_leaves_w_out_of_its_norms(tmp_path: Path, ranks: Ranks, norms: str) -> None:
    path, groups = write_model(tmp_path, "gpt2"), random_groups(4, group_size=4)
    for baseline, more in (("group", {}), ("batch", {}), ("group", {"leave_one_out": True})):
        if norms == "exact" and more:
            continue
        runner = make_runner(
            path, ranks, norms=norms, baseline=baseline, cap=CAP, baseline_weights="score", **more
        )
        metrics, gradient = gradient_of(runner, groups)
        loss, mean_baseline, want = defined(
            path, groups, over_batch=baseline == "batch", baseline_weights="score", **more
        )
        assert metrics["loss"] == pytest.approx(loss, rel=1e-11)
        assert metrics["baseline"] == pytest.approx(mean_baseline, rel=1e-11)
        assert_same_gradient(gradient, want, relative=1e-12)
        _, _, weighted = defined(path, groups, over_batch=baseline == "batch", **more)
        with pytest.raises(AssertionError):
            assert_same_gradient(gradient, weighted, relative=1e-3)


@pytest.mark.parametrize("architecture", ["qwen3", *only_in_chaos("gpt2", "llama")])
def test_ghost_norms_agree_with_autograd_in_float32(tmp_path: Path, ranks: Ranks, architecture: str) -> None:
    path, groups = write_model(tmp_path, architecture, dtype=torch.float32), random_groups(4, group_size=4)
    ghost, exact = (
        gradient_of(make_runner(path, ranks, dtype=torch.float32, norms=n), groups)
        for n in ("ghost", "exact")
    )
    assert_same_gradient(ghost[1], exact[1], relative=1e-5)
    assert ghost[0]["baseline"] == pytest.approx(exact[0]["baseline"], rel=1e-4)


@pytest.mark.parametrize("fp32_head", [*only_in_chaos(False), True])
def test_ghost_norms_agree_with_autograd_in_bfloat16(tmp_path: Path, ranks: Ranks, fp32_head: bool) -> None:
    """The two may differ only by rounding. The head keeps its own forward after the steps."""
    path, groups = write_model(tmp_path, "qwen3", dtype=torch.float32), random_groups(4, group_size=4)
    runners = [
        make_runner(path, ranks, dtype=torch.float32, compute="bfloat16", norms=n, fp32_head=fp32_head)
        for n in ("ghost", "exact")
    ]
    ghost, exact = (gradient_of(runner, groups) for runner in runners)
    for runner in runners:
        head = runner.policy.model.get_output_embeddings()
        assert isinstance(head, Fp32Head) is fp32_head and "forward" not in vars(head)
    assert_same_gradient(ghost[1], exact[1], relative=0.03)


def test_leave_one_out_and_another_normalizer(tmp_path: Path, ranks: Ranks) -> None:
    path, groups = write_model(tmp_path, "gpt2"), random_groups(4, group_size=4)
    _, _, others = defined(path, groups, leave_one_out=True)
    assert_same_gradient(
        gradient_of(make_runner(path, ranks, cap=CAP, leave_one_out=True), groups)[1], others, relative=1e-12
    )
    _, _, tokens = defined(path, groups, token_mean=True)
    for norms in ("ghost", "exact"):
        runner = make_runner(path, ranks, cap=CAP, normalizer="token_mean", norms=norms)
        assert_same_gradient(gradient_of(runner, groups)[1], tokens, relative=1e-12)


@pytest.mark.parametrize("variant", others_in_chaos(VARIANTS, quick=QUICK))
def test_cuts_do_not_change_the_gradient(tmp_path: Path, ranks: Ranks, variant: str) -> None:
    path, groups = write_model(tmp_path, "gpt2"), random_groups(5)
    steps = {
        budget: gradient_of(
            make_runner(path, ranks, budget_tokens=budget, checkpointing=budget == 37, **VARIANTS[variant]),
            groups,
        )
        for budget in (37, 60, 10_000)
    }
    whole, gradient = steps[10_000]
    for metrics, same in steps.values():
        assert_same_gradient(same, gradient, relative=1e-12)
        for name in ("loss", "baseline", "lr_scale", "ess_ratio"):
            assert metrics.get(name, 0.0) == pytest.approx(whole.get(name, 0.0), rel=1e-9, abs=1e-12)


@pytest.mark.long
def test_two_ranks_give_the_gradient_of_one(tmp_path: Path, ranks: Ranks) -> None:
    """Long, because every variant is trained on two ranks in two shares, and on one."""
    path = write_model(tmp_path / "model", "gpt2")
    run_ranks("shares", str(tmp_path), path, world_size=2, module="tests.support.vcpo_ranks")
    for variant, settings in VARIANTS.items():
        want, gradient = gradient_of(make_runner(path, ranks, **settings), random_groups(8))
        for share in shares_of(variant):
            metrics = json.loads((tmp_path / f"{variant}-{share}.json").read_text())
            for name in ("loss", "lr_scale", "grad_norm", "num_groups"):
                assert metrics[name] == pytest.approx(want[name], rel=1e-9), (variant, share)
            assert_same_gradient(
                load_file(tmp_path / f"{variant}-{share}.safetensors"), gradient, relative=1e-10
            )


def test_equal_rewards_affect_only_the_step_size(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path, "gpt2")
    (flat, mixed, *_) = random_groups(2, group_size=4)
    for norms in ("ghost", "exact", "proxy"):
        runner = make_runner(path, ranks, norms=norms)
        alone = runner.run([flat], step=0)
        assert (
            alone["grad_norm"] == 0 and alone["zero_advantage_groups"] == 1 and alone["num_microbatches"] > 0
        )
        assert 0.25 < alone["ess_ratio"] < 1 and alone["lr_scale"] == pytest.approx(alone["ess_ratio"] ** 0.5)
        both, only = runner.run([flat, mixed], step=1), runner.run([mixed], step=2)
        assert both["grad_norm"] == pytest.approx(only["grad_norm"] / 2), (
            "the mean is over twice as many sequences"
        )
        assert both["lr_scale"] != pytest.approx(only["lr_scale"])


def test_extreme_ratios_stay_finite(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path, "gpt2")
    groups = [
        [replace(t, logprobs=t.logprobs - np.float32(1000) * t.loss_mask) for t in g]
        for g in random_groups(3)
    ]
    for variant, settings in VARIANTS.items():
        metrics = make_runner(path, ranks, **settings).run(groups, step=0)
        assert all(np.isfinite(value) for value in flattened(metrics).values()), variant
        assert (metrics["grad_norm"] > 0) is ("masks" not in settings), "masks drop everything at such ratios"
        assert metrics["ess_ratio"] < 1 and metrics["clipped_fraction"] == 1


class Gated(nn.Module):
    """A layer that the tape does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x * self.gate)
        return out


class Doubled(nn.Linear):
    """A Linear subclass whose weight gradient differs from Linear's."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_unsupported_layers_are_named() -> None:
    with pytest.raises(ConfigError, match="does not support the layers of gate: use exact or proxy"):
        GhostTape(Gated())
    with pytest.raises(ConfigError, match="layers of weight"):
        GhostTape(Doubled(3, 3, bias=False))
    twice = nn.Linear(3, 3)
    tape = GhostTape(twice)
    tape.attach()
    with pytest.raises(ConfigError, match="runs twice in one forward"):
        twice(twice(torch.ones(1, 3))).sum().backward()
    tape.clear()
    with pytest.raises(ConfigError, match="cannot tell which sequences"):
        twice(torch.ones(4, 3)).sum().backward()
        tape.squares(SegmentRows.of([2, 3]), SegmentRows.of([2, 3]))
    tape.detach()


def test_long_sequences_and_frozen_parameters() -> None:
    """Long sequences use the gradient itself instead of Gram matrices; frozen parameters are left out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.LayerNorm(5), nn.RMSNorm(5), nn.Linear(5, 2, bias=False)
    ).double()
    model[1].weight.requires_grad_(False)
    lengths = [9, 0, 2, 17]
    x_TI = torch.randn(sum(lengths), 3, dtype=torch.float64)
    tape = GhostTape(model)
    tape.attach()
    model(x_TI).square().sum().backward()
    rows = SegmentRows.of(lengths)
    squares_N = tape.squares(rows, rows)
    coefficient_N = torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=torch.float64)
    combined = dict(tape.combined(coefficient_N))
    tape.detach()
    assert all(param.grad is None for param in model.parameters())
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert combined.keys() == trained.keys()
    want = {name: torch.zeros_like(param) for name, param in trained.items()}
    for i, part_TI in enumerate(torch.split(x_TI, lengths)):
        grads = torch.autograd.grad(model(part_TI).square().sum(), list(trained.values()))
        assert float(squares_N[i]) == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-12)
        want = {name: w + coefficient_N[i] * g for (name, w), g in zip(want.items(), grads, strict=True)}
    assert_same_gradient(combined, want, relative=1e-12)
