"""What the ledger does about failed samples: policies by kind, quarantine of servers, the end of the job."""

from __future__ import annotations

import math
from typing import Any

import pytest

from areal_like.config import Config, OnFailureConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.failures import FAULTS_OF_TASK, FailureKind
from areal_like.selection import selection_report
from areal_like.wire.fingerprint import shared_settings
from areal_like.wire.messages.hello import Role
from areal_like.wire.messages.producer import Lease, Purpose, SampleDone
from buffer.ledger import failed_samples
from buffer.ledger.lease_dispatcher import MOST_UNPROVEN
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.tables.server_health import FIRST_BACKOFF_S, LONGEST_TASK_BACKOFF_S, MAX_QUARANTINES
from buffer.tickets import Drop, State, Verdict
from tests.support.ledger_simulation import (
    add_server,
    beat,
    deliver,
    done,
    failed,
    ledger_settings,
    new_ledger,
)
from tests.support.row_store import RowStore

WIDE = {"max_staleness": 9, "num_steps": 10, "max_consecutive_failures": 3}
"""Settings with many tickets at a time, and short rows of failures."""


def wide_ledger(*names: str, capacity: int = 16, **settings: object) -> tuple[Ledger, dict[str, list[Lease]]]:
    """A ledger with these servers, and the leases that they got."""
    ledger = new_ledger(**(WIDE | settings))
    for name in names:
        add_server(ledger, name, capacity=capacity)
    return ledger, ledger.dispatcher.grant(now_s=0.0)


def fail_row(ledger: Ledger, name: str, leases: list[Lease], kind: FailureKind) -> None:
    """Fails the first sample of each lease."""
    for lease in leases:
        ledger.intake.sample_failed(name, failed(lease, lease.sample_indices[0], kind=kind))


# --- policies ---


@pytest.mark.parametrize("kind", ["engine", "timeout", "prompt", "routes", "teacher", "agent"])
def test_zero_needs_sampled_tokens(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"on_failure.{kind}=zero"):
        from_mapping({"buffer": {"on_failure": {kind: "zero"}}})
    with pytest.raises(ConfigError, match="retry, zero, drop"):
        from_mapping({"buffer": {"on_failure": {kind: "again"}}})


@pytest.mark.parametrize(
    "difference",
    [
        {"buffer": {"on_failure": {"reward_timeout": "retry"}}},
        {"model": {"renderer": "jinja"}},
        {"model": {"chat_template_kwargs": {"enable_thinking": False}}},
    ],
)
def test_servers_need_the_buffers_settings(difference: dict[str, Any]) -> None:
    other = from_mapping(difference)
    assert shared_settings(other, Role.ROLLOUT) != shared_settings(Config(), Role.ROLLOUT)
    assert shared_settings(other, Role.TRAINER) == shared_settings(Config(), Role.TRAINER)


def test_a_policy_of_drop_ends_the_ticket_at_once() -> None:
    ledger, leases = wide_ledger("a", on_failure=OnFailureConfig(reward="drop"))
    lease = leases["a"][0]
    ledger.intake.sample_failed("a", failed(lease, 0))
    assert ledger.state.drops == {Drop.FAILED: 1}
    counters = ledger.state.counters.summary()
    assert counters["failed_reward_drop"] == 1 and counters["tickets_reissued"] == 1
    assert lease.prompt_index in [new.prompt_index for new in ledger.dispatcher.grant(now_s=0.0)["a"]]


def test_a_bad_prompt_is_never_issued_again() -> None:
    ledger, leases = wide_ledger("a")
    bad = leases["a"][0]
    fail_row(ledger, "a", leases["a"][:6], FailureKind.PROMPT)
    assert ledger.state.drops == {Drop.FAILED: 6} and not ledger.state.failure_reason
    assert ledger.servers["a"].health.quarantine is None, "bad prompts say nothing about a server"
    assert (
        ledger.state.counters.summary()["prompts_given_up"] == 6
        and ledger.state.counters.summary()["tickets_reissued"] == 0
    )
    beat(ledger, "a", capacity=100)
    granted = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert bad.prompt_index not in [lease.prompt_index for lease in granted]


def test_only_bad_prompts_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_samples, "MAX_PROMPTS_GIVEN_UP", 5)
    ledger, leases = wide_ledger("a")
    fail_row(ledger, "a", leases["a"][:4], FailureKind.PROMPT)
    deliver(ledger, "a", done(leases["a"][4], 0, [0]))
    fail_row(ledger, "a", leases["a"][5:8], FailureKind.PROMPT)
    assert not ledger.state.failure_reason, "a good prompt between them"
    beat(ledger, "a", capacity=100)
    fail_row(ledger, "a", ledger.dispatcher.grant(now_s=0.0)["a"][:2], FailureKind.PROMPT)
    assert "5 prompts in a row" in ledger.state.failure_reason


