"""The facts that the watchdog gets from a real ledger about groups that a step waits for."""

from __future__ import annotations

from areal_like.config import from_mapping
from areal_like.runtime.metrics import Metrics
from areal_like.wire.messages.producer import Purpose
from buffer.diagnosis.rules import awaited
from buffer.ledger.ledger import Ledger
from buffer.service.job_watch import JobWatch
from buffer.service.peers import ConnectedPeers
from buffer.tickets import State
from tests.support.ledger_simulation import add_server, beat, deliver, done, new_ledger


def watch_of(ledger: Ledger, **settings: object) -> JobWatch:
    peers = ConnectedPeers(job="", dataset="")
    return JobWatch(from_mapping(settings), Metrics(), ledger, peers, now_s=0.0)


def test_a_position_that_is_reserved_for_an_overdue_group() -> None:
    ledger = new_ledger(max_staleness=1, groups_per_step=1)
    watch = watch_of(ledger, objective={"name": "rebel"})
    add_server(ledger, "a", capacity=4)
    slow, fast = ledger.dispatcher.grant(now_s=0.0)["a"]
    for index in fast.sample_indices:
        deliver(ledger, "a", done(fast, index, [0]))
    facts = watch.facts(now_s=9.0)
    assert not facts.is_reserving and facts.num_missing == 0
    ledger.trainer.complete_step(incarnation=1, step=0)
    version = ledger.trainer.alloc_version(incarnation=1, step=1)
    beat(ledger, "a", capacity=4, version=version, now_s=9.0)
    (third,) = ledger.dispatcher.grant(now_s=9.0)["a"]
    facts = watch.facts(now_s=10.0)
    assert not facts.is_reserving, "no group is complete"
    assert [(lease.ticket_id, lease.is_due) for lease in facts.oldest_leases] == [
        (slow.ticket_id, True),
        (third.ticket_id, False),
    ]
    for index in third.sample_indices:
        deliver(ledger, "a", done(third, index, [version]))
    facts = watch.facts(now_s=41.0)
    assert facts.is_reserving and (facts.num_missing, facts.num_ready, facts.num_groups) == (1, 1, 1)
    assert awaited(facts) == f"ticket {slow.ticket_id} at a runs for 41 s"
    assert facts.contradicts_close == "objective.name=rebel needs whole groups"
    for index in slow.sample_indices:
        deliver(ledger, "a", done(slow, index, [0]))
    facts = watch.facts(now_s=42.0)
    assert not facts.is_reserving and facts.oldest_leases == () and awaited(facts) == ""


def test_parts_and_late_samples_of_a_closed_group() -> None:
    # With a close_after of 1, a group is closed as it begins.
    ledger = new_ledger(max_staleness=4, groups_per_step=2, group_size=4, overdue="close", close_after=1)
    watch = watch_of(ledger, buffer={"overdue": "close"})
    add_server(ledger, "a", capacity=4)
    (lease,) = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert ledger.state.tickets.count(Purpose.TRAIN, State.CLOSED) == 1
    for index in lease.sample_indices[:3]:
        deliver(ledger, "a", done(lease, index, [0]))
    facts = watch.facts(now_s=5.0)
    assert (facts.num_parts, facts.steps_complete) == (3, 3 / 8)
    assert str(facts.oldest_leases[0]) == f"late samples of ticket {lease.ticket_id} at a"
    assert (facts.overdue, facts.close_after, facts.is_reserving) == ("close", 4, False)
