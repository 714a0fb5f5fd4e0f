"""The rules of the ledger one by one; test_ledger_stateful.py checks arbitrary orders of events."""

from __future__ import annotations

import dataclasses

import pytest

from areal_like.config import from_mapping
from areal_like.data.permutation import permuted
from areal_like.errors import ConfigError, RefusedError, StaleIncarnationError
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone, ServerState
from areal_like.wire.records import Record
from buffer.ledger.ledger import Ledger
from buffer.prompts.order import Prompt, PromptOrder, sampling_seed
from buffer.settings import LedgerSettings
from buffer.tickets import Drop, State, Verdict
from tests.support.ledger_simulation import (
    add_server,
    beat,
    deliver,
    done,
    empty_ledger,
    failed,
    heartbeat,
    ledger_settings,
    new_ledger,
    trajectory,
)


def leases_of(ledger: Ledger, name: str = "a", *, now_s: float = 0.0) -> list[Lease]:
    return ledger.dispatcher.grant(now_s=now_s).get(name, [])


def finish(
    ledger: Ledger,
    lease: Lease,
    *,
    version: int = 0,
    rewards: tuple[float, ...] = (0.0, 1.0),
    name: str = "a",
) -> None:
    for index in lease.sample_indices:
        assert deliver(ledger, name, done(lease, index, [version], reward=rewards[index])) is Verdict.ACCEPTED


def train_step(ledger: Ledger) -> int:
    """Completes the trainer's step; returns the version of the new weights."""
    step = ledger.state.steps.current
    ledger.trainer.complete_step(incarnation=1, step=step)
    return ledger.trainer.alloc_version(incarnation=1, step=step + 1)


# --- admission and credit ---


def test_admission_stops_at_the_staleness_budget() -> None:
    ledger = new_ledger(max_staleness=1, groups_per_step=2)
    add_server(ledger, "a", capacity=100)
    leases = leases_of(ledger)
    assert len(leases) == (1 + 0 + 1) * 2
    assert leases_of(ledger) == []
    for lease in leases[:2]:
        finish(ledger, lease)
    assert leases_of(ledger) == [], "recorded groups count too"
    version = train_step(ledger)
    assert leases_of(ledger) == [], (
        "the server has not received the new weights: its tokens would be a step too old"
    )
    beat(ledger, "a", capacity=100, version=version)
    assert len(leases_of(ledger)) == 2


def test_no_more_tickets_than_the_run_has_positions() -> None:
    ledger = new_ledger(max_staleness=100, num_steps=3)
    add_server(ledger, "a", capacity=1000)
    assert len(leases_of(ledger)) == 3 * 2


def test_a_ticket_is_leased_whole_and_only_within_credit() -> None:
    ledger = new_ledger(max_staleness=4)
    add_server(ledger, "a", capacity=5)
    leases = leases_of(ledger)
    assert [lease.sample_indices for lease in leases] == [[0, 1], [0, 1]], (
        "the fifth slot is not enough for a group"
    )
    deliver(ledger, "a", done(leases[0], 0, [0]))
    assert len(leases_of(ledger)) == 1


def test_credit_does_not_drift_when_a_heartbeat_crosses_a_grant() -> None:
    ledger = new_ledger(max_staleness=4)
    add_server(ledger, "a", capacity=4)
    assert len(leases_of(ledger)) == 2
    written_before = heartbeat(free=4)
    ledger.dispatcher.heartbeat("a", written_before, now_s=0.1)
    assert leases_of(ledger) == []


def test_negative_credit_has_to_be_worked_off() -> None:
    """Six samples are held where four may be: a group is granted only when two more have ended than fit."""
    ledger = new_ledger(max_staleness=4)
    add_server(ledger, "a", capacity=6)
    leases = leases_of(ledger)
    assert len(leases) == 3
    overfull = heartbeat(free=-2, holding=6, leases=[lease.lease_id for lease in leases])
    ledger.dispatcher.heartbeat("a", overfull, now_s=0.1)
    ledger.intake.samples_done("a", [done(leases[0], index, [0]) for index in (0, 1)])
    assert leases_of(ledger) == [] and ledger.servers["a"].free_samples == 0
    ledger.intake.samples_done("a", [done(leases[1], index, [0]) for index in (0, 1)])
    assert len(leases_of(ledger)) == 1