def test_a_reward_that_times_out_is_trained_with_zero() -> None:
    ledger, leases = wide_ledger("a", capacity=2)
    (lease,) = leases["a"]
    deliver(ledger, "a", done(lease, 0, [0], reward=1.0))
    assert deliver(ledger, "a", done(lease, 1, [0, 0, 0], failure="reward_timeout")) is Verdict.ACCEPTED
    assert ledger.state.tickets.num_by_state()[State.BATCHED] == 1
    counters = ledger.state.counters.summary()
    assert (counters["failed_reward_timeout_zero"], counters["samples_failed"]) == (1, 1)
    assert "tokens_wasted_failed_reward_timeout" not in counters, "its tokens are trained on"
    assert (counters["offered_length_0"], counters["offered_length_2"]) == (1, 1)


@pytest.mark.parametrize(("failure", "reward"), [("reward", 0.0), ("reward_timeout", 1.0)])
def test_zero_is_only_for_its_policy_and_reward(failure: str, reward: float) -> None:
    ledger, leases = wide_ledger("a")
    sample = done(leases["a"][0], 0, [0], reward=reward, failure=failure)
    assert deliver(ledger, "a", sample) is Verdict.INVALID
    assert ledger.state.counters.summary()["failed_engine_retry"] == 1, "it is the server that is wrong"


def test_an_unknown_kind_of_failure_is_malformed() -> None:
    _, leases = wide_ledger("a")
    record = done(leases["a"][0], 0, [0]).record
    with pytest.raises(ValueError, match="boredom"):
        SampleDone(lease_id=1, record=record, failure="boredom")


def test_a_zero_without_tokens_is_retried() -> None:
    ledger, leases = wide_ledger("a", capacity=2, max_sample_retries=1)
    (lease,) = leases["a"]
    ledger.intake.sample_failed("a", failed(lease, 0, kind=FailureKind.ENVIRONMENT))
    (again,) = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert (again.ticket_id, again.sample_indices) == (lease.ticket_id, [0])
    ledger.intake.sample_failed("a", failed(again, 0, kind=FailureKind.ENVIRONMENT))
    counters = ledger.state.counters.summary()
    assert (counters["failed_environment_retry"], counters["failed_environment_drop"]) == (1, 1)


def test_failed_evaluations_count_as_zero() -> None:
    ledger = new_ledger(max_sample_retries=0)
    ledger.trainer.request_eval(eval_id=1, num_prompts=4, min_version=0)
    add_server(ledger, "a", capacity=4)
    leases = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert [lease.purpose for lease in leases] == [Purpose.EVAL] * 4
    deliver(ledger, "a", done(leases[0], 0, [0], reward=1.0))
    deliver(ledger, "a", done(leases[1], 0, [0], failure="reward_timeout"))
    ledger.intake.sample_failed("a", failed(leases[2], 0, kind=FailureKind.REWARD))
    ledger.intake.sample_failed("a", failed(leases[3], 0, kind=FailureKind.PROMPT))
    result = ledger.trainer.request_eval(eval_id=1, num_prompts=4, min_version=0)
    assert result is not None
    assert (result.rewards.sum(), result.num_evaluated, result.num_failed) == (1, 2, 2)


# --- servers ---


def test_a_failed_sample_goes_to_another_server() -> None:
    ledger, leases = wide_ledger("a", capacity=2)
    (lease,) = leases["a"]
    add_server(ledger, "b", capacity=1)  # has less credit than a
    beat(ledger, "a", capacity=100)
    ledger.intake.sample_failed("a", failed(lease, 0))
    granted = ledger.dispatcher.grant(now_s=0.0)
    assert [(new.ticket_id, new.sample_indices) for new in granted["b"]] == [(lease.ticket_id, [0])]
    assert granted["a"], "the other server takes other tickets"
    ledger.dispatcher.remove_server("b")
    ledger.intake.sample_failed("a", failed(lease, 1))
    assert lease.ticket_id in [new.ticket_id for new in ledger.dispatcher.grant(now_s=0.0)["a"]], (
        "there is no other"
    )


