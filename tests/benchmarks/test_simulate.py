"""The simulator of large jobs: what each rule of staleness keeps, in small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks import simulate
from benchmarks.simulation_rules import (
    RULES,
    DropRule,
    GateRule,
    LedgerCloseRule,
    LedgerDropRule,
    LedgerRule,
)
from benchmarks.simulation_world import Job, Sample, Server, Simulation
from tests.support.quick import only_in_chaos
from trainer.planning.staleness import least_staleness, slowest_over_mean

pytestmark = pytest.mark.slow

SMALL = Job(num_servers=16, slots=4, groups_per_step=16, failures_an_hour=2.0)


@pytest.mark.parametrize(("tail", "spread"), [*only_in_chaos(("lognormal", 1.0)), ("pareto", 1.5)])
def test_the_ledger_keeps_the_bound_when_servers_fail(tail: str, spread: float) -> None:
    simulation = LedgerRule(Job(**{**vars(SMALL), "tail": tail, "spread": spread}))
    simulation.run(40)
    found = simulation.results()
    assert found["lag_max"] <= SMALL.max_staleness and found["beyond_bound"] == 0 and found["drops"] == {}
    assert found["lost_share"] > 0, "no server failed with samples in progress"
    num_steps, rest = divmod(sum(simulation.lags.values()), SMALL.samples_a_step)
    assert num_steps in (40, 41) and rest == 0, "one more step may have begun"
    assert 0.1 < found["of_limit"] <= 1.05


@pytest.mark.chaos
def test_baselines_break_the_bound_or_waste_samples() -> None:
    runs: dict[type[Simulation], dict[str, float]] = {}
    for rule in RULES:
        simulation = rule(SMALL)
        simulation.run(40)
        runs[rule] = simulation.results()
    assert runs[GateRule]["lag_max"] > SMALL.max_staleness and runs[GateRule]["dropped_share"] == 0
    assert runs[DropRule]["beyond_bound"] == 0 and runs[DropRule]["dropped_share"] > 0.05
    assert runs[LedgerRule]["dropped_share"] == 0


@pytest.mark.chaos
def test_closing_keeps_both_pools_busy_and_the_bound_by_token() -> None:
    """Where waiting costs half of the throughput and dropping a part of the samples."""
    found = {}
    for rule in (LedgerRule, LedgerDropRule, LedgerCloseRule):
        simulation = rule(simulate.close_job(1.0, 8, 1, 4))
        simulation.run(30)
        found[rule] = simulation.results()
        assert found[rule]["lag_max"] <= 4
    closed = found[LedgerCloseRule]
    assert closed["of_limit"] > 0.95 and closed["goodput"] > 0.85 and closed["untrained"] < 0.01
    assert closed["idle_generation"] < 0.05 and closed["beyond_tokens"] > 0
    assert found[LedgerRule]["goodput"] < 0.7 and found[LedgerRule]["untrained"] == 0
    assert found[LedgerRule]["idle_trainer"] > 0.3 and found[LedgerRule]["waited_s"] > 10
    assert found[LedgerDropRule]["goodput"] < closed["goodput"] and found[LedgerDropRule]["untrained"] > 0.05


@pytest.mark.chaos
def test_closing_survives_the_failures_of_servers() -> None:
    simulation = LedgerCloseRule(SMALL)
    simulation.run(40)
    found = simulation.results()
    assert found["lag_max"] <= SMALL.max_staleness and found["lost_share"] > 0
    assert found["of_limit"] > 0.9


class _OneSlot(Simulation):
    """A slot that is always full, and a trainer that needs no samples."""

    def __init__(self) -> None:
        super().__init__(Job(num_servers=1, slots=1, step_s=10.0, push_s=0.0, failures_an_hour=0.0))
        self.complete: list[Sample] = []

    def dispatch(self) -> Iterable[tuple[Server, Any]]:
        return [(server, None) for server in self.servers if server.free]

    def ended(self, server: Server, sample: Sample) -> None:
        self.complete.append(sample)

    def lost(self, server: Server, work: list[Any]) -> None:
        raise AssertionError("no server fails")

    def take(self) -> list[Sample]:
        return []


def test_a_sample_has_the_seconds_of_each_version() -> None:
    simulation = _OneSlot()
    simulation.run(200)
    assert len(simulation.complete) > 10
    for sample in simulation.complete:
        steps = [step for step, _ in sample.runs]
        assert steps == list(range(sample.weights_step, sample.weights_step + len(steps)))
        assert sum(seconds for _, seconds in sample.runs) == pytest.approx(sample.seconds)
        assert all(seconds == pytest.approx(10.0) for _, seconds in sample.runs[1:-1])


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


@pytest.mark.parametrize("longest", [2.0, 8.0])
def test_a_limit_of_durations_keeps_their_mean(longest: float) -> None:
    import random

    job = Job(spread=1.0, longest=longest)
    drawn = [job.duration_s(random.Random(number)) for number in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(job.mean_s, rel=0.05)
    assert max(drawn) > job.mean_s * longest / 2
    assert max(drawn) / min(drawn) > 10


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
