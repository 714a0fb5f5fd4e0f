"""The warning about learning rate x staleness: the table, whose results it has, and a trainer's log."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config, TrainerConfig
from benchmarks.report import RESULTS
from benchmarks.staleness import Results, grid
from benchmarks.staleness_bounds import HOLDS, TABLE, bounds
from benchmarks.staleness_cell import Cell, CellResult
from trainer.objectives import build_objective
from trainer.step.staleness_bounds import staleness_warning

CELL = Cell(method="PPO", objective={"name": "ppo"}, mode="fixed", lag=0, lr=1e-4, seed=0)
RESULT = CellResult(
    reward=0.9, best=0.9, greedy=0.9, ess_ratio=1.0, means={}, curve=[(0, 0.1)], wall_s=1.0, cpu_s=1.0
)


def warned(objective: dict[str, Any], *, lr: float, max_staleness: int | str) -> str:
    trainer = TrainerConfig(lr=lr)
    config = Config(objective=objective, max_staleness=max_staleness, trainer=trainer)  # type: ignore[arg-type]
    return staleness_warning(config, build_objective(objective, max_tokens=config.sampling.max_new_tokens))


def test_bounds_by_hand() -> None:
    """Of .9 on-policy, .72 is the least that holds; a rate above a failed one does not count."""
    rewards = {
        ("fixed", 0, 1e-4): 0.9,
        ("fixed", 4, 1e-4): 0.8,
        ("fixed", 4, 3e-4): 0.73,
        ("fixed", 4, 1e-3): 0.1,
        ("mixed", 16, 1e-4): 0.5,
        ("mixed", 16, 3e-4): 0.9,
        ("fixed", 64, 1e-4): 0.9,
    }
    done = [
        (replace(CELL, mode=mode, lag=lag, lr=lr, seed=seed), replace(RESULT, reward=reward))
        for (mode, lag, lr), reward in rewards.items()
        for seed in (0, 1)
    ]
    once = (replace(CELL, mode="fixed", lag=64, lr=1e-3), replace(RESULT, reward=0.0))
    alone = (replace(CELL, method="GSPO", lag=4), RESULT)
    (entry,) = bounds([*done, once, alone])["methods"]
    assert (entry["method"], entry["best"]) == ("PPO", 0.9)
    assert [(row["lag"], row["lr"], row["failed_lr"], row["failed_reward"]) for row in entry["rows"]] == [
        (4, 3e-4, 1e-3, 0.1),
        (64, 1e-4, 0.0, 0.0),
        (16, 0.0, 1e-4, 0.5),
    ]


def test_table_is_that_of_the_results(tmp_path: Path) -> None:
    """If this fails after new cells: `python -m benchmarks.staleness --report`."""
    copy = tmp_path / "staleness.jsonl"
    copy.write_text((RESULTS / "staleness.jsonl").read_text())
    done = Results[Cell, CellResult](copy, CellResult.read).of(
        grid(full=True, seeds=[0, 1, 2], num_steps=400)
    )
    assert json.loads(TABLE.read_text()) == bounds(done)
    rewards = [
        r.reward for c, r in done if (c.method, c.mode, c.lag, c.lr) == ("token TIS", "fixed", 4, 3e-4)
    ]
    assert len(rewards) == 3 and statistics.fmean(rewards) < HOLDS * 0.9


def test_warning_names_the_boundary() -> None:
    text = warned({"name": "tis", "level": "token"}, lr=3e-4, max_staleness=4)
    for part in (
        "trainer.lr=0.0003",
        "max_staleness=4",
        "0.0012",
        "3.0 times",
        "0.0001 x 4",
        "token TIS",
        "small",
    ):
        assert part in text, (part, text)
    assert not warned({"name": "tis", "level": "token"}, lr=1e-4, max_staleness=4)
    assert not warned({"name": "tis", "level": "token"}, lr=1e-2, max_staleness=0), "on-policy"


def test_the_rule_is_of_the_chosen_method() -> None:
    """At 3e-4 and a lag of 16 VCPO still learns; without a correction even 1e-4 fails."""
    assert not warned({"name": "vcpo"}, lr=3e-4, max_staleness=16)
    assert "as published" in warned(
        {"name": "vcpo", "baseline_weights": "gradient"}, lr=3e-4, max_staleness=16
    )
    none = warned({"name": "reinforce"}, lr=1e-4, max_staleness=16)
    assert "not even the smallest rate" in none
    assert not warned({"name": "reinforce"}, lr=1e-6, max_staleness=16), "far below what was tried"
    masked = {"name": "tis", "level": "token", "masks": [{"name": "opsm"}]}
    assert "token TIS" in warned(masked, lr=1e-3, max_staleness=16)
    assert not warned({"name": "maspo"}, lr=1.0, max_staleness=64), "not in the table"


def test_lags_between_and_beyond_those_of_the_grid() -> None:
    """2 is judged by 4, 5 by 16, 1000 by 64, `auto` by its cap; an unknown variant by its class."""
    tis = {"name": "tis", "level": "token"}
    assert "ages of 4 steps" in warned(tis, lr=1e-3, max_staleness=2)
    assert "mixed ages of 16 steps" in warned(tis, lr=1e-3, max_staleness=5)
    assert "ages of 64 steps" in warned(tis, lr=1e-3, max_staleness=1000)
    assert "ages of 4 steps" in warned({"name": "ppo"}, lr=1e-3, max_staleness=16), "no more was tried at 16"
    assert not warned({"name": "ppo"}, lr=3e-4, max_staleness=16)
    assert "max_staleness=8" in warned(tis, lr=1e-3, max_staleness="auto")
    assert "TIS" in warned({"name": "tis", "cap": 3.5}, lr=1e-3, max_staleness=4)


@pytest.mark.parametrize("preset", [{"name": "tis"}, {"name": "oapl"}, {"name": "ppo"}, {"name": "vespo"}])
def test_default_job_has_no_warning(preset: dict[str, Any]) -> None:
    assert not warned(preset, lr=TrainerConfig().lr, max_staleness=Config().max_staleness)
