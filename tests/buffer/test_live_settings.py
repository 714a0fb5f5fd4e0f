"""Settings that an operator changes while the run goes on: each step has one value, whoever asks and when."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from areal_like.errors import RefusedError
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.settings import GROUPS_PER_STEP
from tests.support.ledger_simulation import ledger_settings
from tests.support.row_store import RowStore

BASE = {"trainer.lr": "0.001", "eval.interval": "5", "daemon.log_level": "INFO"}
SETTINGS: dict[str, object] = {"max_staleness": 3, "num_steps": 100, "durable": True}


def started(store: RowStore | None = None, **base: str) -> Ledger:
    ledger = recover(ledger_settings(**SETTINGS), store or RowStore(), now_s=0.0)
    ledger.trainer.start_training(incarnation=1, step=0, stream={}, settings=BASE | base)
    return ledger


def lr_of(ledger: Ledger, step: int) -> float:
    return ledger.trainer.settings_of(incarnation=ledger.state.trainer_incarnation, step=step).lr


OPERATIONS = st.lists(
    st.one_of(
        st.just(("complete", 0)),
        st.tuples(st.just("set"), st.integers(0, 1)),
        st.tuples(st.just("resume"), st.integers(0, 6)),
        st.tuples(st.just("resume with another"), st.integers(0, 6)),
        st.sampled_from([("drain", 0), ("buffer", 0)]),
    ),
    max_size=20,
)


@settings(max_examples=40)
@given(OPERATIONS)
@example([("set", 1), ("drain", 0), ("set", 0), ("resume", 0), ("complete", 0)])
def test_a_step_keeps_the_value_that_it_began_with(operations: list[tuple[str, int]]) -> None:
    """Against a model: what each step was told when it began, and what a step that begins anew must have.

    The expected value of a step is found without the table: the last of those set or configured for it.
    """
    store = RowStore()
    ledger, incarnation, base = started(store), 1, 0.001
    current, is_training = 0, True
    begun = {0: 0.001}
    planned: dict[int, float] = dict.fromkeys(range(200), 0.001)
    for kind, number in operations:
        if kind == "complete" and is_training and current < 60:
            current += 1
            ledger.state.steps.current = current
            begun[current] = lr_of(ledger, current)
            assert begun[current] == planned[current]
        elif kind == "set":
            first = current + is_training
            wanted = (0.001, 0.01)[number]
            (change,) = ledger.operator.change_settings({"trainer.lr": str(wanted)}, unix_s=1.0)
            assert (change.step, float(change.before)) == (first, planned[first])
            planned |= dict.fromkeys(range(first, 200), wanted)
        elif kind.startswith("resume"):
            current, is_training = min(number, current), True
            if kind.endswith("another"):
                base += 1
                planned |= dict.fromkeys(range(current, 200), base)
            incarnation += 1
            ledger.state.set_trainer(incarnation)
            ledger.state.steps.current = current
            ledger.state.live.begin(current, {"trainer.lr": repr(base)}, unix_s=1.0)
            ledger.state.set_closed("")
            begun = {step: value for step, value in begun.items() if step < current} | {
                current: lr_of(ledger, current)
            }
            assert begun[current] == planned[current]
        elif kind == "drain":
            is_training = False
            begun.pop(current, None)  # not begun, or abandoned: no weights come of it
            ledger.state.set_closed("drained")
        elif kind == "buffer":
            rows = ledger.state.live.rows
            store = store.copy()
            ledger = recover(ledger_settings(**SETTINGS), store, now_s=0.0)
            ledger.state.steps.current = current  # which is not what this test is about
            ledger.state.set_trainer(incarnation)
            ledger.state.set_closed("" if is_training else "drained")
            assert ledger.state.live.rows == rows
        assert {step: lr_of(ledger, step) for step in begun} == begun


def test_a_change_counts_from_the_first_step_not_begun() -> None:
    store = RowStore()
    ledger = started(store)
    wanted = {"trainer.lr": "5e-4", "max_staleness": "1", "eval.interval": "2", "checkpoint": "now"}
    changes = {change.key: change for change in ledger.operator.change_settings(wanted, unix_s=1.0)}
    assert {key: change.step for key, change in changes.items()} == {
        "trainer.lr": 1,
        "max_staleness": 1,
        "eval.interval": 1,
        "checkpoint": 0,  # after the step in training
    }
    first = ledger.trainer.settings_of(incarnation=1, step=0)
    assert (first.lr, first.max_staleness, first.eval_interval) == (0.001, 3, 5)
    assert ledger.state.bound.current == 1  # of tickets that begin
    with pytest.raises(RefusedError, match=r"step 1 are not fixed yet; only those of steps 0\.\.0 are"):
        ledger.trainer.settings_of(incarnation=1, step=1)
    for buffer in (ledger, recover(ledger_settings(**SETTINGS), store.copy(), now_s=0.0)):
        buffer.state.steps.current = 1
        second = buffer.trainer.settings_of(incarnation=1, step=1)
        assert (second.lr, second.max_staleness, second.eval_interval) == (5e-4, 1, 2)
        assert second.checkpoint and not second.evaluate
        assert buffer.state.bound.current == 1
    rows = store.copy().connection.execute("SELECT verb, subject, detail FROM operations ORDER BY id")
    assert ("set", "trainer.lr", "0.001 -> 0.0005 from step 1") in rows.fetchall()


def test_a_value_configured_anew_replaces_the_change() -> None:
    store = RowStore()
    ledger = started(store)
    ledger.operator.change_settings({"trainer.lr": "0.5", "daemon.log_level": "DEBUG"}, unix_s=1.0)
    assert ledger.state.live.log_level == "DEBUG"
    ledger.trainer.start_training(incarnation=2, step=0, stream={}, settings=BASE)
    ledger.state.steps.current = 1
    assert lr_of(ledger, 1) == 0.5
    ledger.trainer.start_training(incarnation=3, step=0, stream={}, settings=BASE | {"trainer.lr": "0.25"})
    assert lr_of(ledger, 0) == 0.25
    ledger.state.steps.current = 1
    assert lr_of(ledger, 1) == 0.25
    capped = SETTINGS | {"max_staleness": 2}
    ledger.operator.change_settings({"max_staleness": "1"}, unix_s=1.0)
    after = recover(ledger_settings(**capped), store.copy(), now_s=0.0)
    assert after.state.bound.current == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"trainer.lr": "nan"}, "at least 0"),
        ({"trainer.lr": "-1"}, "at least 0"),
        ({"trainer.lr": "1" * 400}, "at least 0"),
        ({"max_staleness": "1" * 5000}, "whole number"),
        ({"max_staleness": "4"}, "started with 3"),
        ({"max_staleness": "auto"}, "started with 3"),
        ({"eval.interval": "0"}, "at least 1"),
        ({"daemon.log_level": "LOUD"}, "DEBUG"),
        ({"evaluate": "later"}, "evaluate=now"),
        ({"trainer.num_steps": "5"}, "only these can change"),
        ({"trainer.lr": "0.5", "model.path": "x"}, "only these can change"),
    ],
)
def test_a_mistake_changes_nothing(wanted: dict[str, str], message: str) -> None:
    ledger = started()
    rows = list(ledger.state.live.rows)
    with pytest.raises(RefusedError) as caught:
        ledger.operator.change_settings(wanted, unix_s=1.0)
    assert message in str(caught.value)
    assert ledger.state.live.rows == rows and ledger.state.bound.current == 3


def test_what_no_step_can_follow_is_refused() -> None:
    waiting = recover(ledger_settings(**SETTINGS), RowStore(), now_s=0.0)
    for wanted in ({"trainer.lr": "1"}, {"evaluate": "now"}, {"daemon.log_level": "INFO"}):
        with pytest.raises(RefusedError, match="no trainer has started yet"):
            waiting.operator.change_settings(wanted, unix_s=1.0)
    (change,) = waiting.operator.change_settings({"max_staleness": "2"}, unix_s=1.0)
    assert change.step == 0
    without = started(**{"eval.interval": "0"})
    for wanted in ({"evaluate": "now"}, {"eval.interval": "5"}):
        with pytest.raises(RefusedError, match="evaluations are off"):
            without.operator.change_settings(wanted, unix_s=1.0)
    last = started()
    last.state.steps.current = 99
    with pytest.raises(RefusedError, match="the last step has begun"):
        last.operator.change_settings({"trainer.lr": "1"}, unix_s=1.0)
    assert last.operator.change_settings({"checkpoint": "now"}, unix_s=1.0)[0].step == 99
    with pytest.raises(RefusedError, match="want a number"):
        recover(ledger_settings(**SETTINGS), RowStore(), now_s=0.0).trainer.start_training(
            incarnation=1, step=0, stream={}, settings={"trainer.lr": "x"}
        )


def test_settings_of_the_job_are_recorded_by_step() -> None:
    """Also those of a ledger of the release before, which has only the number of groups of all its steps."""

    def begun(store: RowStore, groups: int, *, incarnation: int, step: int) -> RowStore:
        settings = SETTINGS | {"groups_per_step": groups, "recorded": {GROUPS_PER_STEP: str(groups)}}
        ledger = recover(ledger_settings(**settings), store, now_s=0.0)
        ledger.trainer.start_training(incarnation=incarnation, step=step, stream={}, settings=BASE)
        return store.copy()

    def values(store: RowStore) -> list[tuple[int, str]]:
        rows = store.connection.execute(f"SELECT step, value FROM settings WHERE key = '{GROUPS_PER_STEP}'")
        return rows.fetchall()

    store = begun(RowStore(), 4, incarnation=1, step=0)
    assert values(store) == [(0, "4")]
    assert values(begun(store.copy(), 4, incarnation=2, step=0)) == [(0, "4")]
    assert values(begun(store.copy(), 8, incarnation=2, step=3)) == [(0, "4"), (3, "8")]
    store.connection.execute("DELETE FROM settings")
    assert values(begun(store.copy(), 8, incarnation=2, step=3)) == [(0, "4"), (3, "8")]
