"""Closed groups: what is recorded when, what each token's age allows, and what becomes of late samples."""

from __future__ import annotations

import math
from typing import Any

import pytest

from areal_like.errors import RefusedError
from areal_like.failures import FailureKind
from areal_like.wire.messages.consumer import Group
from areal_like.wire.messages.producer import Lease, Purpose
from buffer.ledger.ledger import Ledger
from buffer.tickets import State
from tests.support.ledger_simulation import add_server, beat, deliver, done, failed, new_ledger

SIZE = 2


def closing_ledger(**settings: Any) -> Ledger:
    """Groups of two, one group a step, closed two steps after their begin."""
    small = {
        "overdue": "close",
        "close_after": 2,
        "max_staleness": 2,
        "groups_per_step": 1,
        "group_size": SIZE,
        "num_steps": 12,
    }
    return new_ledger(**(small | settings))


class Job:
    """A server with slots for several groups, and a trainer that trains each step as soon as it is full."""

    def __init__(self, ledger: Ledger, *, capacity: int = 3 * SIZE) -> None:
        self.ledger = ledger
        self.capacity = capacity
        self.version = 0
        self.groups: list[Group] = []
        self.leases: dict[int, Lease] = {}
        """Leases by ticket, in the order in which the groups began."""
        ledger.state.admission._limit = math.inf  # as if the trainer had waited for a while
        add_server(ledger, "a", capacity=capacity)
        self.grant()

    def grant(self) -> list[Lease]:
        """New leases of the server, which are also in `leases`."""
        beat(self.ledger, "a", capacity=self.capacity, version=self.version)
        leases = self.ledger.dispatcher.grant(now_s=0.0).get("a", [])
        self.leases |= {lease.ticket_id: lease for lease in leases}
        return leases

    def deliver(
        self, ticket: int, index: int, versions: list[int] | None = None, *, reward: float = 0.0
    ) -> None:
        """One sample; its tokens are of these versions, or of the newest one."""
        sample = done(self.leases[ticket], index, versions or [self.version], reward=reward)
        assert not deliver(self.ledger, "a", sample).refusal

    def train(self) -> Group:
        """Trains the next step; the server gets its weights, and new leases."""
        trainer, step = self.ledger.trainer, self.ledger.state.steps.current
        group = trainer.fetch(step=step, position=0)
        assert group is not None, "the step is not full"
        trainer.complete_step(incarnation=1, step=step)
        self.version = trainer.alloc_version(incarnation=1, step=step + 1)
        self.groups.append(group)
        self.grant()
        return group

    @property
    def begun(self) -> list[int]:
        """Groups in the order in which they began."""
        return list(self.leases)

    def complete_another(self) -> int:
        """Delivers both samples of the youngest group."""
        youngest = self.begun[-1]
        for index in range(SIZE):
            self.deliver(youngest, index)
        return youngest

    def state(self, ticket: int) -> State:
        return self.ledger.state.tickets.live[ticket].state

    def live_states(self) -> list[tuple[int, State]]:
        """(ticket, state) of all live train tickets."""
        live = self.ledger.state.tickets.of_purpose(Purpose.TRAIN)
        return [(ticket.ticket_id, ticket.state) for ticket in live]


def samples_of(group: Group) -> list[tuple[int, int]]:
    """(ticket, index) of each record."""
    return [(record.ticket_id, record.sample_index) for record in group.records]


def test_samples_of_an_overdue_group_become_parts() -> None:
    job = Job(closing_ledger())
    first = job.begun[0]
    job.deliver(first, 0, reward=1.0)
    assert job.state(first) is State.LEASED
    job.complete_another()
    job.train()  # step 0; the next one is 0 + close_after - 1
    assert job.state(first) is State.CLOSED and job.ledger.state.parts.num_loose == 1
    assert job.ledger.trainer.fetch(step=1, position=0) is None, "one part does not fill a position"
    job.deliver(first, 1, [0, 1], reward=0.5)
    position = job.train()
    assert samples_of(position) == [(first, 0), (first, 1)]
    assert position.ticket_id not in job.leases and position.prompt_index == -1
    (closed,) = position.closed
    assert (closed.ticket_id, closed.begin_step) == (first, 0)
    assert [(one.sample_index, one.reward, one.num_sampled) for one in closed.early] == [(0, 1.0, 1)]
    assert (position.versions, position.steps, position.max_staleness) == ([0, 1], [0, 1], 2)
    assert first not in job.ledger.state.tickets.live, "the group has ended"
    assert job.ledger.state.tickets.count(Purpose.TRAIN, State.SPLIT) == 1


def test_late_samples_of_several_groups_share_a_position() -> None:
    job = Job(closing_ledger(), capacity=4 * SIZE)
    one, two = job.begun[:2]
    job.deliver(one, 0)
    job.deliver(two, 0)
    job.complete_another()
    assert job.train().ticket_id not in (one, two)
    assert samples_of(job.train()) == [(one, 0), (two, 0)], "the early ones"
    job.deliver(two, 1)
    job.deliver(one, 1)
    late = job.train()
    assert samples_of(late) == [(one, 1), (two, 1)], "the late ones, in the order of their groups"
    assert [[member.sample_index for member in closed.early] for closed in late.closed] == [[0], [0]]


def test_a_group_complete_in_time_is_recorded_whole() -> None:
    job = Job(closing_ledger(groups_per_step=2, max_staleness=3, close_after=3))
    for ticket in job.begun[:3]:
        for index in range(SIZE):
            job.deliver(ticket, index)
    trainer = job.ledger.trainer
    served = [trainer.fetch(step=step, position=position) for step, position in ((0, 0), (0, 1), (1, 0))]
    assert [group and group.ticket_id for group in served] == job.begun[:3]
    assert all(group and not group.closed and group.begin_step == 0 for group in served)


