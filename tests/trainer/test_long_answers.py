"""Answers of 8,192 tokens with the numerics of a bf16 engine: what the effective sample sizes say."""

import math

import pytest
import torch

from trainer.adaptive_staleness import StalenessController
from trainer.objectives import OBJECTIVES
from trainer.objectives.importance import ess_ratio

NOISE = 0.031
"""Standard deviation of a token's log-ratio at lag 0, from numerics alone."""
NUM_SEQUENCES = 512


def ess_by_level(length: int, *, drift: float = 0.0, seed: int = 0) -> dict[str, float]:
    """`drift`: standard deviation of a token's log-ratio from the age of the weights."""
    generator = torch.Generator().manual_seed(seed)
    log_r_BL = math.hypot(NOISE, drift) * torch.randn(
        NUM_SEQUENCES, length, generator=generator, dtype=torch.float64
    )
    sum_B = log_r_BL.sum(1)
    return {
        "sequence": ess_ratio(sum_B),
        "geometric": ess_ratio(sum_B / length),
        "token": ess_ratio(log_r_BL.flatten()),
    }


@pytest.mark.parametrize("length", [128, 1024])
def test_products_lose_their_sample_size_to_the_length(length: int) -> None:
    found = ess_by_level(length)
    assert found["sequence"] == pytest.approx(math.exp(-length * NOISE**2), abs=0.1)
    assert found["token"] > 0.99 and found["geometric"] > 0.99


def test_8192_tokens_leave_nothing_of_products() -> None:
    found = ess_by_level(8192)
    assert found["sequence"] < 0.05 and found["token"] > 0.99 and found["geometric"] > 0.99


def bounds_reached(level: str, *, drift_a_step: float, num_steps: int = 800) -> list[int]:
    """The bounds that `max_staleness=auto` chooses if each step of lag moves tokens by this much."""
    controller = StalenessController(cap=8, target=0.7)
    known: dict[int, float] = {}
    bounds = []
    for _ in range(num_steps):
        lag = controller.bound
        if lag not in known:
            known[lag] = ess_by_level(1024, drift=lag * drift_a_step)[level]
        bounds.append(controller.observe(ess_ratio=known[lag], lag_max=lag))
    return bounds


def test_the_automatic_bound_works_with_weights_of_tokens() -> None:
    assert max(bounds_reached("sequence", drift_a_step=0.02)) == 0
    assert bounds_reached("token", drift_a_step=0.02)[-1] == 8
    # Weights of tokens that vary too much lower it as before: .2 a step leaves .85 at lag 2 and .7 at lag 3.
    assert 1 <= bounds_reached("token", drift_a_step=0.2)[-1] <= 3


def test_the_bound_follows_the_level_of_the_weights() -> None:
    levels = {name: OBJECTIVES.build({"name": name}).ess_level for name in OBJECTIVES.names()}
    assert OBJECTIVES.build({"name": "tis", "level": "token"}).ess_level == "token"
    assert {levels[name] for name in ("vcpo", "vespo", "oapl")} == {"sequence"}
    assert levels["gspo"] == "geometric"
    assert {levels[name] for name in ("ppo", "cispo", "m2po", "sapo")} == {"token"}
