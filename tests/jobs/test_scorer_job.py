"""A whole job whose reward is a reward model: its score server is killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from areal_like.paths import RunPaths, read_endpoint
from launch.audit.run import audit_run
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    launcher_log,
    wait_for_steps,
)
from tests.support.reward_models import write_reward_model

SETTINGS = (
    "name=x",
    "task={name: data, train: rows.jsonl, eval: rows.jsonl, gold_reward: exact,"
    " reward: {name: model, transform: sigmoid}}",
    "scorer.path=rm",
    "model.warm_start_steps=0",
    "sampling.max_new_tokens=4",
    "rollout.reward_concurrency=16",
    "rollout.reward_timeout_s=100",
    "trainer.num_steps=20",
    "trainer.groups_per_step=2",
    "eval.num_prompts=2",
    "buffer.retain_trajectories=true",
)


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_score_server_costs_no_sample(tmp_path: Path, cache: dict[str, str]) -> None:
    write_reward_model(tmp_path / "rm")
    rows = [{"question": f"{row:03}=", "answer": f"{row:03}"} for row in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = RunPaths(tmp_path / "runs" / "x")
    with launcher(*SETTINGS, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(0, paths.root, process=process)
        before = read_endpoint(paths.endpoints / "scorer-0.json")
        assert before is not None
        os.kill(int(before["pid"]), signal.SIGKILL)
        code, out, err = finish(process, paths.root)
    assert code == 0, out + err
    summary = json.loads(paths.summary.read_text())
    assert summary["tickets"]["trained"] == 40 and not summary["selection"].get("failures")
    assert audit_run(paths.root).is_clean
    notice = "scorer-0 ended (killed by SIGKILL): starting it again"
    assert any(line.startswith(notice) for line in launcher_log(paths.root))
    steps = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    for step in steps:
        (identity,) = (name for name in step["sample_metrics"] if name.startswith("model/scorer/"))
        assert identity == f"model/scorer/{before['model']}" and step["sample_metrics"][identity] == 1
        assert 0 < step["reward_mean"] < 1 and step["reward_gold_mean"] is not None
    replayed = areal_like("replay", "x", cwd=tmp_path, environment=cache)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    again = RunPaths(tmp_path / "runs" / "x-replay")
    rewards = [json.loads(line)["reward_mean"] for line in again.metrics.read_text().splitlines()]
    assert rewards == [step["reward_mean"] for step in steps]
    assert not list(again.logs.glob("scorer*")), "a replay asks no score server"
