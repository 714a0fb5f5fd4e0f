"""What `areal-like plan` predicts about the staleness bound, against simulated jobs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks import simulate
from benchmarks.simulation_world import Job
from trainer.planning.staleness import (
    CLOSING,
    MASKED,
    Durations,
    forecast,
    least_staleness_of_close,
    masked_share,
)


def durations_of(spread: float, cut: float, steps_a_sample: float) -> Durations:
    uncut = Durations(mean=1.0, spread=spread)
    mean = 1 - uncut.excess(cut)
    return Durations(mean=steps_a_sample, spread=spread, longest_over_mean=cut / mean)


def test_closing_agrees_with_the_simulated_ledger() -> None:
    rows = [row for row in simulate.read("close") if row["rule"] == "close"]
    assert len(rows) == 42
    for row in rows:
        job = Job(**row["job"])
        durations = durations_of(job.spread, job.longest, row["slots_a_step"])
        predicted = forecast(
            durations,
            samples=job.samples_a_step,
            group_size=job.group_size,
            max_staleness=job.max_staleness,
            close_after=job.close_after,
        )
        assert predicted.closing == CLOSING
        assert predicted.closing * (1 - predicted.masked) == pytest.approx(row["goodput"], abs=0.045)
        assert predicted.lag == pytest.approx(row["lag_mean"], abs=0.2)


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
