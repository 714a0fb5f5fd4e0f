"""Servers and runs that an operator holds back: no new leases, across restarts, and nothing is lost."""

from pathlib import Path

import pytest

from areal_like.errors import RefusedError
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.recovery import recover
from buffer.tickets import Verdict
from tests.support.buffer_harness import running_buffer
from tests.support.launching import areal_like
from tests.support.ledger_simulation import add_server, beat, deliver, done, ledger_settings, new_ledger
from tests.support.row_store import RowStore


def test_a_cordoned_server_finishes_what_it_holds() -> None:
    ledger = new_ledger(max_staleness=9, num_steps=10)
    for name in ("a", "b"):
        add_server(ledger, name, capacity=4)
    held = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert ledger.operator.set_cordoned("a", True, unix_s=1.0) and not ledger.operator.set_cordoned(
        "a", True, unix_s=2.0
    )
    for lease in held:
        for index in lease.sample_indices:
            assert deliver(ledger, "a", done(lease, index, [0])) is Verdict.ACCEPTED
    for name in ("a", "b"):
        beat(ledger, name, capacity=4)
    assert set(ledger.dispatcher.grant(now_s=0.0)) <= {"b"}
    ledger.dispatcher.remove_server("a")
    add_server(ledger, "a", capacity=4, incarnation=2)
    assert "a" not in ledger.dispatcher.grant(now_s=0.0), "its next process is cordoned too"
    assert ledger.operator.set_cordoned("a", False, unix_s=3.0)
    assert "a" in ledger.dispatcher.grant(now_s=0.0)


def test_a_paused_run_grants_evaluations_only() -> None:
    store = RowStore()
    ledger = new_ledger(store=store, durable=True)
    add_server(ledger, "a", capacity=4)
    assert ledger.operator.set_paused(True, unix_s=1.0) and not ledger.operator.set_paused(True, unix_s=1.0)
    assert ledger.dispatcher.grant(now_s=0.0) == {}
    ledger.trainer.request_eval(eval_id=1, eval_set="held-out", num_prompts=1, num_samples=1, min_version=0)
    (leases,) = ledger.dispatcher.grant(now_s=0.0).values()
    assert {lease.purpose for lease in leases} == {Purpose.EVAL}
    ledger.operator.set_cordoned("b", True, unix_s=2.0)
    next_store = store.copy()
    after = recover(ledger_settings(durable=True), next_store, now_s=0.0)
    assert after.state.holds.is_paused and after.state.holds.cordoned == {"b"}
    rows = next_store.connection.execute("SELECT verb, subject FROM operations ORDER BY rowid").fetchall()
    assert [tuple(row) for row in rows] == [("pause", "training"), ("cordon", "b")]


def test_a_changed_bound_holds_for_tickets_that_begin() -> None:
    store = RowStore()
    settings: dict[str, object] = {"max_staleness": 3, "num_steps": 10, "durable": True}
    ledger = new_ledger(store=store, **settings)
    add_server(ledger, "a", capacity=4)
    (begun,) = {
        ledger.state.tickets.live[lease.ticket_id].max_staleness
        for lease in ledger.dispatcher.grant(now_s=0.0)["a"]
    }
    (change,) = ledger.operator.change_settings({"max_staleness": "1"}, unix_s=1.0)
    assert (change.before, change.value, change.step, begun) == ("3", "1", 1, 3)
    beat(ledger, "a", capacity=64)
    for lease in ledger.dispatcher.grant(now_s=0.0).get("a", []):
        assert ledger.state.tickets.live[lease.ticket_id].max_staleness == 1
    for wrong in (-1, 4):
        with pytest.raises(RefusedError):
            ledger.operator.change_settings({"max_staleness": str(wrong)}, unix_s=2.0)
    assert recover(ledger_settings(**settings), store.copy(), now_s=0.0).state.bound.current == 1
    other = settings | {"max_staleness": 2}
    assert recover(ledger_settings(**other), store.copy(), now_s=0.0).state.bound.current == 2
    with pytest.raises(RefusedError, match="auto"):
        new_ledger(adaptive=True).operator.change_settings({"max_staleness": "1"}, unix_s=1.0)


def test_commands_hold_back_and_let_go(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:
        buffer.produce("rollout-0")
        buffer.wait_status(lambda status: any(peer["name"] == "rollout-0" for peer in status["peers"]))
        for verb, said in (
            (("cordon", "job", "rollout-0"), "gets no new leases\n"),
            (("cordon", "job", "rollout-0"), "gets no new leases, as before\n"),
            (("pause", "job"), "no new ones begin\n"),
        ):
            done = areal_like(*verb, cwd=tmp_path)
            assert done.returncode == 0 and done.stdout.endswith(said), done
        status = buffer.status()
        assert status["paused"] and status["cordoned"] == ["rollout-0"]
        shown = areal_like("status", "job", cwd=tmp_path).stdout
        assert "paused by an operator" in shown and "cordoned: rollout-0" in shown, shown
        assert "trained and saved 0" in shown, shown
        done = areal_like("cordon", "job", "trainer", cwd=tmp_path)
        assert done.returncode == 2
        assert "'trainer' is not a registered rollout server (registered: rollout-0)" in done.stderr, done
        for verb in (("uncordon", "job", "rollout-0"), ("resume", "job")):
            assert areal_like(*verb, cwd=tmp_path).returncode == 0
        done = areal_like("set", "job", "max_staleness=0", cwd=tmp_path)
        assert done.stdout == "max_staleness=0 from step 0 on (before: 1)\n", done
        for wrong in ("max_staleness=2", "trainer.lr=1", "max_staleness", "evaluate=now", "model.path=x"):
            assert areal_like("set", "job", wrong, cwd=tmp_path).returncode == 2
        status = buffer.status()
        assert status["max_staleness"] == 0
        assert not status["paused"] and not status["cordoned"]
