"""The staleness benchmark: ages of samples, determinism of a cell, and resumption of a stopped grid."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.staleness import FULL_METHODS, PAGE_METHODS, Results, grid, name_of, run
from benchmarks.staleness_cell import Cell, CellResult, build_model, run_cell
from benchmarks.staleness_report import as_table, draw, scores
from trainer.objectives import OBJECTIVES

TINY = Cell(
    method="none",
    objective={"name": "reinforce"},
    mode="fixed",
    lag=0,
    lr=1e-3,
    seed=0,
    num_steps=10,
    groups_per_step=4,
    warm_start_steps=150,
)
RESULT = CellResult(
    reward=0.5,
    best=0.5,
    greedy=0.5,
    ess_ratio=1.0,
    means={},
    curve=[(0, 0.1), (10, 0.5)],
    wall_s=1.0,
    cpu_s=1.0,
)


def ages(cell: Cell) -> list[int]:
    """Age of every group of every step, in optimizer steps, ordered by step and group."""
    planned = [
        (step, group, step - version) for version, wanted in cell.plan().items() for step, group in wanted
    ]
    all_groups = [(step, group) for step in range(cell.num_steps) for group in range(cell.groups_per_step)]
    assert sorted((step, group) for step, group, _ in planned) == all_groups, (
        "every group of every step is sampled once"
    )
    return [age for *_, age in sorted(planned)]


def test_fixed_age_is_exact_once_the_run_is_that_old() -> None:
    assert ages(replace(TINY, lag=4, groups_per_step=1)) == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_mixed_ages_are_uniform_and_equal_for_all_methods() -> None:
    cell = replace(TINY, mode="mixed", lag=4, num_steps=400)
    drawn = ages(cell)
    settled = drawn[4 * cell.groups_per_step :]
    assert {age: abs(settled.count(age) / len(settled) - 0.2) < 0.05 for age in settled} == dict.fromkeys(
        range(5), True
    )
    assert ages(replace(cell, method="PPO", objective={"name": "ppo"}, lr=1e-4)) == drawn
    assert ages(replace(cell, seed=1)) != drawn


@pytest.mark.parametrize(("mode", "longest"), [("fixed", 8), ("mixed", 4)])
def test_periodic_sync_has_the_mean_age_of_its_mode(mode: str, longest: int) -> None:
    cell = replace(TINY, mode=mode, lag=4, periodic=True, num_steps=90)
    assert max(ages(cell)) == longest
    assert statistics.mean(ages(cell)) == {"fixed": 4, "mixed": 2}[mode]


def test_grid_starts_with_one_seed_at_lag_16() -> None:
    cells = grid(full=False, seeds=[0, 1, 2], num_steps=400)
    assert len(cells) == len({name_of(cell) for cell in cells}) == 10 * 6 * 4 * 3
    assert {(cell.mode, cell.lag, cell.seed) for cell in cells[:40]} == {("fixed", 16, 0)}
    taught = {"distill"}  # learns from a teacher, which the grid has not
    assert {own["objective"]["name"] for own in FULL_METHODS.values()} | taught == set(OBJECTIVES.names())


@pytest.mark.chaos
def test_cell_is_deterministic_and_ages_are_as_planned(tmp_path: Path) -> None:
    build_model(tmp_path, seed=TINY.seed, warm_start_steps=TINY.warm_start_steps)
    try:
        fresh, old, again = (run_cell(replace(TINY, lag=lag), str(tmp_path)) for lag in (0, 6, 6))
    finally:
        dist.destroy_process_group()
    assert again == old
    # Sampled by the weights of the step itself, so importance weights are 1 up to numerics.
    assert fresh.ess_ratio == pytest.approx(1, abs=1e-3)
    assert old.ess_ratio < 0.98
    assert [step for step, _ in old.curve] == list(range(11))


@pytest.mark.chaos
@pytest.mark.slow
def test_stopped_grid_resumes(tmp_path: Path) -> None:
    """Long, because a whole job runs first."""
    path = tmp_path / "results.jsonl"
    cells = [replace(TINY, num_steps=2, warm_start_steps=0, seed=seed) for seed in (0, 1)]
    run(cells[:1], Results[Cell, CellResult](path, CellResult.read), num_jobs=1)
    first = path.read_text()
    path.write_text(first + '{"cell": {"met')  # killed while writing

    results = Results[Cell, CellResult](path, CellResult.read)
    assert path.read_text() == first
    found = results.get(cells[0])
    assert found is not None and len(found.curve) == 3
    assert results.get(replace(cells[0], lr=2e-3)) is None
    assert results.get(cells[1]) is None

    results.add(cells[1], found)
    assert [json.loads(line)["cell"]["seed"] for line in path.read_text().splitlines()] == [0, 1]
    assert Results[Cell, CellResult](path, CellResult.read).get(cells[1]) == found


def test_table_shows_the_best_and_the_common_rate(tmp_path: Path) -> None:
    """1e-3 has one seed alone, which may have been lucky."""
    rewards = {(3e-4, 0): 0.3, (3e-4, 1): 0.1, (1e-4, 0): 0.9, (1e-4, 1): 0.5, (1e-3, 0): 0.95}
    done = [
        (replace(TINY, lr=lr, seed=seed, lag=16), replace(RESULT, reward=reward))
        for (lr, seed), reward in rewards.items()
    ]
    done.append((replace(TINY, method="PPO", mode="mixed", lag=4), RESULT))
    best, common = scores(done)["none", ("fixed", 16)]
    assert common is not None and (best.mean, common.mean) == pytest.approx((0.7, 0.2))
    assert as_table(done, PAGE_METHODS).splitlines()[2:] == [
        "| none | 0.70 / 0.20 (0.10) | – |",
        "| PPO | – | 0.50 / – |",
    ]
    draw(done, PAGE_METHODS, tmp_path / "docs" / "figure.png")
    assert (tmp_path / "docs" / "figure.png").read_bytes().startswith(b"\x89PNG")