def test_engine_failures_in_a_row_are_a_quarantine() -> None:
    ledger, leases = wide_ledger("a", "b")
    beat(ledger, "a", capacity=100)
    fail_row(ledger, "a", leases["a"][:2], FailureKind.TIMEOUT)
    for index in leases["a"][0].sample_indices[1:]:
        ledger.intake.sample_failed("a", failed(leases["a"][0], index, kind=FailureKind.ENGINE))
    assert ledger.servers["a"].health.quarantine is None, "samples of one ticket count once"
    ledger.intake.sample_failed("a", failed(leases["a"][2], 0, "out of memory", kind=FailureKind.ENGINE))
    assert ledger.servers["a"].health.quarantine is not None
    assert "3 samples failed in a row" in ledger.servers["a"].health.quarantine.reason
    (notice,) = ledger.take_notices()
    assert "a gets no leases for 30 s" in notice and "out of memory" in notice
    assert [name for name, server in ledger.servers.items() if server.health.quarantine] == ["a"]
    assert ledger.state.counters.summary()["quarantines"] == 1
    assert "a" not in ledger.dispatcher.grant(now_s=0.0) and not ledger.state.failure_reason


def test_a_server_in_quarantine_uses_up_no_retries() -> None:
    ledger, leases = wide_ledger("a", max_sample_retries=0, num_steps=20, max_staleness=19)
    fail_row(ledger, "a", leases["a"][:3], FailureKind.ENGINE)
    assert ledger.state.drops == {Drop.FAILED: 3}
    fail_row(ledger, "a", leases["a"][3:5], FailureKind.ENGINE)
    fail_row(ledger, "a", leases["a"][5:], FailureKind.PROMPT)
    assert ledger.state.drops == {Drop.FAILED: 3}, "these samples wait for another server"
    add_server(ledger, "b", capacity=100)
    waiting = {lease.ticket_id for lease in leases["a"][3:]}
    assert waiting <= {lease.ticket_id for lease in ledger.dispatcher.grant(now_s=0.0)["b"]}


def test_the_back_off_doubles_until_a_success() -> None:
    ledger, leases = wide_ledger("a", "b")
    deliver(ledger, "b", done(leases["b"][0], 0, [0]))
    fail_row(ledger, "a", leases["a"][:3], FailureKind.ENGINE)
    ledger.dispatcher.return_leases(
        "a", [lease.lease_id for lease in leases["a"] if lease is not leases["a"][4]]
    )
    now_s = 0.0
    for backoff_s in (FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S):
        for time_s in (now_s + backoff_s - 1, now_s + backoff_s):
            beat(ledger, "a", capacity=100, now_s=time_s)
            granted = ledger.dispatcher.grant(now_s=time_s)
            assert ("a" in granted) == (time_s == now_s + backoff_s)
        now_s += backoff_s
        fail_row(ledger, "a", granted["a"][:1], FailureKind.ENGINE)
        ledger.dispatcher.return_leases("a", [lease.lease_id for lease in granted["a"]])
        assert ledger.servers["a"].health.quarantine is not None, "one failure on probation is enough"
    deliver(ledger, "a", done(leases["a"][4], 0, [0]))
    health = ledger.servers["a"].health
    assert health.quarantine is None and health.num_quarantines == 0
    assert not ledger.state.failure_reason


def test_a_server_that_has_delivered_nothing_holds_few_leases() -> None:
    """It may hold the tickets of a job and make nothing of them, as long as it sends heartbeats."""
    ledger, leases = wide_ledger("a")
    assert len(leases["a"]) > MOST_UNPROVEN, "no other one has delivered either"
    add_server(ledger, "liar", capacity=1_000_000)
    deliver(ledger, "a", done(leases["a"][0], 0, [0]))
    granted = ledger.dispatcher.grant(now_s=0.0)["liar"]
    assert len(granted) == MOST_UNPROVEN
    beat(ledger, "liar", capacity=1_000_000, now_s=1.0)
    assert "liar" not in ledger.dispatcher.grant(now_s=1.0)
    deliver(ledger, "liar", done(granted[0], granted[0].sample_indices[0], [0]))
    beat(ledger, "liar", capacity=1_000_000, now_s=2.0)
    assert ledger.dispatcher.grant(now_s=2.0)["liar"], "one sample is enough"


def test_a_quarantine_outlives_a_reconnect_not_a_restart() -> None:
    ledger, leases = wide_ledger("a", "b")
    fail_row(ledger, "a", leases["a"][:3], FailureKind.ENGINE)
    ledger.dispatcher.remove_server("a")
    add_server(ledger, "a", capacity=100)
    assert ledger.servers["a"].free_samples == 0
    add_server(ledger, "a", capacity=100, incarnation=2)
    assert ledger.servers["a"].free_samples == 100


# --- the end of the job ---


