"""The recording that a replay reads; tests/jobs/test_resumption.py replays that of a real job."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from areal_like.config.default_objective import default_objective
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config, save_config
from launch.audit.run import audit_run
from launch.commands.replay import run_replay
from launch.run_directory.open_run import open_replay
from tests.chaos.job import check_groups, running_job, train
from tests.support.closed_run import make_closed_run
from tests.support.full_state import gather_full_state
from tests.support.launching import TEST_LIMIT_S
from tests.support.moe_model import write_moe_model
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import VOCAB, write_model
from trainer.distributed.ranks import Ranks
from trainer.metrics.lag import LagTally
from trainer.models.policy import build_policy
from trainer.replay.recording import Recording
from trainer.replay.run import replay
from trainer.step.build import build_step_runner

NUM_STEPS = 3


def test_a_run_without_a_ledger_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        Recording(tmp_path)


def test_positions_of_parts_are_read_as_they_were_served(tmp_path: Path) -> None:
    root, served = make_closed_run(tmp_path)
    assert {bool(group.closed) for group in served} == {True, False}
    with closing(Recording(root)) as recording:
        for group in served:
            (again,) = recording.groups(group.step, range(group.position, group.position + 1))
            assert [record.data for record in again.records] == [record.data for record in group.records]
            assert replace(again, records=[]) == replace(group, records=[])
            prompts, rows = recording.sample_rows(group.step, group.position)
            assert [row.oldest_step for row in rows] == group.version_steps
            of_closed = {closed.ticket_id: closed.prompt_index for closed in group.closed}
            assert prompts == [of_closed.get(r.ticket_id, group.prompt_index) for r in group.records]
        num_samples = recording.num_groups().total() * len(served[0].records)
    with closing(sqlite3.connect(root / "ledger" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE segments SET retained = 0")
    with pytest.raises(ConfigError, match=f"{num_samples} trajectories"):
        Recording(root)


def test_a_replay_does_not_change_whether_groups_were_closed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave buffer\.overdue= out"):
        run_replay(tmp_path, ["buffer.overdue=wait"])


@pytest.mark.parametrize(
    ("own", "rule", "changed", "message"),
    [
        ([], "close", ["trainer.lr=0.5"], ""),
        ([], "close", ["objective={name: rebel}"], "buffer.overdue=close: objective.name=rebel needs whole"),
        ([], "close", ["objective=rebel"], "buffer.overdue=close: objective.name=rebel needs whole"),
        (["objective=vcpo"], "wait", ["objective.leave_one_out=true"], ""),
        (["objective=vcpo"], "wait", ["objective=tis"], ""),
        (["objective=tis", "objective.cap=3"], "close", ["objective=auto"], ""),
        (["objective=tis", "sampling.max_new_tokens=2048"], "close", ["objective.cap=3"], ""),
        (["max_staleness=8"], "close", ["weights.sync_interval=4"], ""),
        (["objective=vcpo"], "wait", ["staleness.beyond=cap"], "staleness.beyond=cap is for"),
    ],
)
def test_a_replay_keeps_the_rule_of_an_auto_run(
    own: list[str], rule: str, changed: list[str], message: str, tmp_path: Path
) -> None:
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    config = load_config([f"runs_dir={tmp_path}", "name=recorded", "buffer.overdue=auto", *own])
    assert config.overdue == rule
    save_config(config, recorded / "config.yaml")
    if message:
        with pytest.raises(ConfigError, match=message):
            open_replay(recorded, changed)
        assert [path.name for path in tmp_path.iterdir()] == ["recorded"]
        return
    run = open_replay(recorded, changed)
    run.close()
    assert run.config.buffer.overdue == rule and run.paths.root.name == "recorded-replay"
    if not any("objective" in setting for setting in changed):
        assert run.config.objective == config.resolved_objective, "also if it was recorded as the default"
    elif changed == ["objective.cap=3"]:
        assert run.config.objective == {"name": "tis", "cap": 3}, "of the recorded method"
    elif changed == ["objective=auto"]:
        assert run.config.objective == default_objective()


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("has_routes", [*only_in_chaos(False), True], ids=["dense", "routed"])
def test_replayed_conversations_give_the_same_weights(tmp_path: Path, has_routes: bool) -> None:
    """Half of the samples have segments, turns with rewards, and token rewards (tests/chaos/producer.py)."""
    if has_routes:
        model = write_moe_model(tmp_path / "policy", vocab_size=VOCAB)
    else:
        model = write_model(tmp_path / "policy", dtype=torch.float32)
    with running_job(
        tmp_path,
        model={"path": model, "router_replay": has_routes},
        advantage={"name": "grpo", "turn_discount": 0.9},
        trainer={"num_steps": NUM_STEPS, "groups_per_step": 4, "fetch_timeout_s": 600.0},
        buffer={"retain_trajectories": True},
    ) as job:
        job.produce("rollout-0", capacity=16, num_tokens=24)
        with job.trainer() as link:
            groups = train(link, first=0, last=NUM_STEPS)
    config, root = job.buffer.config, job.buffer.paths.root
    rates = [config.trainer.lr, 0.004, 0.002]
    with closing(sqlite3.connect(root / "ledger" / "ledger.sqlite3")) as ledger, ledger:
        ledger.executemany(
            "INSERT INTO settings VALUES (NULL, ?, 'trainer.lr', ?, 'operator', 0.0)",
            [(2, "0.5"), (1, "0.004"), (2, "0.002")],
        )
    check_groups(groups, config, first=0, last=NUM_STEPS)
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    ranks = Ranks.alone()
    try:
        policy = build_policy(config, model, ranks)
        runner = build_step_runner(config, policy, ranks, initial=model)
        for step in range(NUM_STEPS):
            lags = LagTally(config.staleness_cap)
            of_step = [lags.counted(group) for group in groups if group.step == step]
            runner.optimizer.lr = rates[step]
            metrics = runner.run(of_step, step=step)
            assert metrics["grad_norm"] > 0 and metrics["segments"] == 1.5 and metrics["turns"] == 2
            assert metrics["by_label"]["conversation"]["num_samples"] == 8
            if has_routes:
                assert metrics["router_disagreement"] > 0.5 and metrics["routes_missing"] == 0
        with closing(Recording(root)) as recording:
            assert recording.learning_rates() == [(2, 0.5), (1, 0.004), (2, 0.002)]
            again = replay(replace(config, name="again"), recording, ranks, stopping=threading.Event())
        for (name, ours), (_, theirs) in zip(
            gather_full_state(policy), gather_full_state(again.policy), strict=True
        ):
            assert torch.equal(ours, theirs), name
    finally:
        dist.destroy_process_group()