def test_an_idle_server_smaller_than_a_group_takes_one() -> None:
    ledger = new_ledger(group_size=8)
    add_server(ledger, "a", capacity=3)
    assert [len(lease.sample_indices) for lease in leases_of(ledger)] == [8]


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.DRAINING, ServerState.QUARANTINED])
def test_only_a_serving_server_gets_leases(state: ServerState) -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=4)
    beat(ledger, "a", capacity=4, state=state)
    assert leases_of(ledger) == []


def test_a_small_budget_is_shared_among_servers() -> None:
    ledger = new_ledger(max_staleness=0, groups_per_step=4)
    for name in "ab":
        add_server(ledger, name, capacity=100)
    assert {name: len(leases) for name, leases in ledger.dispatcher.grant(now_s=0.0).items()} == {
        "a": 2,
        "b": 2,
    }


def test_a_server_of_unknown_version_gets_nothing() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=4, version=7)
    assert leases_of(ledger) == []


def test_no_ticket_until_trainer_started_and_prompts_known() -> None:
    ledger = empty_ledger(ledger_settings(num_steps=2))
    add_server(ledger, "a", capacity=8)
    assert leases_of(ledger) == []
    ledger.trainer.start_training(incarnation=1, step=0, stream={})
    assert leases_of(ledger) == []
    ledger.state.prompts.set_num_train_prompts(10)
    assert len(leases_of(ledger)) == 4
    with pytest.raises(RefusedError, match="num_train_prompts"):
        ledger.state.prompts.set_num_train_prompts(11)


# --- samples ---


def test_duplicates_are_acknowledged_superseded_ones_refused() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    assert deliver(ledger, "a", done(lease, 0, [0])) is Verdict.ACCEPTED
    assert deliver(ledger, "a", done(lease, 0, [0])) is Verdict.DUPLICATE
    ledger.dispatcher.remove_server("a")
    add_server(ledger, "b", capacity=2)
    (again,) = leases_of(ledger, "b")
    assert (again.ticket_id, again.sample_indices) == (lease.ticket_id, [1]), (
        "only the missing sample is made again"
    )
    assert again.seed == lease.seed
    assert deliver(ledger, "a", done(lease, 1, [0])) is Verdict.SUPERSEDED
    assert deliver(ledger, "b", done(again, 1, [0])) is Verdict.ACCEPTED
    counters = ledger.state.counters.summary()
    assert (counters["samples_duplicate"], counters["refusals_superseded"], counters["leases_lost"]) == (
        1,
        1,
        1,
    )
    assert counters["tokens_generated"] == 3, "two accepted, one refused; a duplicate was generated once"


def test_unusable_samples_are_refused_and_leased_again() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    assert deliver(ledger, "a", done(lease, 0, [3])) is Verdict.UNKNOWN_VERSION
    aborted = dataclasses.replace(
        done(lease, 1, [0]), record=Record.of(lease.ticket_id, 1, trajectory([0], finish=FinishReason.ABORT))
    )
    assert deliver(ledger, "a", aborted) is Verdict.INVALID
    (again,) = leases_of(ledger)
    assert again.sample_indices == [0, 1]
    assert again.seed != lease.seed, "the text sampled with this seed may have caused the failure"
    unknown = dataclasses.replace(done(again, 0, [0]), record=Record.of(99, 0, trajectory([0])))
    assert deliver(ledger, "a", unknown) is Verdict.UNKNOWN_TICKET