def test_one_server_cannot_end_the_job_of_others() -> None:
    ledger, leases = wide_ledger("good", "hostile", max_sample_retries=100)
    deliver(ledger, "good", done(leases["good"][0], 0, [0]))
    fail_row(ledger, "hostile", leases["hostile"], FailureKind.REWARD)
    assert not ledger.state.failure_reason and ledger.servers["hostile"].health.quarantine is not None
    assert ledger.failed_samples.task_trouble == "", "the other one works"


def test_a_task_that_never_works_ends_the_job() -> None:
    ledger, leases = wide_ledger("a", "b")
    deliver(ledger, "a", done(leases["a"][0], 0, [0], failure="reward_timeout"))
    fail_row(ledger, "a", leases["a"][1:4], FailureKind.REWARD)
    assert ledger.state.failure_reason, (
        "b has no outcome, and a sample with reward 0 for a failure is not a good one"
    )
    assert "a: reward raised" in ledger.state.failure_reason


@pytest.mark.parametrize("kind", sorted(FAULTS_OF_TASK))
def test_a_task_that_fails_later_is_waited_for(kind: FailureKind) -> None:
    """A judge that is down for hours: the job tries now and then, and says what it waits for."""
    store = RowStore()
    ledger, leases = wide_ledger("a", "b", store=store, max_sample_retries=100)
    deliver(ledger, "a", done(leases["a"][0], 0, [0]))
    rest = {"a": leases["a"][1:], "b": leases["b"]}
    now_s = 0.0
    for _ in range(12):
        for name in ("a", "b"):
            fail_row(ledger, name, rest[name][:3], kind)
            ledger.dispatcher.return_leases(name, [lease.lease_id for lease in rest[name]])
        assert not ledger.state.failure_reason
        assert (
            "the task's code or a teacher fails at every rollout server: 3 samples failed in a row"
            in ledger.failed_samples.task_trouble
        )
        backoffs = [server.health.quarantine for server in ledger.servers.values()]
        ends = [one.until_s for one in backoffs if one is not None]
        assert len(ends) == 2 and max(ends) <= now_s + LONGEST_TASK_BACKOFF_S
        now_s = max(ends)
        for name in ("a", "b"):
            beat(ledger, name, capacity=100, now_s=now_s)
        rest = ledger.dispatcher.grant(now_s=now_s)
        assert ledger.failed_samples.task_trouble == "" and set(rest) == {"a", "b"}, (
            "each server gets another try"
        )
    deliver(ledger, "b", done(rest["b"][0], rest["b"][0].sample_indices[0], [0]))
    fail_row(ledger, "a", rest["a"][:2], kind)
    assert ledger.servers["b"].health.num_quarantines == 0 and not ledger.state.failure_reason
    store.close()


def test_failing_engines_end_a_job_at_any_time() -> None:
    ledger, leases = wide_ledger("a", max_sample_retries=100)
    deliver(ledger, "a", done(leases["a"][0], 0, [0]))
    fail_row(ledger, "a", leases["a"][1:4], FailureKind.REWARD)
    kinds, now_s = [FailureKind.ENGINE] * 3, 0.0
    for kind in kinds:
        assert not ledger.state.failure_reason
        quarantine = ledger.servers["a"].health.quarantine
        assert quarantine is not None
        now_s = quarantine.until_s
        beat(ledger, "a", capacity=100, now_s=now_s)
        fail_row(ledger, "a", ledger.dispatcher.grant(now_s=now_s)["a"][:3], kind)
    assert "3 samples failed in a row" in ledger.state.failure_reason


def test_agents_from_outside_end_nothing() -> None:
    ledger, leases = wide_ledger("a")
    fail_row(ledger, "a", leases["a"], FailureKind.AGENT)
    assert ledger.servers["a"].health.quarantine is None and not ledger.state.failure_reason
    counters = ledger.state.counters.summary()
    assert counters["failed_agent_drop"] == len(leases["a"]) == ledger.state.drops[Drop.FAILED]
    assert counters["prompts_given_up"] == 0, "their prompts are issued again"


def test_a_hanging_verifier_does_not_end_the_job() -> None:
    ledger, leases = wide_ledger("a")
    for lease in leases["a"]:
        deliver(ledger, "a", done(lease, 0, [0], failure="reward_timeout"))
    assert not ledger.state.failure_reason and ledger.servers["a"].health.quarantine is None


