"""The step scheduler by itself; `test_ledger_stateful.py` tests its decisions as part of the ledger."""

from __future__ import annotations

from buffer.scheduling.step_scheduler import StepScheduler

FAR = 1 << 40
"""A deadline that no run reaches."""
NUM_RUNNING = 10


def test_tickets_that_have_ended_take_no_memory() -> None:
    scheduler = StepScheduler(groups_per_step=4, num_steps=FAR, wait_for_overdue=True)
    most = 0
    for ticket_id in range(10_000):
        if ticket_id >= NUM_RUNNING:
            scheduler.remove(ticket_id - NUM_RUNNING)
        scheduler.track(ticket_id, earliest_deadline=FAR, latest_deadline=FAR - ticket_id)
        most = max(most, len(scheduler._by_latest_deadline))
    assert most < 100
    scheduler.track(9_995, earliest_deadline=FAR, latest_deadline=None)
    for last, next_one in ((9_999, 9_998), (9_998, 9_997), (9_997, 9_996), (9_996, 9_994)):
        assert scheduler.next_overdue(FAR - last) is None
        assert scheduler.next_overdue(FAR - last + 1) == last
        scheduler.remove(last)
        assert scheduler.next_overdue(FAR) == next_one
