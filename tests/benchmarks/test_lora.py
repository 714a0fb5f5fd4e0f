"""LoRA against full training: bytes of pushes, and when a run has reached the score of the other."""

from __future__ import annotations

from typing import Any

from benchmarks.lora import ARMS, push_bytes, reached_at, scores


def run(arm: str, seed: int, after: float, evals: list[tuple[int, float]]) -> dict[str, Any]:
    rest = {"steps": 600, "eval_before": 0.2, "reward_last": 0.7, "evals": evals, "settings": list(ARMS[arm])}
    return {"arm": arm, "seed": seed, "objective": "o", "eval_after": after, **rest}


def test_an_adapter_of_smollm2_is_a_fiftieth_of_its_weights() -> None:
    sizes = push_bytes()
    inputs_and_outputs = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    for dtype, num_bytes in (("float32", 4), ("bfloat16", 2)):
        found = sizes[f"SmolLM2-135M, {dtype}"]
        assert found["full"] == found["merged"] == 134_515_008 * num_bytes
        assert found["adapter"] == 30 * 8 * inputs_and_outputs * num_bytes < 0.02 * found["full"]


def test_a_score_within_five_hundredths_counts_as_reached() -> None:
    slow = run("lora", 0, 0.97, [(100, 0.6), (200, 0.94), (300, 0.96)])
    assert [reached_at(slow, target) for target in (0.5, 0.94, 0.95, 0.965, 0.98)] == [
        100,
        200,
        300,
        600,
        None,
    ]
    full = run("full", 0, 1.0, [(100, 0.9)])
    line = scores([slow, full, run("lora", 1, 0.9, [])], "o").splitlines()[-1]
    assert line.endswith("| 0 1 | 0.20 0.20 | 0.970 0.900 | -0.030 | 300 | 0.70 0.70 |"), line
    changed = slow | {"settings": ["trainer.lr=1"]}
    assert "| lora |" not in scores([changed, full], "o"), "a run with other settings is of another arm"
