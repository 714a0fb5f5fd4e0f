"""Trainers that resume at another step, tickets dropped by an operator, and changed settings."""

from __future__ import annotations

import dataclasses

import pytest

from areal_like.errors import RefusedError, StaleIncarnationError
from areal_like.wire.messages.producer import Lease
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.tickets import Drop, State, Verdict
from tests.support.ledger_simulation import add_server, beat, deliver, done, new_ledger
from tests.support.row_store import RowStore


def durable_ledger(**settings: object) -> Ledger:
    return new_ledger(
        store=RowStore(),
        durable=True,
        **({"groups_per_step": 1, "max_staleness": 2, "num_steps": 8} | settings),
    )


def train(ledger: Ledger, *, incarnation: int = 1) -> int:
    """Fetches and completes the current step; returns the version of the next weights."""
    step = ledger.state.steps.current
    for position in range(ledger.settings.groups_per_step):
        assert ledger.trainer.fetch(step=step, position=position) is not None
    ledger.trainer.complete_step(incarnation=incarnation, step=step)
    return ledger.trainer.alloc_version(incarnation=incarnation, step=step + 1)


def generate(ledger: Ledger, *, version: int) -> list[Lease]:
    """A server with these weights generates every lease that it gets."""
    add_server(ledger, "a", capacity=100, version=version)
    leases = ledger.dispatcher.grant(now_s=0.0).get("a", [])
    for lease in leases:
        for index in lease.sample_indices:
            assert (
                deliver(ledger, "a", done(lease, index, [version], reward=float(index))) is Verdict.ACCEPTED
            )
    return leases


def trained(num_steps: int, **settings: object) -> tuple[Ledger, list[int]]:
    """A ledger with `num_steps` complete steps, and the ids of the tickets trained on."""
    ledger, version = durable_ledger(**settings), 0
    for _ in range(num_steps):
        generate(ledger, version=version)
        version = train(ledger)
    generate(ledger, version=version)
    return ledger, [ticket.ticket_id for ticket in ledger.state.steps.tickets_of(*range(num_steps))]


def test_an_older_checkpoint_repeats_committed_steps() -> None:
    ledger, tickets = trained(4)
    ledger.trainer.commit(incarnation=1, step=3, oldest_kept_step=2)
    assert ledger.state.tickets.num_by_state()[State.TRAINED] == 4
    with pytest.raises(RefusedError, match=r"from step 2 or later, not 1.*ledger/"):
        ledger.trainer.start_training(incarnation=2, step=1, stream={})
    ledger.trainer.start_training(incarnation=2, step=2, stream={}, unix_s=7.0)
    groups = [ledger.trainer.fetch(step=step, position=0) for step in (2, 3)]
    assert [group and group.ticket_id for group in groups] == tickets[2:]
    assert ledger.state.tickets.num_by_state()[State.TRAINED] == 2 and ledger.state.steps.committed == 1
    assert isinstance(ledger.state.store, RowStore)
    (row,) = ledger.state.store.copy().recover().rollbacks
    assert (row.trainer_incarnation, row.from_step, row.to_step, row.num_tickets, row.num_tokens) == (
        2,
        4,
        2,
        2,
        4,
    )
    counted = ledger.state.counters.summary()["samples_trained"]
    train(ledger, incarnation=2)
    assert ledger.state.counters.summary()["samples_trained"] == counted, "a repeated step is counted once"


