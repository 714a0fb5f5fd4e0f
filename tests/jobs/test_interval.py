"""Sync intervals (OAPL): weights are pushed every I steps; each interval trains on samples of one version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config
from areal_like.wire.messages.producer import Lease
from buffer.ledger.ledger import Ledger
from buffer.scheduling.staleness import StalenessBound
from buffer.settings import LedgerSettings
from buffer.tickets import Drop, State
from tests.support.buffer_harness import BufferProcess, job
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S, finish, launcher
from tests.support.ledger_simulation import (
    SimulatedJob,
    SimulatedServer,
    add_server,
    beat,
    deliver,
    done,
    failed,
    new_ledger,
)
from tests.support.trainer_helpers import write_model
from tests.trainer.test_daemon import trainer

INTERVAL = 3


def interval_ledger(**settings: object) -> Ledger:
    """Intervals of three steps of one group of two samples."""
    defaults: dict[str, object] = {"max_staleness": 4, "groups_per_step": 1, "num_steps": 12}
    return new_ledger(**(defaults | {"sync_interval": INTERVAL, "group_filter": "single_version"} | settings))


def deliver_lease(ledger: Ledger, lease: Lease, *, version: int = 0) -> None:
    """Delivers a whole lease of server "a"."""
    for index in lease.sample_indices:
        deliver(ledger, "a", done(lease, index, [version], reward=float(index)))


def grant(ledger: Ledger) -> list[Lease]:
    """The leases that server "a" gets now."""
    return ledger.dispatcher.grant(now_s=0.0).get("a", [])


def test_a_group_has_a_deadline_within_bound_and_interval() -> None:
    every_step, by_three = StalenessBound(4, sync_interval=1), StalenessBound(4, sync_interval=3)
    assert [every_step.deadline(floor, max_staleness=4) for floor in range(4)] == [4, 5, 6, 7]
    assert [by_three.deadline(floor, max_staleness=4) for floor in range(7)] == [2, 2, 2, 5, 5, 5, 8]
    assert [by_three.deadline(floor, max_staleness=1) for floor in range(4)] == [1, 2, 2, 4]


def test_an_interval_admits_only_the_groups_of_its_steps() -> None:
    ledger = interval_ledger(max_sample_retries=0)
    add_server(ledger, "a", capacity=100)
    leases = grant(ledger)
    assert len(leases) == INTERVAL, "(0 + 1) * I * B = 3, although the staleness bound of 4 would allow five"
    ledger.intake.sample_failed("a", failed(leases[0], 0))
    (replacement,) = grant(ledger)
    for lease in (*leases[1:], replacement):
        deliver_lease(ledger, lease)
    for step in range(INTERVAL):
        assert grant(ledger) == [], "the next groups are sampled with the next interval's weights"
        ledger.trainer.complete_step(incarnation=1, step=step)
    assert grant(ledger) == []
    beat(ledger, "a", capacity=100, version=ledger.trainer.alloc_version(incarnation=1, step=INTERVAL))
    assert len(grant(ledger)) == INTERVAL
    assert ledger.state.drops == {Drop.FAILED: 1}


def test_a_group_of_an_earlier_interval_is_dropped_and_retried() -> None:
    """An engine that was restarted with the first weights delivers a group whose interval is over.

    The group is dropped, although it is within the staleness bound of 4.
    """
    ledger = interval_ledger()
    add_server(ledger, "a", capacity=100)
    for lease in grant(ledger):
        deliver_lease(ledger, lease)
    for step in range(INTERVAL):
        ledger.trainer.complete_step(incarnation=1, step=step)
    version = ledger.trainer.alloc_version(incarnation=1, step=INTERVAL)
    beat(ledger, "a", capacity=100, version=version)
    late, *others = grant(ledger)
    deliver(ledger, "a", done(late, 0, [0]))
    assert ledger.state.drops == {Drop.INTERVAL: 1}
    assert ledger.state.leases.take_aborts() == {"a": [late.lease_id]}, "its other sample is of no use"
    (again,) = grant(ledger)
    assert again.prompt_index == late.prompt_index
    for lease in (again, *others):
        deliver_lease(ledger, lease, version=version)
    counts = ledger.state.tickets.num_by_state()
    assert counts[State.BATCHED] + counts[State.READY] == 2 * INTERVAL, "both intervals are full"


def test_a_group_of_mixed_weights_is_refused_with_a_reason() -> None:
    ledger = interval_ledger()
    add_server(ledger, "a", capacity=100)
    first, second, _ = grant(ledger)
    again = ledger.trainer.alloc_version(incarnation=1, step=0)
    other = ledger.trainer.alloc_version(incarnation=1, step=0)
    deliver(ledger, "a", done(first, 0, [again]))
    deliver(ledger, "a", done(first, 1, [again, other]))
    assert ledger.state.tickets.num_by_state()[State.BATCHED] == 1, (
        "the same weights under two versions, pushed again for a server that joined late"
    )
    deliver(ledger, "a", done(second, 0, [0]))
    deliver(ledger, "a", done(second, 1, [0, again]))
    assert ledger.state.drops == {Drop.REJECTED: 1}
    for part in (
        f"ticket {second.ticket_id}",
        f"versions 0, 0-{again}",
        "weights.update_mode=drain",
        "weights.sync_interval",
    ):
        assert part in ledger.intake.last_rejection


@dataclass
class DrainingJob(SimulatedJob):
    """Pushes only at the end of an interval and only into idle engines: every sequence has one version."""

    interval: int = 1
    versions_trained: list[tuple[int, set[int]]] = field(default_factory=list)

    def _finish(
        self, server: SimulatedServer, lease: Lease, index: int, first_version: int, num_tokens: int
    ) -> None:
        assert server.version == first_version, "a drain lets sequences end before the weights change"
        super()._finish(server, lease, index, first_version, num_tokens)

    def _end_step(self, step: int) -> None:
        ledger = self.ledger
        groups = [
            ledger.trainer.fetch(step=step, position=position)
            for position in range(ledger.settings.groups_per_step)
        ]
        self.versions_trained.append(
            (step, {t.oldest_version for group in groups if group for t in group.trajectories})
        )
        ledger.trainer.complete_step(incarnation=1, step=step)
        if (step + 1) % self.interval == 0:
            version = ledger.trainer.alloc_version(incarnation=1, step=step + 1)
            for server in self.servers:
                self.at(self.push_s, self._drained(server, version))
        ledger.trainer.commit(incarnation=1, step=step)
        if step + 1 < ledger.settings.num_steps:
            self._start_step()

    def _drained(self, server: SimulatedServer, version: int) -> Callable[[], None]:
        def push() -> None:
            if server.running:
                self.at(0.05, push)
            else:
                self._push(server, version)

        return push


@pytest.mark.parametrize("step_s", [0.2, 4.0])
@pytest.mark.parametrize("fail_probability", [0.0, 0.05])
def test_every_interval_is_trained_on_its_own_version(step_s: float, fail_probability: float) -> None:
    ledger = new_ledger(
        max_staleness=4,
        sync_interval=4,
        group_filter="single_version",
        groups_per_step=8,
        group_size=4,
        num_steps=26,
        max_sample_retries=1,
    )
    servers = [
        SimulatedServer(name="fast", tokens_per_s=100, max_running=24, capacity=32),
        SimulatedServer(name="slow", tokens_per_s=20, max_running=12, capacity=16),
    ]
    simulation = DrainingJob(
        ledger=ledger, servers=servers, step_s=step_s, fail_probability=fail_probability, interval=4
    )
    simulation.run()
    assert simulation.versions_trained == [(step, {step // 4}) for step in range(26)], (
        "interval n has version n"
    )
    assert set(ledger.state.counters.lag_histogram) == {0, 1, 2, 3}
    counts = ledger.state.tickets.num_by_state()
    assert (
        counts[State.TRAINED] == 26 * 8
        and counts[State.TRAINED] + counts[State.DROPPED] == ledger.state.tickets.num_issued
    )
    assert set(ledger.state.drops) <= {Drop.FAILED}, "a sync must not drop groups"
    assert bool(ledger.state.drops) == bool(fail_probability)
    assert ledger.state.store.num_bytes == 0


# --- settings ---


def test_the_oapl_preset_sets_all_it_needs_and_can_be_changed() -> None:
    config = load_config(["objective=oapl", "objective.beta2=0.2", "weights.sync_interval=5"])
    assert (config.objective["name"], config.objective["beta2"]) == ("oapl", 0.2)
    assert (config.weights.update_mode, config.weights.sync_interval, config.buffer.group_filter) == (
        "drain",
        5,
        "single_version",
    )
    assert LedgerSettings.from_config(config).sync_interval == 5
    anywhere = load_config(["weights.sync_interval=3"])
    assert LedgerSettings.from_config(anywhere).sync_interval == 1, (
        "where groups may span a push, the interval only makes pushes rarer"
    )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["weights.sync_interval=6"], ["weights.sync_interval=6", "max_staleness to at least 5"]),
        (["objective=oapl", "max_staleness=2"], ["weights.sync_interval=4", "max_staleness=2"]),
        (
            ["objective=oapl", "weights.update_mode=recompute"],
            ["buffer.group_filter=single_version", "weights.update_mode=drain"],
        ),
        (["objective=oapl", "max_staleness=auto"], ["weights.sync_interval=4", "max_staleness a number"]),
        (["weights.sync_interval=0"], ["weights.sync_interval must be at least 1"]),
    ],
)
def test_a_contradiction_names_both_keys(settings: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- with the real daemons ---


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_trainer_refuses_oapl_on_groups_of_mixed_versions(tmp_path: Path) -> None:
    buffer = BufferProcess(
        job(tmp_path, model={"path": write_model(tmp_path / "model")}, objective={"name": "oapl"})
    )
    try:
        with trainer(buffer) as process:
            _, err = process.communicate(timeout=WAIT_LIMIT_S)
            assert process.returncode not in (None, 0)
            assert "buffer.group_filter=single_version" in err and "objective=oapl" in err
    finally:
        buffer.close()


SMALL = (
    "name=x",
    "model.warm_start_steps=20",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "eval.num_prompts=8",
    "rollout.max_running=16",
)


def run_job(
    tmp_path: Path, cache: dict[str, str], *settings: str
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """(rows of metrics.jsonl, summary.json) of a whole job."""
    root = tmp_path / "runs" / "x"
    with launcher(*SMALL, *settings, cwd=tmp_path, environment=cache) as process:
        code, _, err = finish(process, root)
        assert code == 0, err
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((root / "summary.json").read_text())


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_oapl_runs_by_its_name_alone(tmp_path: Path, cache: dict[str, str]) -> None:
    rows, summary = run_job(tmp_path, cache, "objective=oapl", "trainer.num_steps=10")
    assert [row["lag_max"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert summary["weights_version"] == 3, "after steps 4 and 8, and after the last"
    assert summary["drops"] == dict.fromkeys(Drop, 0)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(TEST_LIMIT_S)
def test_an_automatic_bound_moves_and_survives_a_resume(tmp_path: Path, cache: dict[str, str]) -> None:
    # With an entropy bonus, groups without spread are trained as well. Without any training a step has no
    # ESS.
    auto = (
        "max_staleness=auto",
        "max_staleness_cap=2",
        "ess_target=0.05",
        "eval.num_prompts=0",
        "trainer.entropy_coef=1e-6",
        "weights.check_interval_s=0",
    )
    rows, summary = run_job(tmp_path, cache, *auto, "trainer.num_steps=22")
    assert [row["max_staleness"] for row in rows[:8]] == [0] * 8
    assert [row["lag_max"] for row in rows[:8]] == [0] * 8
    assert rows[12]["max_staleness"] == 1
    assert max(row["lag_max"] for row in rows) <= 2  # type: ignore[type-var]
    assert summary["drops"] == dict.fromkeys(Drop, 0)
    # Every step also runs a forward: its log-probs are the engine's after the push before it.
    assert 0 < max(row.get("weight_check_abs", 0.0) for row in rows) < 1e-4  # type: ignore[type-var, operator]
    rows, _ = run_job(tmp_path, cache, "resume=latest", "trainer.num_steps=24")
    assert rows[22]["max_staleness"] == rows[21]["max_staleness"], "not from 0 again"
