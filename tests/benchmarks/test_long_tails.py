"""The pure parts of the latency benchmark: its grid, what it reads from a job's files, and its tables."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_like.adding import is_held_out
from areal_like.runtime.command_line import load_config
from benchmarks import long_tails
from benchmarks.long_tails import SLOTS, Cell, figures, grid, is_done, latest
from benchmarks.long_tails_report import as_tables, draw, final_reward, recovered, reward_at
from benchmarks.long_tails_task import SlowAddingTask
from rollout_server.tasks.base import Example
from rollout_server.tools.environment import ToolEnvironment

CELL = Cell(side="close", objective="tis", max_staleness=4, seed=0)


def row_of(side: str, *, idle: float, reward: float = 0.5, bound: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{side}/tis-{bound}/seed-0", "side": side, "objective": "tis", "max_staleness": bound,
        "seed": 0, "settings": [], "seconds": 30.0, "steps": 20, "tokens_a_second": 100.0, "idle_slots": idle,
        "trainer_wait": 0.8, "longest_step_s": 3.0, "lag_mean": 2.0, "lag_max": 4, "masked_share": 0.0,
        "early_members": 3.0, "drops": {}, "evals": [(5.0, 0.1), (25.0, reward)], "audit_is_clean": True,
    } | more  # fmt: skip


def test_cells_have_different_names_and_compare_the_sides_first() -> None:
    cells = list(grid())
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.side for cell in cells[:4]} == {"wait", "close", "unbounded", "drop"}
    assert {cell.max_staleness for cell in cells} == {2, 4, 8, long_tails.UNBOUNDED}
    assert CELL.name == "close/tis-4/seed-0"


@pytest.mark.parametrize("cell", [cell for cell in grid() if cell.seed == 0], ids=lambda cell: cell.name)
def test_each_cell_is_a_job(cell: Cell) -> None:
    config = load_config(cell.settings)
    assert config.overdue == ("wait" if cell.side == "unbounded" else cell.side)
    assert config.max_staleness == cell.max_staleness


def test_a_cell_is_done_only_with_the_same_settings() -> None:
    row = {"settings": CELL.settings, "seconds": 30.0}
    assert is_done(CELL, [row], seconds=30.0)
    assert not is_done(CELL, [row], seconds=31.0)
    assert not is_done(Cell(side="wait", objective="tis", max_staleness=4, seed=0), [row], seconds=30.0)
    assert latest([{"name": "a", "n": 1}, {"name": "b", "n": 2}, {"name": "a", "n": 3}]) == [
        {"name": "a", "n": 3},
        {"name": "b", "n": 2},
    ]


def test_figures_are_of_the_time_from_the_first_step_on() -> None:
    def step(at_s: float, **more: Any) -> dict[str, Any]:
        row = {"time_unix_s": at_s, "num_sequences": 10.0, "response_length_mean": 4.0, "wait_data_s": 1.0}
        return row | {"lag_mean": 1.0, "lag_max": 2, "reward_mean": 0.5} | more

    steps = [
        step(100.0),
        step(102.0, eval_reward=0.25),
        step(109.0, masked_share=0.5),
        step(111.0, lag_max=9),
    ]
    gauges = [[at_s, place, held] for at_s, held in ((99.0, 9.0), (101.0, 16.0), (105.0, 32.0), (120.0, 9.0))
              for place in ("at_engine", "in_tools")]  # fmt: skip
    spans = [{"daemon": "rollout-0"}, *gauges, [101.0, "running", 5.0], [1.0, 0.1, "engine", "decode", {}]]
    found = figures(steps, spans, seconds=10.0)
    assert found["steps"] == 2 and found["lag_max"] == 2
    assert found["idle_slots"] == pytest.approx(1 - (32 + 64) / 2 / SLOTS, abs=1e-3)
    assert found["tokens_a_second"] == pytest.approx((40 + 20) / 10)
    assert found["trainer_wait"] == pytest.approx(0.2)
    assert found["longest_step_s"] == 7.0
    assert found["evals"] == [(2.0, 0.25)]


def test_a_job_that_hangs_has_a_long_last_step() -> None:
    steps = [{"time_unix_s": 100.0}, {"time_unix_s": 101.0}]
    rows = [
        row | dict.fromkeys(("num_sequences", "response_length_mean", "wait_data_s"), 1.0) for row in steps
    ]
    rows = [row | {"lag_mean": 0.0, "lag_max": 0, "reward_mean": 0.0} for row in rows]
    assert figures(rows, [], seconds=10.0)["longest_step_s"] == 9.0


def test_closing_recovers_a_share_of_what_waiting_costs() -> None:
    rows = [row_of("wait", idle=0.6), row_of("close", idle=0.2), row_of("unbounded", idle=0.1, bound=64)]
    ((objective, bound, waiting, share),) = recovered(rows)
    assert (objective, bound) == ("tis", 4)
    assert waiting == pytest.approx(0.5) and share == pytest.approx(0.8)
    assert "80%" in as_tables(rows)
    assert not recovered(rows[:2]), "without the unbounded job it is unknown what waiting causes"


def test_rewards_by_time() -> None:
    row = row_of("close", idle=0.0, reward=0.7)
    assert final_reward(row) == 0.7
    assert final_reward(row | {"evals": [(5.0, 0.1)]}) == 0.1 and final_reward(row | {"evals": []}) == 0.0
    assert [reward_at([row], at_s) for at_s in (0.0, 6.0, 25.0)] == [0.1, 0.1, 0.7]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw([row_of("wait", idle=0.6), row_of("unbounded", idle=0.1, bound=64)], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    draw([], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_latencies_are_of_the_sample_and_have_a_mean() -> None:
    task, terms = SlowAddingTask(call_s=2.0), training_terms(3)
    assert (
        task.call_time_s(terms, seed=5) == task.call_time_s(terms, seed=5) != task.call_time_s(terms, seed=6)
    )
    times = [task.call_time_s(terms, seed=seed) for seed in range(4000)]
    assert sum(times) / len(times) == pytest.approx(2.0, rel=0.1) and max(times) <= 8.0
    even = SlowAddingTask(call_s=2.0, is_even=True)
    totals = {round(even.call_time_s(training_terms(num), seed=num) * (num - 1), 9) for num in (2, 4, 8)}
    assert len(totals) == 1


def test_held_out_prompts_do_not_sleep() -> None:
    terms = next(t for t in ((10, 11 + i) for i in range(80)) if is_held_out(t))
    assert SlowAddingTask().call_time_s(terms, seed=1) == 0.0


def test_the_calculator_adds() -> None:
    environment = SlowAddingTask(call_s=0.001).environment(Example(prompt="10+11", answer="21"))
    assert isinstance(environment, ToolEnvironment)
    assert [tool["function"]["name"] for tool in environment.tools] == ["add"]
    assert asyncio.run(environment.add(10, 11)) == 21  # type: ignore[attr-defined]


def training_terms(num: int) -> tuple[int, ...]:
    """Terms that are not held out."""
    return next(t for t in (tuple(range(10 + i, 10 + i + num)) for i in range(80)) if not is_held_out(t))
