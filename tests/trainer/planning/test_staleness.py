"""What `areal-like plan` predicts about the staleness bound, against simulated jobs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks import simulate
from benchmarks.simulation_world import Job
from trainer.planning.staleness import (
    MASKED,
    PROVISIONAL,
    Durations,
    forecast,
    least_staleness_of_close,
    masked_share,
)

SIMULATED = [
    # spread, cut-off in means, slots / samples of a step, then for max_staleness 4, 8 and 16:
    # (tokens trained within the bound over the limit, mean lag of a sample's oldest trained token)
    (0.5, 8, 2, ((0.95, 3.4), (0.995, 3.6), (0.997, 3.6))),
    (1.0, 4, 1, ((0.95, 2.8), (0.99, 2.9), (0.99, 2.9))),
    (1.0, 8, 1, ((0.91, 2.8), (0.98, 2.9), (0.99, 2.9))),
    (1.0, 4, 2, ((0.79, 3.5), (0.97, 3.9), (0.995, 4.0))),
    (1.0, 8, 2, ((0.77, 3.4), (0.93, 3.8), (0.99, 3.9))),
    (1.5, 8, 2, ((0.61, 3.3), (0.82, 3.7), (0.96, 4.0))),
    (1.5, 16, 2, ((0.59, 3.2), (0.78, 3.7), (0.91, 3.9))),
]
"""An event simulation with closed groups: 64 groups of 4 a step, `close_after` 4, both pools equally fast.
The cut-off is in means of the durations before they are cut off."""


def durations_of(spread: float, cut: float, steps_a_sample: float) -> Durations:
    uncut = Durations(mean=1.0, spread=spread)
    mean = 1 - uncut.excess(cut)
    return Durations(mean=steps_a_sample, spread=spread, longest_over_mean=cut / mean)


@pytest.mark.parametrize(("spread", "cut", "steps_a_sample", "found"), SIMULATED)
def test_closing_agrees_with_the_simulation(
    spread: float, cut: float, steps_a_sample: float, found: tuple[tuple[float, float], ...]
) -> None:
    durations = durations_of(spread, cut, steps_a_sample)
    for bound, (trained, lag) in zip((4, 8, 16), found, strict=True):
        predicted = forecast(durations, samples=256, group_size=4, max_staleness=bound, close_after=4)
        assert predicted.closing * (1 - predicted.masked) == pytest.approx(trained, abs=0.025)
        assert predicted.lag == pytest.approx(lag, abs=0.2)
        assert predicted.closing == PROVISIONAL.of_limit


def test_waiting_agrees_with_the_simulated_ledger() -> None:
    errors = []
    for row in simulate.read("tails"):
        job = Job(**row["job"])
        durations = Durations(mean=row["slots_a_step"], spread=job.spread)
        predicted = forecast(
            durations,
            samples=job.samples_a_step,
            group_size=job.group_size,
            max_staleness=job.max_staleness,
            close_after=1,
        )
        errors.append(predicted.waiting - row["of_limit"])
    assert len(errors) >= 50 and max(map(abs, errors)) < 0.2
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.05


def test_durations_are_a_cut_log_normal() -> None:
    durations = Durations(mean=3.0, spread=1.0, longest_over_mean=4.0)
    shares = [(i + 0.5) / 50_000 for i in range(50_000)]
    drawn = [durations.quantile(share) for share in shares]
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(3.0, rel=0.002) and max(drawn) == pytest.approx(12.0)
    for steps in (0.0, 1.0, 4.0, 9.0, 12.0, 20.0):
        excess = sum(max(0.0, each - steps) for each in drawn) / len(drawn) / mean
        assert durations.excess(steps) == pytest.approx(excess, abs=0.002)
    assert Durations(mean=2.0, spread=0.0).excess(0.5) == 0.75
    equal = Durations(mean=2.0, spread=1.0, longest_over_mean=1.0)
    assert equal.quantile(0.01) == pytest.approx(2.0, rel=0.05) and equal.excess(2.0) == 0


def test_a_larger_bound_masks_less_and_a_longer_tail_more() -> None:
    durations = Durations(mean=2.0, spread=1.0, longest_over_mean=8.0)
    shares = [masked_share(durations, bound) for bound in range(1, 17)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.4 and shares[-1] < 0.01
    assert masked_share(replace(durations, spread=1.5), 4) > shares[3]
    least = least_staleness_of_close(durations)
    assert shares[least - 1] <= MASKED < shares[least - 2]