def test_lag_counts_the_oldest_token_of_the_group() -> None:
    ledger = new_ledger(max_staleness=2, groups_per_step=1, num_steps=3)
    add_server(ledger, "a", capacity=4)
    first, second = leases_of(ledger)
    finish(ledger, first)
    version = train_step(ledger)
    deliver(ledger, "a", done(second, 0, [0, version, version]))
    deliver(ledger, "a", done(second, 1, [version]))
    group = ledger.trainer.fetch(step=1, position=0)
    assert group is not None and group.version_steps == [0, 1]
    train_step(ledger)
    counters = ledger.state.counters.summary()
    assert counters["max_trained_lag"] == 1
    assert counters["mean_trained_lag"] == 1 / 4
    assert counters["mean_trained_token_lag"] == 1 / 6


# --- leases ---


def test_a_heartbeat_renews_the_leases_it_names_others_expire() -> None:
    ledger = new_ledger(max_staleness=4, lease_timeout_s=10.0)
    add_server(ledger, "a", capacity=4)
    kept, lost = leases_of(ledger)
    for now_s in (6.0, 12.0):
        naming_one = heartbeat(holding=4, leases=[kept.lease_id])
        ledger.dispatcher.heartbeat("a", naming_one, now_s=now_s)
        assert ledger.dispatcher.expire(now_s=now_s) == []
    assert set(ledger.state.leases.live) == {kept.lease_id}
    assert ledger.state.leases.take_aborts() == {"a": [lost.lease_id]}
    (again,) = leases_of(ledger, now_s=12.0)
    assert again.ticket_id == lost.ticket_id
    naming_lost = heartbeat(holding=4, leases=[lost.lease_id])
    ledger.dispatcher.heartbeat("a", naming_lost, now_s=13.0)
    assert ledger.state.leases.take_aborts() == {"a": [lost.lease_id]}, (
        "aborted again while the server still names it"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_lease_expires_by_its_last_renewal(order: int) -> None:
    """Also if heartbeats have named all leases before, in the order of their grants or in another one."""
    ledger = new_ledger(max_staleness=4, lease_timeout_s=10.0)
    add_server(ledger, "a", capacity=4)
    kept, lost = leases_of(ledger)
    all_ids = [kept.lease_id, lost.lease_id][::order]
    for now_s, named in ((4.0, all_ids), (8.0, all_ids[:1]), (12.0, all_ids[:1])):
        ledger.dispatcher.heartbeat("a", heartbeat(holding=4, leases=named), now_s=now_s)
    assert ledger.dispatcher.expire(now_s=13.9) == [] and set(ledger.state.leases.live) == set(all_ids)
    assert ledger.dispatcher.expire(now_s=14.0) == [] and set(ledger.state.leases.live) == {all_ids[0]}


def test_a_silent_server_is_removed_and_its_old_leases_aborted() -> None:
    ledger = new_ledger(lease_timeout_s=10.0)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    assert ledger.dispatcher.expire(now_s=9.9) == []
    assert ledger.dispatcher.expire(now_s=10.0) == ["a"]
    assert ledger.state.tickets.num_by_state()[State.QUEUED] == 1
    ledger.dispatcher.register_server("a", incarnation=1, weights_version=0, now_s=11.0)
    still_working = heartbeat(holding=2, leases=[lease.lease_id])
    ledger.dispatcher.heartbeat("a", still_working, now_s=11.0)
    assert ledger.state.leases.take_aborts() == {"a": [lease.lease_id]}


def test_a_new_server_incarnation_fences_the_old_one() -> None:
    ledger = new_ledger()
    assert ledger.state.incarnations.find("a", "old", 0) == 0
    add_server(ledger, "a", capacity=2, incarnation=ledger.admit_process("a", "old"))
    (lease,) = leases_of(ledger)
    assert ledger.state.incarnations.find("a", "old", 0) == ledger.state.incarnations.find("a", "old", 1) == 1
    add_server(ledger, "a", capacity=2, incarnation=ledger.admit_process("a", "new"))
    assert ledger.state.tickets.num_by_state()[State.QUEUED] == 1
    with pytest.raises(StaleIncarnationError):
        ledger.state.incarnations.find("a", "old", 1)
    assert leases_of(ledger)[0].ticket_id == lease.ticket_id


def test_a_lost_ticket_waits_for_weights_within_the_budget() -> None:
    """With the older weights its deadline would be earlier than the free positions allow."""
    ledger = new_ledger(max_staleness=1, groups_per_step=2)
    add_server(ledger, "a", capacity=100)
    old = leases_of(ledger)
    for lease in old[:2]:
        finish(ledger, lease)
    version = train_step(ledger)
    add_server(ledger, "b", capacity=4, version=version)
    fresh = leases_of(ledger, "b")
    ledger.dispatcher.remove_server("b")
    ledger.dispatcher.return_leases("a", [lease.lease_id for lease in old[2:]])
    again = leases_of(ledger)
    assert [lease.ticket_id for lease in again] == [lease.ticket_id for lease in old[2:]], (
        "two more would exceed the budget of 4 for step 0"
    )
    beat(ledger, "a", capacity=100, version=version)
    assert [lease.ticket_id for lease in leases_of(ledger)] == [lease.ticket_id for lease in fresh]


# --- failures, filters, reissues ---


def test_failing_samples_are_retried_then_their_ticket_drops() -> None:
    ledger = new_ledger(max_sample_retries=2, max_reissues=1)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    first_ticket, prompt = lease.ticket_id, lease.prompt_index
    deliver(ledger, "a", done(lease, 1, [0]))
    for _ in range(2):
        ledger.intake.sample_failed("a", failed(lease, 0))
        (lease,) = leases_of(ledger)
        assert (lease.ticket_id, lease.sample_indices) == (first_ticket, [0])
    ledger.intake.sample_failed("a", failed(lease, 0))
    assert ledger.state.drops == {Drop.FAILED: 1}
    (lease,) = leases_of(ledger)
    assert lease.prompt_index == prompt
    assert ledger.state.tickets.live[lease.ticket_id].parent == first_ticket
    for _ in range(3):
        ledger.intake.sample_failed("a", failed(lease, 0))
        (lease,) = leases_of(ledger)
    assert lease.prompt_index != prompt, "reissued max_reissues times"


def test_a_sample_longer_than_the_microbatch_is_refused() -> None:
    ledger = new_ledger(max_tokens=3)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    assert deliver(ledger, "a", done(lease, 0, [0, 0, 0])) is Verdict.INVALID
    assert deliver(ledger, "a", done(lease, 1, [0, 0])) is Verdict.ACCEPTED


def test_a_segment_longer_than_the_microbatch_is_refused() -> None:
    ledger = new_ledger(max_tokens=8, max_segment_tokens=4)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    lengths = iter([(5, 3), (4, 4)])
    verdicts = []
    for index in lease.sample_indices:
        whole = dataclasses.replace(trajectory([0] * 7), segments=next(lengths))
        record = Record.of(lease.ticket_id, index, whole)
        verdicts.append(deliver(ledger, "a", SampleDone(lease_id=lease.lease_id, record=record)))
    assert verdicts == [Verdict.INVALID, Verdict.ACCEPTED]


def test_only_the_newest_finished_evaluations_are_kept() -> None:
    ledger = new_ledger()
    for eval_id in range(50):
        ledger.trainer.request_eval(eval_id=eval_id, num_prompts=1, min_version=0)
        add_server(ledger, "a", capacity=9)
        (lease,) = [lease for lease in leases_of(ledger) if lease.purpose is Purpose.EVAL]
        deliver(ledger, "a", done(lease, 0, [0]))
        again = ledger.trainer.request_eval(eval_id=eval_id, num_prompts=1, min_version=0)
        assert again is not None and again.num_evaluated == 1
    assert len(ledger.state.evals.rounds) <= 5


def test_consecutive_failures_fail_the_job_with_the_last_error() -> None:
    ledger = new_ledger(max_consecutive_failures=3, max_sample_retries=10, max_staleness=9, num_steps=9)
    add_server(ledger, "a", capacity=16)
    leases = leases_of(ledger)
    for lease, error in zip(leases[:3], ("one", "two", "three"), strict=True):
        assert not ledger.state.failure_reason
        for index in lease.sample_indices:  # samples of one ticket count once
            ledger.intake.sample_failed("a", failed(lease, index, error))
    assert (
        "3 samples failed in a row" in ledger.state.failure_reason
        and "a: three" in ledger.state.failure_reason
    )
    assert leases_of(ledger) == []


def test_a_group_without_spread_is_refilled_with_another_prompt() -> None:
    ledger = new_ledger(group_filter="spread", max_staleness=0, groups_per_step=1)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    finish(ledger, lease, rewards=(0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1))  # equal but for rounding
    assert ledger.state.drops == {Drop.NO_SPREAD: 1}
    (refill,) = leases_of(ledger)
    assert refill.prompt_index != lease.prompt_index
    finish(ledger, refill, rewards=(0.0, 1.0))
    assert ledger.state.tickets.num_by_state()[State.BATCHED] == 1


def test_spread_filter_needs_a_group() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        ledger_settings(group_size=1, group_filter="spread")


def test_single_version_rejects_a_group_of_mixed_versions() -> None:
    ledger = new_ledger(group_filter="single_version", max_staleness=4, groups_per_step=1)
    add_server(ledger, "a", capacity=4)
    first, second = leases_of(ledger)
    finish(ledger, first)
    version = train_step(ledger)
    deliver(ledger, "a", done(second, 0, [0, 0]))
    deliver(ledger, "a", done(second, 1, [0, version]))
    assert ledger.state.drops == {Drop.REJECTED: 1}


def test_leases_of_a_stale_ticket_are_aborted() -> None:
    ledger = new_ledger(overdue="drop", max_staleness=1, groups_per_step=1, num_steps=4)
    add_server(ledger, "a", capacity=4)
    slow, fast = leases_of(ledger)
    deliver(ledger, "a", done(slow, 0, [0]))
    finish(ledger, fast)
    version = train_step(ledger)
    beat(ledger, "a", capacity=4, version=version)
    (third,) = leases_of(ledger)
    finish(ledger, third, version=version)
    assert ledger.state.drops == {Drop.STALE: 1}, "step 2 is open, and a token of step 0 has arrived"
    assert ledger.state.leases.take_aborts() == {"a": [slow.lease_id]}
    assert deliver(ledger, "a", done(slow, 1, [version])) is Verdict.FINISHED


# --- trainer ---


def test_recorded_groups_are_served_identically_until_committed() -> None:
    ledger = new_ledger(groups_per_step=1)
    add_server(ledger, "a", capacity=4)
    lease, _ = leases_of(ledger)
    assert ledger.trainer.fetch(step=0, position=0) is None
    finish(ledger, lease)
    group = ledger.trainer.fetch(step=0, position=0)
    assert (
        group is not None
        and group.ticket_id == lease.ticket_id
        and [t.reward for t in group.trajectories] == [0.0, 1.0]
    )
    with pytest.raises(RefusedError, match="complete"):
        ledger.trainer.commit(incarnation=1, step=0)
    train_step(ledger)
    again = ledger.trainer.fetch(step=0, position=0)
    assert again is not None and again.ticket_id == group.ticket_id
    ledger.trainer.commit(incarnation=1, step=0)
    assert ledger.state.tickets.num_by_state()[State.TRAINED] == 1
    with pytest.raises(RefusedError, match="served"):
        ledger.trainer.fetch(step=0, position=0)
    with pytest.raises(RefusedError, match="position"):
        ledger.trainer.fetch(step=1, position=1)


def test_a_newer_trainer_fences_older_ones_and_repeats_steps() -> None:
    ledger = new_ledger(groups_per_step=1)
    add_server(ledger, "a", capacity=4)
    for lease in leases_of(ledger):
        finish(ledger, lease)
    train_step(ledger)
    trained = ledger.state.counters["tokens_trained"]
    ledger.trainer.start_training(incarnation=2, step=0, stream={})
    with pytest.raises(StaleIncarnationError):
        ledger.trainer.complete_step(incarnation=1, step=0)
    with pytest.raises(StaleIncarnationError):
        ledger.trainer.start_training(incarnation=1, step=0, stream={})
    with pytest.raises(RefusedError, match="StartTraining"):
        ledger.trainer.alloc_version(incarnation=3, step=0)
    assert ledger.trainer.alloc_version(incarnation=2, step=0) == 2, "versions are never reused"
    ledger.trainer.complete_step(incarnation=2, step=0)
    assert ledger.state.counters["tokens_trained"] == trained, "a repeated step is counted once"
    ledger.trainer.commit(incarnation=2, step=0)
    with pytest.raises(RefusedError, match="restart"):
        ledger.trainer.start_training(incarnation=3, step=0, stream={})


def test_a_trainer_may_not_skip_steps_or_invent_weights() -> None:
    ledger = new_ledger()
    with pytest.raises(RefusedError, match="complete"):
        ledger.trainer.complete_step(incarnation=1, step=0)
    with pytest.raises(RefusedError, match="cannot exist"):
        ledger.trainer.alloc_version(incarnation=1, step=1)


def test_a_fresh_ledger_issues_untrained_prompts_first() -> None:
    ledger = new_ledger(groups_per_step=2, num_steps=8)
    add_server(ledger, "a", capacity=8)
    leases = leases_of(ledger)
    for lease in leases[:3]:
        finish(ledger, lease)
    train_step(ledger)
    state = ledger.trainer.stream_state(step=0)
    assert state["pending"] == [lease.prompt_index for lease in leases[2:]], (
        "one recorded in step 1, one still running"
    )
    ledger.trainer.close("interrupted")
    assert sorted(ledger.trainer.stream_state(step=0)["pending"]) == sorted(state["pending"]), (
        "cancelled prompts are not lost"
    )  # type: ignore[arg-type]

    resumed = empty_ledger(ledger.settings)
    resumed.state.prompts.set_num_train_prompts(1000)
    resumed.trainer.start_training(incarnation=9, step=1, stream=state)
    add_server(resumed, "a", capacity=100)
    assert len(leases_of(resumed)) == 2, "with the weights of step 0 only step 1 is within the bound"
    resumed.dispatcher.remove_server("a")
    version = resumed.trainer.alloc_version(incarnation=9, step=1)
    assert version == 2
    add_server(resumed, "a", capacity=100, version=version)
    again = leases_of(resumed)
    assert len(again) == (1 + 1 + 1) * 2 - 2
    assert [lease.prompt_index for lease in again[:2]] == state["pending"]
    assert not {lease.prompt_index for lease in again[2:]} & {lease.prompt_index for lease in leases}
    finish(resumed, again[0], version=version)
    assert resumed.trainer.fetch(step=1, position=0) is not None


def test_close_cancels_uncompleted_train_tickets_but_no_evals() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=8)
    leases = leases_of(ledger)
    for lease in leases[:3]:
        finish(ledger, lease)
    ledger.trainer.complete_step(incarnation=1, step=0)
    ledger.trainer.close("drain")
    assert ledger.state.drops == {Drop.CANCELLED: 2}, (
        "one was running, one recorded in a step that was not trained"
    )
    assert sorted(ledger.state.leases.take_aborts()["a"]) == [lease.lease_id for lease in leases[3:]]
    assert ledger.state.tickets.num_by_state()[State.BATCHED] == 2, "the completed step waits for its commit"
    assert ledger.trainer.fetch(step=1, position=0) is None
    ledger.trainer.commit(incarnation=1, step=0)
    assert sorted(ledger.trainer.stream_state(step=0)["pending"]) == sorted(
        lease.prompt_index for lease in leases[2:]
    )  # type: ignore[arg-type]
    assert ledger.trainer.request_eval(eval_id=1, num_prompts=1, min_version=0) is None
    assert [lease.purpose for lease in leases_of(ledger)] == [Purpose.EVAL]