def test_unrecorded_samples_of_abandoned_weights_are_dropped() -> None:
    ledger, _ = trained(2, groups_per_step=2)
    late = ledger.state.versions.newest
    recorded = [ticket.ticket_id for ticket in ledger.state.steps.tickets_from(2)]
    add_server(ledger, "b", capacity=4, version=1)
    beat(ledger, "a", capacity=200, version=late)
    (running,) = ledger.dispatcher.grant(now_s=0.0).get("b", []) or (None,)
    ready = [ticket for ticket in ledger.state.tickets.live.values() if ticket.state is State.READY]
    issued = ledger.state.tickets.num_issued
    ledger.trainer.start_training(incarnation=2, step=1, stream={})
    assert ledger.state.drops[Drop.ABANDONED] == len(ready) > 0
    assert [ticket.ticket_id for ticket in ledger.state.steps.tickets_from(2)][: len(recorded)] == recorded
    assert ledger.state.prompts.order.returned == [ticket.prompt_index for ticket in ready]
    if running is not None:
        assert deliver(ledger, "b", done(running, 0, [1, late])) is Verdict.ABANDONED
        assert deliver(ledger, "b", done(running, 1, [1])) is Verdict.ACCEPTED
        assert ledger.state.tickets.live[running.ticket_id].unleased == {0}, (
            "leased again, and not counted as a failure"
        )
        assert ledger.state.counters.summary()["samples_failed"] == 0
    beat(ledger, "a", capacity=200, version=late)
    assert "a" not in ledger.dispatcher.grant(now_s=0.0), "a server with abandoned weights got a lease"
    version = ledger.trainer.alloc_version(incarnation=2, step=1)
    assert version == late + 1 and ledger.state.tickets.num_issued == issued


def test_poison_refills_the_position_and_fences_the_trainer() -> None:
    ledger, _ = trained(1, groups_per_step=2)
    bad, other = ledger.state.steps.tickets_of(1)
    with pytest.raises(RefusedError, match="was trained on in step 0"):
        ledger.operator.poison([bad.ticket_id, ledger.state.steps.tickets_of(0)[0].ticket_id])
    assert bad.state is State.BATCHED, "a refused list drops no ticket"
    ledger.operator.poison([bad.ticket_id])
    assert (
        ledger.state.drops == {Drop.POISON: 1} and bad.prompt_index not in ledger.state.prompts.order.returned
    )
    filled = ledger.trainer.fetch(step=1, position=0)
    assert filled is not None and filled.ticket_id not in (bad.ticket_id, other.ticket_id), (
        "a ready group takes its position"
    )
    assert ledger.trainer.fetch(step=1, position=1).ticket_id == other.ticket_id  # type: ignore[union-attr]
    with pytest.raises(StaleIncarnationError):
        ledger.trainer.complete_step(incarnation=1, step=1)
    with pytest.raises(RefusedError, match="ended, or was never issued"):
        ledger.operator.poison([bad.ticket_id])


def test_a_hole_in_a_repeated_step_is_filled_before_later_steps() -> None:
    ledger, _ = trained(5)
    ledger.trainer.commit(incarnation=1, step=0)
    ledger.trainer.start_training(incarnation=2, step=1, stream={})
    ledger.operator.poison([ledger.state.steps.tickets_of(1)[0].ticket_id])
    ledger.trainer.start_training(incarnation=3, step=1, stream={})
    assert ledger.state.scheduler.step > 4 and ledger.trainer.fetch(step=1, position=0) is None
    (lease,) = generate(ledger, version=ledger.trainer.alloc_version(incarnation=3, step=1))
    assert ledger.trainer.fetch(step=1, position=0).ticket_id == lease.ticket_id  # type: ignore[union-attr]


def test_a_lost_ledger_never_reuses_versions_of_a_checkpoint() -> None:
    ledger, _ = trained(4)
    assert isinstance(ledger.state.store, RowStore)
    before_power_cut = ledger.state.store.copy()
    lost = [ledger.trainer.alloc_version(incarnation=1, step=4) for _ in range(3)]
    checkpoint = ledger.trainer.stream_state(step=3)
    other = recover(ledger.settings, before_power_cut, now_s=0.0)
    other.trainer.start_training(incarnation=2, step=4, stream=checkpoint)
    assert other.trainer.alloc_version(incarnation=2, step=4) == lost[-1] + 1