def test_failing_engines_end_the_job_after_some_quarantines() -> None:
    ledger, leases = wide_ledger("a", max_sample_retries=100)
    fail_row(ledger, "a", leases["a"][:3], FailureKind.ENGINE)
    for _ in range(MAX_QUARANTINES - 1):
        assert not ledger.state.failure_reason
        quarantine = ledger.servers["a"].health.quarantine
        assert quarantine is not None
        beat(ledger, "a", capacity=100, now_s=quarantine.until_s)
        (lease, *_) = ledger.dispatcher.grant(now_s=quarantine.until_s)["a"]
        ledger.intake.sample_failed(
            "a", failed(lease, lease.sample_indices[0], "no GPU", kind=FailureKind.ENGINE)
        )
    assert "no GPU" in ledger.state.failure_reason


# --- counters ---


def test_what_is_offered_and_trained_is_counted() -> None:
    ledger = new_ledger(group_filter="spread", max_staleness=1, groups_per_step=1, num_steps=2)
    add_server(ledger, "a", capacity=4)
    solved, mixed = ledger.dispatcher.grant(now_s=0.0)["a"]
    for index in range(2):
        deliver(ledger, "a", done(solved, index, [0] * 5, reward=1.0))  # no spread: dropped
        deliver(ledger, "a", done(mixed, index, [0] * 2, reward=float(index)))
    ledger.trainer.complete_step(incarnation=1, step=0)
    lost = ledger.dispatcher.grant(now_s=0.0)["a"][0]
    ledger.intake.sample_failed("a", failed(lost, 0, kind=FailureKind.REWARD, num_tokens=100))
    counters = ledger.state.counters.summary()
    wanted = {
        "offered_length_3": 2,
        "offered_length_1": 2,
        "offered_sum_reward": 3.0,
        "trained_length_1": 2,
        "trained_sum_tokens": 4,
        "trained_sum_reward": 1.0,
        "groups_offered_solved_100": 1,
        "groups_offered_solved_50_75": 1,
        "groups_trained_solved_50_75": 1,
        "tokens_wasted_no_spread": 10,
        "tokens_wasted_failed_reward": 100,
        "failed_reward_length_7": 1,
    }
    assert {name: counters.get(name) for name in wanted} == wanted
    assert "trained_length_3" not in counters


def test_refused_tokens_are_wasted_by_reason() -> None:
    ledger, leases = wide_ledger("a", capacity=2)
    (lease,) = leases["a"]
    ledger.dispatcher.return_leases("a", [lease.lease_id])
    assert deliver(ledger, "a", done(lease, 0, [0] * 7)) is Verdict.SUPERSEDED
    assert ledger.state.counters.summary()["tokens_wasted_superseded"] == 7


def test_a_ledger_of_the_release_before_continues() -> None:
    store = RowStore()
    settings: dict[str, object] = {"durable": True, "groups_per_step": 1, "num_steps": 4}
    before = new_ledger(store=store, **settings)
    add_server(before, "a", capacity=4)
    for lease in before.dispatcher.grant(now_s=0.0)["a"]:
        for index in lease.sample_indices:
            deliver(before, "a", done(lease, index, [0], reward=1.0))
    before.trainer.complete_step(incarnation=1, step=0)
    after = store.copy()
    old_names = "'tokens_trained', 'sum_token_lag', 'tokens_accepted', 'verdict_accepted', 'trained_lag_0'"
    after.connection.execute(f"DELETE FROM statistics WHERE name NOT IN ({old_names})")
    after.connection.execute("DELETE FROM marks WHERE name = 'counts_selection'")
    ledger = recover(ledger_settings(**settings), after, now_s=0.0)
    assert ledger.state.counters.summary()["samples_trained"] == 2
    assert selection_report(ledger.state.counters.summary())["trained"]["samples"] == 0
    ledger.state.steps.uncount_from(0)  # as when an operator drops a ticket of a repeated step
    assert ledger.state.counters.summary()["samples_trained"] == 0
    assert selection_report(ledger.state.counters.summary())["trained"]["samples"] == 0, "not below zero"
    for each in (store, after):
        each.close()


def test_numbers_of_a_server_cannot_overflow_the_counters() -> None:
    ledger, leases = wide_ledger("a", max_tokens=1000)
    for lease in leases["a"][:3]:
        for index in lease.sample_indices:
            deliver(ledger, "a", done(lease, index, [0], reward=1.7e308))
    ledger.intake.sample_failed("a", failed(leases["a"][3], 0, num_tokens=1 << 62))
    assert all(math.isfinite(value) for value in ledger.state.counters.summary().values())
    assert ledger.state.counters.summary()["tokens_wasted_failed_reward"] == 1000
    with pytest.raises(ValueError, match="num_tokens"):
        failed(leases["a"][3], 1, num_tokens=-1)
