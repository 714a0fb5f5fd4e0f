"""The scheduler under random orders of calls (hypothesis); its invariants are checked after each call."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from areal_like.trajectory import FinishReason
from rollout_server.engine.scheduler import Finish, SamplingParams, Scheduler, Sequence, Status

NUM_ROWS = 4
BUDGET = 10
ABORT = Finish(reason=FinishReason.ABORT)


def sequence(seq_id: str, num_tokens: int = 3) -> Sequence:
    return Sequence(seq_id=seq_id, prompt=(7,) * num_tokens, params=SamplingParams(max_new_tokens=5))


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(num_rows=NUM_ROWS, max_prefill_tokens=BUDGET)
        self.array: list[str | None] = [None] * NUM_ROWS
        """Row -> id of the sequence whose KV it holds, changed only by the moves and rows that the scheduler
        returns."""
        self.open: dict[str, Sequence] = {}
        self.num_submitted = self.num_finished = 0

    @rule(num_tokens=st.integers(1, 14))
    def submit(self, num_tokens: int) -> None:
        new = sequence(str(self.num_submitted), num_tokens)
        self.num_submitted += 1
        self.scheduler.submit(new)
        self.open[new.seq_id] = new

    @rule(cached=st.booleans())
    def admit(self, cached: bool) -> None:
        queue = list(self.scheduler.waiting)
        admitted, moves = self.scheduler.admit(
            num_to_compute=lambda sequence: 0 if cached else len(sequence.context)
        )
        assert admitted == queue[: len(admitted)], "first come, first served"
        for move in moves:
            assert self.array[move.source] is not None
            self.array[move.target], self.array[move.source] = self.array[move.source], None
        for new in admitted:
            self.array[new.row] = new.seq_id
        assert None not in self.scheduler.rows, "rows are dense after admission"
        distinct = {new.context for new in admitted}
        assert cached or len(distinct) <= 1 or sum(map(len, distinct)) <= BUDGET
        if queue and self.scheduler.num_free:
            assert len(admitted) == len(queue) or not cached, "rows were left unused"
        assert admitted or not queue or not self.scheduler.num_free, (
            "the first sequence may exceed the budget"
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        chosen = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        self.scheduler.finish(chosen, ABORT)
        self.num_finished += 1
        assert chosen.status is Status.FINISHED and chosen.finish is ABORT

    @rule()
    def preempt_all(self) -> None:
        running = [s for s in self.scheduler.rows if s is not None]
        queue = list(self.scheduler.waiting)
        self.scheduler.preempt_all()
        assert list(self.scheduler.waiting) == running + queue

    @invariant()
    def conservation(self) -> None:
        self.scheduler.check()
        running, waiting = self.scheduler.num_running, len(self.scheduler.waiting)
        assert self.num_submitted == running + waiting + self.num_finished
        assert self.scheduler.num_free + running == NUM_ROWS
        for held in self.scheduler.rows:
            assert held is None or self.array[held.row] == held.seq_id, (
                "the row holds the KV of another sequence"
            )


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


def test_holes_are_filled_before_rows_are_moved() -> None:
    scheduler = Scheduler(num_rows=4, max_prefill_tokens=100)
    sequences = [sequence(str(i)) for i in range(6)]
    for one in sequences:
        scheduler.submit(one)
    scheduler.admit(num_to_compute=lambda sequence: len(sequence.context))
    scheduler.finish(sequences[1], ABORT)
    admitted, moves = scheduler.admit(num_to_compute=lambda sequence: len(sequence.context))
    assert [(s.seq_id, s.row) for s in admitted] == [("4", 1)] and moves == []
    for i in (0, 2, 5):
        scheduler.finish(sequences[i], ABORT)
    admitted, moves = scheduler.admit(num_to_compute=lambda sequence: len(sequence.context))
    assert admitted == [] and [(m.source, m.target) for m in moves] == [(3, 0)]
    assert [s.seq_id for s in scheduler.rows if s] == ["3", "4"]
