"""Whole runs under a virtual clock: every run ends, no ticket is left over, and no lag exceeds the bound."""

from __future__ import annotations

import pytest

from buffer.ledger.recovery import recover
from buffer.tickets import Drop, State
from launch.audit.invariants import LEDGER_INVARIANTS
from tests.buffer.test_ledger_stateful import observed
from tests.support.ledger_simulation import SimulatedJob, SimulatedServer, new_ledger
from tests.support.quick import only_in_chaos
from tests.support.row_store import RowStore


def servers() -> list[SimulatedServer]:
    return [
        SimulatedServer(name="fast", tokens_per_s=100, max_running=24, capacity=32),
        SimulatedServer(name="slow", tokens_per_s=20, max_running=12, capacity=16),
        SimulatedServer(name="small", tokens_per_s=50, max_running=2, capacity=2),
    ]


@pytest.mark.parametrize("overdue", ["wait", "drop"])
@pytest.mark.parametrize("step_s", [0.2, 8.0])
@pytest.mark.parametrize("max_staleness", [0, *only_in_chaos(1), 4])
def test_every_position_is_filled_within_the_staleness_bound(
    max_staleness: int, step_s: float, overdue: str
) -> None:
    ledger = new_ledger(
        max_staleness=max_staleness, groups_per_step=8, group_size=4, num_steps=25, overdue=overdue
    )
    plant = SimulatedJob(ledger=ledger, servers=servers(), step_s=step_s, seed=max_staleness)
    plant.run()
    counts = ledger.state.tickets.num_by_state()
    assert counts[State.TRAINED] == 25 * 8
    assert [(step, position) for step, position, _ in plant.order] == [
        (step, position) for step in range(25) for position in range(8)
    ]
    assert len({ticket_id for _, _, ticket_id in plant.order}) == 25 * 8, "a ticket was trained twice"
    assert sum(counts.values()) == counts[State.TRAINED] + counts[State.DROPPED], "tickets are left over"
    assert max(ledger.state.counters.lag_histogram) <= max_staleness
    assert ledger.state.counters.summary()["samples_trained"] == 25 * 8 * 4
    if overdue == "wait":
        assert ledger.state.drops[Drop.STALE] == 0, "a healthy run has no stale drops"
    assert ledger.state.store.num_bytes == 0, "records outlived their commit"


@pytest.mark.parametrize("step_s", [0.4, 4.0])
@pytest.mark.parametrize(("close_after", "max_staleness"), [(1, 1), *only_in_chaos((2, 2), (4, 16)), (2, 4)])
def test_closing_fills_every_position_within_the_bound(
    close_after: int, max_staleness: int, step_s: float
) -> None:
    """With samples of long-tailed lengths that fail, and a server that dies with late samples."""
    store = RowStore()
    ledger = new_ledger(
        store=store,
        durable=True,
        overdue="close",
        close_after=close_after,
        max_staleness=max_staleness,
        groups_per_step=8,
        group_size=4,
        num_steps=25,
        max_sample_retries=1,
        lease_timeout_s=1.5,
    )
    plant = SimulatedJob(
        ledger=ledger,
        servers=servers(),
        step_s=step_s,
        fail_probability=0.03,
        kill_at_s={"slow": 9.0},
        seed=close_after,
    )
    plant.run()
    assert [(step, position) for step, position, _ in plant.order] == [
        (step, position) for step in range(25) for position in range(8)
    ]
    samples = [(record.ticket_id, record.sample_index) for group in plant.groups for record in group.records]
    assert len(set(samples)) == len(samples) == 25 * 8 * 4, "a sample was trained twice"
    counters = ledger.state.counters
    assert max(counters.lag_histogram) <= max_staleness
    assert counters["groups_closed"] or step_s == 4.0, "only a slow trainer gets all groups whole"
    num_masked = 0
    for group in plant.groups:
        step_of = dict(zip(group.versions, group.steps, strict=True))
        for record in group.records:
            ages = [group.step - step_of[version] for version, _ in record.runs if version in step_of]
            assert 0 <= min(ages) <= max_staleness
            num_masked += sum(
                length
                for version, length in record.runs
                if version in step_of and group.step - step_of[version] > max_staleness
            )
    assert counters["tokens_masked"] == num_masked
    counts = ledger.state.tickets.num_by_state()
    assert counts[State.TRAINED] == 25 * 8 and not any(
        counts[state] for state in State if not state.is_terminal
    )
    rows = store.copy().connection
    for law in LEDGER_INVARIANTS:
        if "bytes on disk" not in law.text:  # this store has no segment files
            assert rows.execute(law.violations).fetchall() == [], law.text
    assert observed(recover(ledger.settings, store.copy(), now_s=plant.now_s)) == observed(ledger)


def test_staleness_zero_is_synchronous() -> None:
    ledger = new_ledger(max_staleness=0, groups_per_step=4, num_steps=10)
    SimulatedJob(ledger=ledger, servers=servers()).run()
    assert set(ledger.state.counters.lag_histogram) == {0}
    assert ledger.state.tickets.num_issued == 40


def test_generation_overlaps_training_with_a_larger_bound() -> None:
    """With a bound of 4 the same plant is faster, and lags above 1 occur."""
    times = {}
    for max_staleness in (0, 4):
        ledger = new_ledger(max_staleness=max_staleness, groups_per_step=8, group_size=4, num_steps=25)
        plant = SimulatedJob(ledger=ledger, servers=servers(), step_s=4.0)
        plant.run()
        times[max_staleness] = plant.now_s
    assert times[4] < 0.75 * times[0]
    assert max(ledger.state.counters.lag_histogram) >= 2


def test_overdue_wait_keeps_long_responses_that_drop_loses() -> None:
    mean_tokens = {}
    for overdue in ("wait", "drop"):
        ledger = new_ledger(max_staleness=1, groups_per_step=8, group_size=4, num_steps=25, overdue=overdue)
        SimulatedJob(ledger=ledger, servers=servers(), step_s=0.2).run()
        mean_tokens[overdue] = ledger.state.counters.summary()["mean_trained_sample_tokens"]
    assert ledger.state.drops[Drop.STALE] > 0
    assert mean_tokens["wait"] > mean_tokens["drop"]


def test_a_run_survives_a_killed_server_and_failing_samples() -> None:
    ledger = new_ledger(max_staleness=4, groups_per_step=8, group_size=4, num_steps=25, lease_timeout_s=3.0)
    plant = SimulatedJob(ledger=ledger, servers=servers(), fail_probability=0.05, kill_at_s={"fast": 6.0})
    plant.run()
    assert ledger.state.tickets.num_by_state()[State.TRAINED] == 200
    assert ledger.state.counters["num_leases_lost"] > 0
    assert ledger.state.counters["num_failures"] > 0
    assert max(ledger.state.counters.lag_histogram) <= 4