# --- eval ---


def test_evaluations_go_first_and_wait_for_their_version() -> None:
    ledger = new_ledger(max_staleness=4, groups_per_step=1, max_sample_retries=0)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    finish(ledger, lease)
    version = train_step(ledger)
    assert ledger.trainer.request_eval(eval_id=5, num_prompts=3, min_version=version) is None
    assert [lease.purpose for lease in leases_of(ledger)] == [Purpose.TRAIN], (
        "the weights of this server are too old for the evaluation"
    )
    add_server(ledger, "b", capacity=3, version=version)
    leases = leases_of(ledger, "b")
    assert [(lease.purpose, lease.prompt_index, lease.sample_indices) for lease in leases] == [
        (Purpose.EVAL, i, [0]) for i in range(3)
    ]
    deliver(ledger, "b", done(leases[0], 0, [version], reward=1.0))
    ledger.intake.sample_failed("b", failed(leases[1], 0))
    ledger.dispatcher.return_leases("b", [leases[2].lease_id])
    (again,) = (lease for lease in leases_of(ledger, "b") if lease.purpose is Purpose.EVAL)
    deliver(ledger, "b", done(again, 0, [version, version], reward=0.0))
    result = ledger.trainer.request_eval(eval_id=5, num_prompts=3, min_version=version)
    assert result is not None
    assert (result.num_evaluated, result.num_failed) == (2, 1)
    assert (result.rewards.sum(), result.tokens.sum()) == (1.0, 3), "the failed one counts 0"
    assert (result.oldest_version, result.newest_version) == (version, version)
    counts = ledger.state.tickets.num_by_state()
    assert (counts[State.EVALUATED], counts[State.DROPPED]) == (2, 1)


