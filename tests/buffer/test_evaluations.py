"""Evaluations of sets with several answers to a prompt: leases, failures, retention, restarts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from areal_like.errors import RefusedError
from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.evaluation import EvalResult, SampleOutcome
from areal_like.wire.messages.producer import Lease, Purpose
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.tickets import Drop, State, Verdict
from tests.support.ledger_simulation import add_server, deliver, done, failed, new_ledger
from tests.support.row_store import RowStore

SETS = {"eval": 1, "hard": 4}


def ledger_with_sets(**settings: Any) -> Ledger:
    return new_ledger(eval_sets=SETS, **settings)


def request(
    ledger: Ledger, *, eval_id: int = 1, eval_set: str = "hard", num_prompts: int = 2
) -> EvalResult | None:
    return ledger.trainer.request_eval(
        eval_id=eval_id,
        eval_set=eval_set,
        num_prompts=num_prompts,
        num_samples=SETS[eval_set],
        min_version=0,
    )


def eval_leases(ledger: Ledger, *names: str) -> list[tuple[str, Lease]]:
    granted = ledger.dispatcher.grant(now_s=0.0)
    return [
        (name, lease)
        for name in (names or granted)
        for lease in granted.get(name, [])
        if lease.purpose is Purpose.EVAL
    ]


def answer(ledger: Ledger, leases: list[tuple[str, Lease]]) -> None:
    """Delivers all samples of these leases, with reward 1."""
    for name, lease in leases:
        for index in lease.sample_indices:
            assert deliver(ledger, name, done(lease, index, [0], reward=1.0)) is Verdict.ACCEPTED


def finish(ledger: Ledger) -> None:
    """Delivers everything that is left."""
    while leases := eval_leases(ledger):
        answer(ledger, leases)


def test_answers_to_a_prompt_are_spread_by_credit() -> None:
    ledger = ledger_with_sets()
    request(ledger)
    add_server(ledger, "a", capacity=3)
    add_server(ledger, "b", capacity=2)
    leases = eval_leases(ledger)
    assert Counter(name for name, lease in leases for _ in lease.sample_indices) == {"a": 3, "b": 2}
    samples = [(lease.prompt_index, index) for _, lease in leases for index in lease.sample_indices]
    assert sorted(samples) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert {lease.eval_set for _, lease in leases} == {"hard"}


def test_seeds_depend_on_set_and_prompt_alone() -> None:
    seeds: dict[tuple[int, str], dict[int, int]] = {}
    for shift in (0, 1):  # other ids of tickets
        ledger = ledger_with_sets()
        add_server(ledger, "a", capacity=100)
        for eval_id, eval_set in ((1, "hard"), (2, "eval"))[:: 1 - 2 * shift]:
            request(ledger, eval_id=eval_id + shift, eval_set=eval_set)
            leases = [lease for _, lease in eval_leases(ledger)]
            seeds[shift, eval_set] = {lease.prompt_index: lease.seed for lease in leases}
    assert seeds[0, "hard"] == seeds[1, "hard"] and seeds[0, "eval"] == seeds[1, "eval"]
    different = [*seeds[0, "hard"].values(), *seeds[0, "eval"].values()]
    assert len(set(different)) == 4


def test_a_failed_sample_counts_zero_and_the_others_go_on() -> None:
    ledger = ledger_with_sets(max_sample_retries=0)
    request(ledger, num_prompts=2)
    add_server(ledger, "a", capacity=100)
    (_, first), (_, second) = eval_leases(ledger)
    ledger.intake.sample_failed("a", failed(first, 1, kind=FailureKind.ENGINE))
    deliver(ledger, "a", done(first, 2, [0], failure="reward_timeout"))
    for index in (0, 3):
        deliver(ledger, "a", done(first, index, [0], reward=1.0))
    for index in range(4):
        ledger.intake.sample_failed("a", failed(second, index, kind=FailureKind.PROMPT))
    result = request(ledger)
    assert result is not None
    assert result.rewards.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    missing, has_failed = SampleOutcome.MISSING, SampleOutcome.FAILED
    assert result.outcomes.tolist() == [0, missing, has_failed, 0, *[missing] * 4]
    counts = ledger.state.tickets.num_by_state()
    assert (counts[State.EVALUATED], counts[State.DROPPED], ledger.state.drops[Drop.FAILED]) == (1, 1, 1)
    assert ledger.state.counters.summary()["samples_failed"] == 6
    assert deliver(ledger, "a", done(first, 1, [0])) is Verdict.FINISHED


def test_a_retried_sample_keeps_its_seed() -> None:
    ledger = ledger_with_sets(max_sample_retries=1)
    request(ledger, num_prompts=1)
    add_server(ledger, "a", capacity=100)
    ((_, lease),) = eval_leases(ledger)
    ledger.intake.sample_failed("a", failed(lease, 2, kind=FailureKind.ENGINE))
    ((_, again),) = eval_leases(ledger)
    assert (again.sample_indices, again.seed) == ([2], lease.seed)


@pytest.mark.parametrize("has_task", [False, True])
def test_rewards_of_another_task_cannot_end_the_job(has_task: bool) -> None:
    ledger = ledger_with_sets(
        max_sample_retries=0,
        max_consecutive_failures=2,
        eval_sets_with_task=frozenset(["hard"] if has_task else []),
    )
    request(ledger, num_prompts=5)
    add_server(ledger, "a", capacity=100)
    for _, lease in eval_leases(ledger):
        for index in lease.sample_indices:
            ledger.intake.sample_failed("a", failed(lease, index, kind=FailureKind.REWARD))
    assert bool(ledger.state.failure_reason) is not has_task
    result = request(ledger, num_prompts=5)
    assert (result is not None and result.num_failed == 20) is has_task


def test_the_result_attests_versions_truncation_and_length() -> None:
    ledger = ledger_with_sets()
    version = ledger.trainer.alloc_version(incarnation=1, step=0)
    request(ledger, num_prompts=1)
    add_server(ledger, "a", capacity=100)
    ((_, lease),) = eval_leases(ledger)
    for index in range(3):
        deliver(ledger, "a", done(lease, index, [0] * (index + 1), reward=0.5))
    deliver(ledger, "a", done(lease, 3, [0, version], finish=FinishReason.LENGTH))
    result = request(ledger, num_prompts=1)
    assert result is not None and result.tokens.tolist() == [1, 2, 3, 2]
    assert result.outcomes.tolist() == [0, 0, 0, SampleOutcome.TRUNCATED]
    assert (result.oldest_version, result.newest_version) == (0, version)
    assert (result.oldest_step, result.newest_step) == (0, 0)


def test_a_killed_buffer_continues_with_the_missing_samples() -> None:
    store = RowStore()
    ledger = ledger_with_sets(store=store, durable=True, max_sample_retries=0)
    request(ledger)
    add_server(ledger, "a", capacity=5)
    (_, first), (_, second) = eval_leases(ledger)
    for index in (0, 2):
        deliver(ledger, "a", done(first, index, [0], reward=1.0))
    ledger.intake.sample_failed("a", failed(first, 3, kind=FailureKind.ENGINE))

    ledger = recover(ledger.settings, store.copy(), now_s=0.0)
    assert request(ledger) is None, "the same request waits for the same evaluation"
    assert ledger.state.tickets.num_issued == 2
    assert deliver(ledger, "a", done(first, 1, [0], reward=1.0)) is Verdict.ACCEPTED, "its lease has survived"
    add_server(ledger, "b", capacity=100)
    left = eval_leases(ledger, "b")
    assert [(lease.prompt_index, lease.sample_indices) for _, lease in left] == [(1, [1, 2, 3])]
    answer(ledger, left)
    assert second.sample_indices == [0] and request(ledger) is None
    ledger.dispatcher.remove_server("a")
    answer(ledger, eval_leases(ledger, "b"))
    result = request(ledger)
    assert result is not None and result.rewards.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert isinstance(ledger.state.store, RowStore)
    again = request(recover(ledger.settings, ledger.state.store.copy(), now_s=0.0))
    assert again is not None and np.array_equal(again.rewards, result.rewards)
    assert np.array_equal(again.outcomes, result.outcomes)


def test_a_set_that_changed_is_not_continued() -> None:
    store = RowStore()
    ledger = ledger_with_sets(store=store, durable=True)
    request(ledger)
    request(ledger, eval_set="eval")
    settings = dataclasses.replace(ledger.settings, eval_sets={"eval": 1, "hard": 8})
    other = recover(settings, store.copy(), now_s=0.0)
    assert other.state.drops[Drop.CANCELLED] == 2 and list(other.state.evals.rounds) == [(1, "eval")]


def test_a_new_trainer_cancels_and_keeps_what_is_done() -> None:
    store = RowStore()
    ledger = ledger_with_sets(store=store, durable=True)
    add_server(ledger, "a", capacity=100)
    request(ledger, eval_id=1)
    finish(ledger)
    request(ledger, eval_id=2)
    for name, lease in eval_leases(ledger)[:1]:
        deliver(ledger, name, done(lease, 0, [0]))
    ledger.trainer.start_training(incarnation=2, step=0, stream={})
    assert ledger.state.drops[Drop.CANCELLED] == 2 and not ledger.state.evals.rounds
    assert sorted(store.records) == [1, 2], "samples of the cancelled evaluation are released"
    assert ledger.state.leases.take_aborts().keys() == {"a"}
    assert request(ledger, eval_id=1) is None, "the new trainer's evaluation is another one"


def test_a_restored_result_is_of_its_own_weights() -> None:
    store = RowStore()
    ledger = ledger_with_sets(store=store, durable=True)
    add_server(ledger, "a", capacity=100)
    request(ledger, eval_id=3)
    finish(ledger)
    ledger.trainer.start_training(incarnation=2, step=1, stream={})  # it goes back and trains the steps again
    version = ledger.trainer.alloc_version(incarnation=2, step=1)
    ledger = recover(ledger.settings, store.copy(), now_s=0.0)
    assert request(ledger, eval_id=3) is not None, "the same request, as after a lost answer"
    again: dict[str, Any] = {"eval_id": 3, "eval_set": "hard", "num_samples": 4}
    assert ledger.trainer.request_eval(num_prompts=2, min_version=version, **again) is None, (
        "of other weights"
    )
    add_server(ledger, "b", capacity=100, version=version)
    finish(ledger)
    result = ledger.trainer.request_eval(num_prompts=2, min_version=version, **again)
    assert result is not None and result.num_evaluated == 8
    assert ledger.trainer.request_eval(num_prompts=3, min_version=version, **again) is None, "of another size"


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_samples_of_the_newest_evaluations_are_kept(keep: int) -> None:
    store = RowStore()
    ledger = ledger_with_sets(store=store, durable=True, keep_evaluations=keep)
    add_server(ledger, "a", capacity=100)
    for eval_id in range(1, 5):
        for eval_set in SETS:
            request(ledger, eval_id=eval_id, eval_set=eval_set, num_prompts=1)
            finish(ledger)
            assert request(ledger, eval_id=eval_id, eval_set=eval_set, num_prompts=1) is not None
    query = "SELECT first_ticket, state FROM evaluations ORDER BY 1"
    rows = store.copy().connection.execute(query).fetchall()
    assert [state for _, state in rows] == ["released"] * (8 - 2 * keep) + ["done"] * 2 * keep
    assert sorted(store.records) == [ticket_id for ticket_id, state in rows if state == "done"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"eval_set": ""}, "eval_set"),
        ({"eval_set": "a b"}, "eval_set"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"num_prompts": 1 << 20}, "num_prompts"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_prompts": 1 << 10, "num_samples": 1 << 9}, "num_samples"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], field: str) -> None:
    ledger = ledger_with_sets()
    with pytest.raises(RefusedError) as refused:
        ledger.trainer.request_eval(**({"eval_id": 1, "num_prompts": 1, "min_version": 0} | changes))
    assert refused.value.args[0] == field and not ledger.state.evals.rounds
