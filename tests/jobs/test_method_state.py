"""A whole job whose trainer is killed and goes on with its running baseline and averaged policy."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    processes_of,
    wait_for_steps,
)

SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "advantage=running",
    "objective=ppo_ewma",
    "objective.clip=0.001",
    "objective.masks=[{name: kpop}]",
    "trainer.groups_per_step=16",
    "trainer.num_steps=12",
    "trainer.checkpoint_interval=4",
    "eval.num_prompts=0",
    "max_staleness=2",
    "buffer.retain_trajectories=true",
)


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_trainer_keeps_what_it_remembers(tmp_path: Path, cache: dict[str, str]) -> None:
    root = tmp_path / "runs" / "x"
    with launcher(*SETTINGS, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(5, root, process=process)
        os.kill(
            next(pid for pid, words in processes_of(root).items() if "-m trainer" in words), signal.SIGKILL
        )
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert "trainer ended (killed by SIGKILL): starting it again" in out
    state = json.loads((root / "checkpoints" / "step_000012" / "trainer_state.json").read_text())["extra"]
    total, weight = state["advantage_state"]
    assert weight == pytest.approx(sum(0.95**i for i in range(12))) and 0 < total < weight
    index = json.loads((root / "checkpoints" / "step_000012" / "rows" / "index.json").read_text())
    assert index["models"]["proximal"]["num_updates"] == 12
    for words in (("replay", "x"), ("replay", "x", "--against", "x-replay")):
        run = areal_like(*words, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
    assert "no difference" in run.stdout
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert max(row["clipped_fraction"] for row in rows) > 0, "the clip acts around the averaged policy"