# --- prompts, settings ---


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000])
def test_an_epoch_is_a_permutation_by_seed_and_epoch(size: int) -> None:
    orders = {
        (seed, epoch): tuple(permuted(index, size=size, seed=seed, epoch=epoch) for index in range(size))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(size)) for order in orders.values())
    if size >= 64:
        assert len(set(orders.values())) == 4
        assert abs(sum(orders[0, 0][: size // 2]) / (size // 2) - (size - 1) / 2) < size / 6, (
            "the first half is not a fair sample"
        )


def test_the_prompt_cursor_resumes_in_the_middle_of_an_epoch() -> None:
    whole = PromptOrder(seed=3, num_prompts=7)
    sequence = [whole.next().index for _ in range(20)]
    resumed = PromptOrder(seed=3, num_prompts=7)
    resumed.restore(cursor=9, returned=[Prompt(index=4), Prompt(index=2)])
    assert [resumed.next().index for _ in range(13)] == [4, 2, *sequence[9:]]
    assert sorted(sequence[:7]) == list(range(7))


def test_sampling_seeds_have_30_bits() -> None:
    seeds = {sampling_seed(0, ticket_id, 0) for ticket_id in range(1000)}
    assert len(seeds) == 1000 and min(seeds) >= 0 and max(seeds) < 2**30


def test_settings_come_from_the_job_configuration() -> None:
    config = from_mapping(
        {
            "max_staleness": 2,
            "trainer": {"groups_per_step": 3},
            "sampling": {"group_size": 5},
            "buffer": {"overdue": "drop"},
        }
    )
    chosen = LedgerSettings.from_config(config)
    assert (chosen.staleness_cap, chosen.groups_per_step, chosen.group_size, chosen.overdue) == (
        2,
        3,
        5,
        "drop",
    )
