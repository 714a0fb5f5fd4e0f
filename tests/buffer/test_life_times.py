"""Histograms of the time that groups and leases spend in their states."""

from __future__ import annotations

import re

from areal_like.runtime.metrics import Metrics
from areal_like.spans import recorder
from buffer.diagnosis.life_times import LifeTimes, is_held_back
from buffer.tickets import State
from tests.support.ledger_simulation import add_server, deliver, done, new_ledger


def series(metrics: Metrics, name: str) -> tuple[float, float]:
    """(number, sum) of a histogram."""
    text = metrics.exposition().decode()
    values = [
        re.search(rf"^areal_{name.replace('SUFFIX', end)} (\S+)$", text, re.M) for end in ("count", "sum")
    ]
    number, total = (float(value[1]) for value in values if value)
    return number, total


def test_times_in_queue_and_leases_are_observed() -> None:
    now_s = [0.0]
    metrics, ledger = Metrics(), new_ledger(max_staleness=9, num_steps=10)
    LifeTimes(metrics, clock=lambda: now_s[0]).watch(ledger.state)
    add_server(ledger, "a", capacity=1000)
    leases = ledger.dispatcher.grant(now_s=0.0)["a"]
    now_s[0] = 7.0
    for lease in leases:
        for index in lease.sample_indices:
            deliver(ledger, "a", done(lease, index, [0]))
    assert series(metrics, "lease_seconds_SUFFIX") == (len(leases), 7.0 * len(leases))
    counts = ledger.state.tickets.num_by_state()
    num_batched, num_ready = counts[State.BATCHED], counts[State.READY]
    assert num_batched + num_ready == len(leases) and num_batched and num_ready
    assert series(metrics, 'ticket_queue_seconds_SUFFIX{state="ready"}') == (num_batched, 0.0)
    now_s[0] = 10.0
    ledger.trainer.complete_step(incarnation=1, step=0)
    ledger.trainer.commit(incarnation=1, step=0)
    assert series(metrics, 'ticket_queue_seconds_SUFFIX{state="batched"}') == (0.0, 0.0), "it has got none"
    num_recorded, total_s = series(metrics, 'ticket_queue_seconds_SUFFIX{state="ready"}')
    assert num_recorded > num_batched and total_s == 3.0 * (num_recorded - num_batched)


def test_a_group_is_batched_until_the_trainer_gets_it() -> None:
    now_s = [0.0]
    metrics, ledger = Metrics(), new_ledger()
    LifeTimes(metrics, clock=lambda: now_s[0]).watch(ledger.state)
    add_server(ledger, "a", capacity=4)
    for lease in ledger.dispatcher.grant(now_s=0.0)["a"]:
        for index in lease.sample_indices:
            deliver(ledger, "a", done(lease, index, [0]))
    for now_s[0], position, num_served, total_s in (
        (2.0, 0, 1.0, 2.0),
        (50.0, 0, 1.0, 2.0),  # a repeated request
        (60.0, 1, 2.0, 62.0),
    ):
        assert ledger.trainer.fetch(step=0, position=position) is not None
        assert series(metrics, 'ticket_queue_seconds_SUFFIX{state="batched"}') == (num_served, total_s)
    now_s[0] = 900.0
    ledger.trainer.complete_step(incarnation=1, step=0)
    ledger.trainer.commit(incarnation=1, step=0)
    assert series(metrics, 'ticket_queue_seconds_SUFFIX{state="batched"}') == (2.0, 62.0)


def test_complete_samples_that_wait_for_others_hold_a_step_back() -> None:
    """Until they fill the free positions, or the step is full."""
    ledger = new_ledger(max_staleness=4, groups_per_step=2, group_size=2)
    add_server(ledger, "a", capacity=12)
    leases = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert len(leases) == 6
    seen = []
    for lease in leases[:4]:
        deliver(ledger, "a", done(lease, 0, [0]))
        seen.append(is_held_back(ledger.state))
    assert seen == [False, False, False, True]
    deliver(ledger, "a", done(leases[0], 1, [0]))
    assert is_held_back(ledger.state), "one position is filled, and three samples are complete"
    deliver(ledger, "a", done(leases[1], 1, [0]))
    assert not is_held_back(ledger.state), "the step is full"
    ledger.state.counters.count("held_back_s", 2.5)
    assert ledger.state.counters.summary()["held_back_s"] == 2.5


def test_positions_of_parts_do_not_wait_in_the_queue() -> None:
    metrics = Metrics()
    ledger = new_ledger(max_staleness=4, groups_per_step=2, group_size=2, overdue="close", close_after=1)
    LifeTimes(metrics, clock=lambda: 0.0).watch(ledger.state)
    add_server(ledger, "a", capacity=12)
    for lease in ledger.dispatcher.grant(now_s=0.0)["a"]:
        deliver(ledger, "a", done(lease, 0, [0]))
    assert ledger.state.tickets.num_by_state()[State.BATCHED]
    assert series(metrics, 'ticket_queue_seconds_SUFFIX{state="ready"}') == (0.0, 0.0)


def test_writes_of_the_ledger_are_observed() -> None:
    metrics = Metrics()
    LifeTimes(metrics, clock=lambda: 0.0)
    recorder.record("ledger", "write", start_s=1.0, end_s=3.0)
    assert series(metrics, "ledger_write_seconds_SUFFIX") == (1.0, 2.0)