def test_a_step_that_crashes_three_trainers_is_refused() -> None:
    ledger, _ = trained(1)
    (faulty,) = ledger.state.steps.tickets_of(1)
    for incarnation in (1, 2, 3):
        ledger.trainer.start_training(incarnation=incarnation, step=0, stream={})
        if incarnation > 1:
            train(ledger, incarnation=incarnation)
        ledger.trainer.fetch(step=1, position=0)
    with pytest.raises(
        RefusedError,
        match=rf"3 trainers died in step 1, whose tickets are {faulty.ticket_id}:.*areal-like drop",
    ):
        ledger.trainer.start_training(incarnation=4, step=0, stream={})
    ledger.operator.poison([faulty.ticket_id])
    ledger.trainer.start_training(incarnation=5, step=0, stream={})


def test_a_ticket_named_twice_resets_no_other_step() -> None:
    ledger, _ = trained(1)
    for incarnation in (2, 3):
        ledger.trainer.start_training(incarnation=incarnation, step=1, stream={})
        ledger.trainer.fetch(step=1, position=0)
    (later,) = ledger.state.steps.tickets_of(2)
    ledger.operator.poison([later.ticket_id, later.ticket_id])
    assert ledger.state.steps.attempts == {1: 2}


def test_a_restart_by_hand_allows_one_more_attempt() -> None:
    ledger, _ = trained(1)
    for incarnation in (2, 3, 4):
        ledger.trainer.start_training(incarnation=incarnation, step=1, stream={})
        ledger.trainer.fetch(step=1, position=0)
    ledger.trainer.close("the job has failed")
    ledger.trainer.start_training(incarnation=5, step=1, stream={})
    ledger.trainer.fetch(step=1, position=0)
    with pytest.raises(RefusedError, match="3 trainers"):
        ledger.trainer.start_training(incarnation=6, step=1, stream={})
    ledger.trainer.close("drain")
    assert ledger.state.steps.attempts == {1: 2}


@pytest.mark.parametrize("num_starts", [1, 2], ids=["one start", "two starts before the trainer"])
@pytest.mark.parametrize(
    ("change", "groups_per_step"),
    [
        ({"groups_per_step": 2}, 1),
        ({"groups_per_step": 1}, 2),
        ({"staleness_cap": 0}, 1),
        ({"group_size": 3}, 1),
    ],
)
def test_changed_settings_restart_the_stream_at_the_checkpoint(
    change: dict[str, int], groups_per_step: int, num_starts: int
) -> None:
    ledger, _ = trained(3, groups_per_step=groups_per_step)
    pending = ledger.trainer.stream_state(step=1)["pending"]
    ledger.trainer.commit(incarnation=1, step=1)
    ledger.trainer.close("drain")
    other = ledger
    for _ in range(num_starts):
        assert isinstance(other.state.store, RowStore)
        other = recover(dataclasses.replace(ledger.settings, **change), other.state.store.copy(), now_s=0.0)
    other.state.prompts.set_num_train_prompts(1000)
    assert other.state.closed_reason and generate(other, version=0) == []
    other.trainer.start_training(incarnation=2, step=2, stream={})
    assert other.state.tickets.num_by_state()[State.TRAINED] == 2 * groups_per_step
    assert isinstance(pending, list) and other.state.drops.total() == len(pending)
    assert set(other.state.drops) == {Drop.CANCELLED, Drop.ABANDONED}
    assert sorted(other.state.prompts.order.returned) == sorted(pending)  # type: ignore[type-var]
    version = other.trainer.alloc_version(incarnation=2, step=2)
    generate(other, version=version)
    assert other.trainer.fetch(step=2, position=0) is not None


def test_a_ledger_behind_the_checkpoint_continues_from_it() -> None:
    ledger, _ = trained(2)
    num_live = len(ledger.state.tickets.live)
    ledger.trainer.start_training(
        incarnation=2, step=6, stream={"cursor": 40, "pending": [7], "next_version": 30}
    )
    assert (ledger.state.steps.current, ledger.state.steps.committed, ledger.state.scheduler.step) == (
        6,
        5,
        6,
    )
    assert ledger.state.prompts.order.next().index == 7 and ledger.state.prompts.order.cursor == 40
    assert ledger.trainer.alloc_version(incarnation=2, step=6) == 30 and num_live > 0
    ledger.state.tickets.check_conservation()
