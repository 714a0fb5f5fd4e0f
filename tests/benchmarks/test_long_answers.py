"""Effective sample sizes of long answers: by hand, and with the real engine and trainer in bfloat16."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.long_answers import (
    CORRECTIONS,
    PROMPT_TOKENS,
    as_tables,
    build_random_model,
    corrected,
    measured,
    raw_sizes,
    sample,
    trained_logprobs,
)

LOGP = torch.full((2, 2), -1.0)
BEHAVIOR = LOGP - torch.tensor([[math.log(2)], [0.0]])
"""Ratios 2, 2 of the first answer, 1, 1 of the second: products 4 and 1."""


def ess(*weights: float) -> float:
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def test_sizes_by_level() -> None:
    assert raw_sizes(LOGP - BEHAVIOR) == pytest.approx(
        {"token": ess(2, 2, 1, 1), "sequence": ess(4, 1), "geometric": ess(2, 1)}, rel=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"name": "reinforce"}, (1, 1, 1, 1)),
        ({"name": "tis", "level": "token", "cap": 1.5}, (1.5, 1.5, 1, 1)),
        ({"name": "tis", "level": "sequence", "cap": 3.0}, (3, 3, 1, 1)),
        ({"name": "tis", "level": "token", "masks": [{"name": "band", "high": 1.5}]}, (0, 0, 1, 1)),
        # A ratio of 2 with A = 1 is clipped.
        ({"name": "ppo"}, (0, 0, 1, 1)),
        ({"name": "vespo"}, (16 * math.exp(-9), 16 * math.exp(-9), 1, 1)),
    ],
)
def test_weights_are_those_of_the_objective(settings: dict[str, Any], weights: tuple[float, ...]) -> None:
    found = corrected(settings, LOGP, BEHAVIOR)
    assert found["ess"] == pytest.approx(ess(*weights), rel=1e-6)
    assert found["used"] == sum(w > 0 for w in weights) / 4
    assert found["rate"] == 1


def test_vcpo_has_a_smaller_rate() -> None:
    found = corrected(CORRECTIONS["VCPO"], LOGP, BEHAVIOR)
    assert found["ess"] == pytest.approx(ess(4, 4, 1, 1), rel=1e-6)
    assert found["rate"] == pytest.approx(math.sqrt(ess(4, 1)), rel=1e-6)


def test_every_correction_has_weights_of_one_without_a_mismatch() -> None:
    for label, settings in CORRECTIONS.items():
        found = corrected(settings, LOGP, LOGP)
        assert found == pytest.approx({"ess": 1.0, "used": 1.0, "rate": 1.0}), label


@pytest.mark.slow
def test_engine_and_trainer_in_bfloat16(tmp_path: Path) -> None:
    """The same weights in both: the log-probs agree up to rounding, and not exactly."""
    build_random_model(tmp_path, width=64, layers=2, context_tokens=PROMPT_TOKENS + 48, spread=0.1, seed=0)
    trajectories = sample(str(tmp_path), num_samples=10, num_tokens=48, seed=0)
    assert [t.num_tokens for t in trajectories] == [PROMPT_TOKENS + 48] * 10
    first, second = trajectories[0].tokens, trajectories[1].tokens
    assert (first[:PROMPT_TOKENS] == second[:PROMPT_TOKENS]).all() and (first != second).any()
    logp_NL, entropy_NL = trained_logprobs(str(tmp_path), trajectories)
    assert logp_NL.shape == entropy_NL.shape == (10, 48)
    behavior_NL = torch.stack([torch.from_numpy(t.logprobs[PROMPT_TOKENS:]) for t in trajectories])
    rows = measured(logp_NL, behavior_NL, [8, 48], CORRECTIONS)
    assert [row["tokens"] for row in rows] == [8, 48]
    assert 0 < rows[1]["token_std"] < 0.2
    assert rows[1]["ess"]["token"] > 0.9
    lines = as_tables(rows).splitlines()
    assert lines[0] == "| uncorrected | 8 tokens | 48 tokens |"
    assert len(lines) == 2 + 5 + 1 + 2 + len(CORRECTIONS)
