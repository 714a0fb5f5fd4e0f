"""The simulator of large jobs: what each rule of staleness keeps, in small."""

from __future__ import annotations

import pytest

from benchmarks import simulate
from benchmarks.simulation_rules import RULES, DropRule, GateRule, LedgerRule
from benchmarks.simulation_world import Job, Simulation
from trainer.planning.staleness import least_staleness, slowest_over_mean

pytestmark = pytest.mark.slow

SMALL = Job(num_servers=16, slots=4, groups_per_step=16, failures_an_hour=2.0)


@pytest.mark.parametrize("tail", [("lognormal", 1.0), ("pareto", 1.5)], ids=["lognormal", "pareto"])
def test_the_ledger_keeps_the_bound_when_servers_fail(tail: tuple[str, float]) -> None:
    simulation = LedgerRule(Job(**{**vars(SMALL), "tail": tail[0], "spread": tail[1]}))
    simulation.run(40)
    found = simulation.results()
    assert found["lag_max"] <= SMALL.max_staleness and found["beyond_bound"] == 0 and found["drops"] == {}
    assert found["lost_share"] > 0, "no server failed with samples in progress"
    assert sum(simulation.lags.values()) == 40 * SMALL.samples_a_step
    assert 0.1 < found["of_limit"] <= 1.05


def test_baselines_break_the_bound_or_waste_samples() -> None:
    runs: dict[type[Simulation], dict[str, float]] = {}
    for rule in RULES:
        simulation = rule(SMALL)
        simulation.run(40)
        runs[rule] = simulation.results()
    assert runs[GateRule]["lag_max"] > SMALL.max_staleness and runs[GateRule]["dropped_share"] == 0
    assert runs[DropRule]["beyond_bound"] == 0 and runs[DropRule]["dropped_share"] > 0.05
    assert runs[LedgerRule]["dropped_share"] == 0


def test_short_tails_reach_the_limit() -> None:
    job = Job(**{**vars(SMALL), "spread": 0.2, "failures_an_hour": 0.0, "push_s": 0.0})
    simulation = LedgerRule(job)
    simulation.run(30)
    assert simulation.results()["of_limit"] > 0.9


@pytest.mark.parametrize(("tail", "spread"), [("lognormal", 1.0), ("pareto", 2.5)])
def test_durations_have_their_mean_and_quantiles(tail: str, spread: float) -> None:
    import random

    job = Job(tail=tail, spread=spread)
    drawn = sorted(job.duration_s(random.Random(number)) for number in range(20_000))
    assert sum(drawn) / len(drawn) == pytest.approx(job.mean_s, rel=0.05)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(job.quantile_s(0.99), rel=0.1)


def test_the_formula_fits_the_published_simulation() -> None:
    """What has at least the formula's bound reaches the limit, and what has half of it does not."""
    found = {True: 0, False: 0}
    for row in simulate.read("tails"):
        job = Job(**row["job"])
        wanted = least_staleness(
            steps_a_sample=row["slots_a_step"], spread=job.spread, samples=job.samples_a_step
        )
        if job.max_staleness >= wanted:
            assert row["of_limit"] > 0.95, row
            found[True] += 1
        elif job.max_staleness + 1 <= wanted / 2:
            assert row["of_limit"] < 0.9, row
            found[False] += 1
    assert min(found.values()) >= 5


def test_the_longest_answer_bounds_the_formula() -> None:
    bounded = least_staleness(steps_a_sample=2.0, spread=1.0, samples=256, longest_over_mean=2.0)
    assert bounded == 5 < least_staleness(steps_a_sample=2.0, spread=1.0, samples=256)


def test_the_formula_grows_with_tail_and_slots() -> None:
    assert slowest_over_mean(spread=0.0, samples=256) == 1.0
    bounds = [least_staleness(steps_a_sample=2.0, spread=each, samples=256) for each in (0.0, 0.5, 1.0)]
    assert bounds == sorted(bounds) and bounds[0] >= 1
    assert least_staleness(steps_a_sample=4.0, spread=1.0, samples=256) > bounds[2]
