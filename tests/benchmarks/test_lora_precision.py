"""The gap between engine and trainer on a small model with an adapter in bfloat16."""

from __future__ import annotations

from pathlib import Path

from benchmarks.lora_precision import as_table, measure
from trainer.models.tiny import build_tiny_model


def test_a_gap_has_the_size_of_rounding(tmp_path: Path) -> None:
    """An adapter of zeros changes nothing, by neither kind of push."""
    build_tiny_model(tmp_path, seed=0, warm_start_steps=0, swap_prob=0.5)
    rows = measure(str(tmp_path), rank=2, sizes=[0.0, 0.05], num_samples=4, num_tokens=8)
    found = {(row["push"], row["size"]): row for row in rows}
    of_base = [{key: found[kind, 0.0][key] for key in ("mean", "max")} for kind in ("adapter", "merged")]
    assert of_base[0] == of_base[1]
    for row in rows:
        assert row["tokens"] == 32 and 0 < row["mean"] < row["max"] < 0.1, row
    assert found["merged", 0.05]["mean"] not in (of_base[0]["mean"], found["adapter", 0.05]["mean"])
    assert as_table(rows).count("\n") == 5