def test_a_sample_beyond_the_bound_is_given_up() -> None:
    job = Job(closing_ledger(max_staleness=2), capacity=4 * SIZE)
    first = job.begun[0]
    for _ in range(3):
        job.complete_another()
        job.train()
    assert job.state(first) is State.CLOSED and job.ledger.state.scheduler.num_full_steps == 3
    job.deliver(first, 0, [0, 0])
    job.deliver(first, 1, [0, 0])  # the bound is 2, and step 3 is being recorded
    assert first not in job.ledger.state.tickets.live
    assert job.ledger.state.tickets.count(Purpose.TRAIN, State.DROPPED) == 1
    assert job.ledger.state.counters["num_parts_dropped"] == 2


def test_tokens_beyond_the_bound_count_as_masked() -> None:
    job = Job(closing_ledger(max_staleness=2), capacity=4 * SIZE)
    first = job.begun[0]
    for _ in range(3):
        job.complete_another()
        job.train()
    job.deliver(first, 0, [0, 0, 1, 3])
    job.deliver(first, 1, [2])
    position = job.train()
    assert (position.step, position.max_staleness, position.versions) == (3, 2, [0, 1, 2, 3])
    assert job.ledger.state.counters["tokens_masked"] == 2
    assert job.ledger.state.counters.summary()["max_trained_lag"] == 2


def test_a_failed_late_sample_costs_no_other() -> None:
    job = Job(closing_ledger(max_sample_retries=0))
    first = job.begun[0]
    job.deliver(first, 0)
    job.complete_another()
    job.train()
    job.ledger.intake.sample_failed("a", failed(job.leases[first], 1, kind=FailureKind.REWARD))
    assert job.state(first) is State.CLOSED, "its early sample still waits for a second part"
    assert job.ledger.state.prompts.order.returned == [], "the prompt is not issued again"
    job.complete_another()
    job.train()
    other = next(ticket for ticket, state in job.live_states() if state is State.CLOSED and ticket != first)
    job.deliver(other, 0)
    assert samples_of(job.train()) == [(first, 0), (other, 0)]
    assert first not in job.ledger.state.tickets.live


def test_a_late_sample_survives_its_server() -> None:
    job = Job(closing_ledger())
    first = job.begun[0]
    job.deliver(first, 0)
    job.complete_another()
    job.train()
    job.ledger.dispatcher.remove_server("a")
    assert job.state(first) is State.CLOSED
    add_server(job.ledger, "a", capacity=job.capacity, version=job.version, incarnation=2)
    lease = job.grant()[0]
    assert (lease.ticket_id, lease.sample_indices) == (first, [1]), "closed groups come first"


def test_work_in_progress_follows_the_trainer() -> None:
    job = Job(closing_ledger(groups_per_step=4, num_steps=100, max_staleness=4, close_after=4), capacity=1000)
    admission, step = job.ledger.state.admission, 4 * SIZE
    assert admission.work_limit == 5 * step == len(job.leases) * SIZE, "at most close_after + 1 steps"
    admission._limit = 2.0 * step
    assert admission.work_limit == 5 * step, "the trainer waits"
    for ticket in job.begun[:4]:
        for index in range(SIZE):
            job.deliver(ticket, index)
    assert admission.work_limit == 2 * step, "it has a full step"
    for _ in range(2):  # a quarter of a step is missing
        admission.step_done()
    assert admission.work_limit == pytest.approx((2 + 2 * 0.25 / 4) * step)
    for ticket in job.begun[4:8]:
        for index in range(SIZE):
            job.deliver(ticket, index)
    for _ in range(20):  # two steps' worth is more than enough
        admission.step_done()
    assert admission.work_limit == step, "but never less than a step"
    job.capacity = SIZE
    job.grant()
    assert admission.work_limit == step


def test_parts_that_fill_no_position_leave_room_for_a_group() -> None:
    job = Job(closing_ledger(), capacity=SIZE)
    first = job.begun[0]
    job.deliver(first, 0)
    job.capacity = 2 * SIZE
    job.grant()
    job.complete_another()
    job.train()
    job.capacity = SIZE
    job.ledger.intake.sample_failed("a", failed(job.leases[first], 1, kind=FailureKind.PROMPT))
    assert job.ledger.state.parts.num_loose == 1 and job.ledger.state.parts.num_late == 0
    job.ledger.state.admission._limit = 0.0
    for _ in range(3):
        job.grant()
        job.complete_another()
        job.train()


def test_the_last_step_cancels_what_is_left() -> None:
    job = Job(closing_ledger(num_steps=2), capacity=4 * SIZE)
    assert len(job.leases) == 2, "no more than the run needs"
    first = job.begun[0]
    job.deliver(first, 0)
    job.complete_another()
    job.train()
    job.deliver(first, 1)
    job.train()
    assert {state for _, state in job.live_states()} == {State.BATCHED}
    job.ledger.trainer.commit(incarnation=1, step=1, oldest_kept_step=2)
    assert job.ledger.state.store.num_bytes == 0


def test_the_bound_may_be_lowered_to_one_step() -> None:
    job = Job(closing_ledger())
    with pytest.raises(RefusedError, match=r"want 1\.\.2"):
        job.ledger.operator.change_settings({"max_staleness": "0"}, unix_s=0.0)
    job.ledger.operator.change_settings({"max_staleness": "1"}, unix_s=0.0)
    job.complete_another()
    assert job.train().max_staleness == 1
