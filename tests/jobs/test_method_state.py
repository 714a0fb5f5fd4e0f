"""Whole jobs whose trainer is killed and goes on with what its method remembers of earlier steps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launch.audit.run import audit_run
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    processes_of,
    wait_for_steps,
)
from trainer.models.tiny import build_tiny_model

SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "trainer.groups_per_step=16",
    "trainer.num_steps=12",
    "trainer.checkpoint_interval=4",
    "eval.num_prompts=0",
    "max_staleness=2",
    "buffer.retain_trajectories=true",
)


AVERAGED = (
    "advantage=running",
    "objective=ppo_ewma",
    "objective.clip=0.001",
    "objective.masks=[{name: kpop}]",
)
MEASURED = ("objective=vcpo", "objective.norms=proxy", "objective.rho_ref=measured", "sampling.group_size=4")


TAUGHT = ("objective=distill", "trainer.lr=1e-3")
IMPLICIT = (
    "advantage=prime",
    "advantage.beta=0.5",
    "task._target_=tests.support.rollout_tasks.Stepped",
    "sampling.group_size=4",
)


def killed_and_replayed(
    tmp_path: Path, cache: dict[str, str], *method: str
) -> tuple[Path, list[dict[str, Any]]]:
    """Runs a job whose trainer is killed after step 5, and compares it with its replay.

    Returns (the last checkpoint, the rows of the steps).
    """
    root = tmp_path / "runs" / "x"
    settings = {word.split("=")[0]: word for word in (*SETTINGS, *method)}  # those of the method win
    with launcher(*settings.values(), cwd=tmp_path, environment=cache) as process:
        wait_for_steps(5, root, process=process)
        os.kill(
            next(pid for pid, words in processes_of(root).items() if "-m trainer" in words), signal.SIGKILL
        )
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert "trainer ended (killed by SIGKILL): starting it again" in out
    for words in (("replay", "x"), ("replay", "x", "--against", "x-replay")):
        run = areal_like(*words, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
    assert "no difference" in run.stdout
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return root / "checkpoints" / "step_000012", rows


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_trainer_keeps_what_it_remembers(tmp_path: Path, cache: dict[str, str]) -> None:
    checkpoint, rows = killed_and_replayed(tmp_path, cache, *AVERAGED)
    state = json.loads((checkpoint / "trainer_state.json").read_text())["extra"]
    total, weight = state["advantage_state"]
    assert weight == pytest.approx(sum(0.95**i for i in range(12))) and 0 < total < weight
    index = json.loads((checkpoint / "rows" / "index.json").read_text())
    assert index["models"]["proximal"]["num_updates"] == 12
    assert max(row["clipped_fraction"] for row in rows) > 0, "the clip acts around the averaged policy"


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_trainer_keeps_its_measured_reference(tmp_path: Path, cache: dict[str, str]) -> None:
    checkpoint, rows = killed_and_replayed(tmp_path, cache, *MEASURED)
    mean, total = json.loads((checkpoint / "trainer_state.json").read_text())["extra"]["objective_state"]
    assert rows[-1]["rho_ref"] == mean / total and 0 < total < 1
    assert all(0.99 < row["rho_ref"] <= 1 for row in rows), "engine and trainer hardly differ in float32"


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_trainer_has_the_same_teacher(tmp_path: Path, cache: dict[str, str]) -> None:
    build_tiny_model(tmp_path / "teacher", seed=1, warm_start_steps=0, swap_prob=0.0)
    teacher = f"distill.teachers.default={tmp_path / 'teacher'}"
    _, rows = killed_and_replayed(tmp_path, cache, *TAUGHT, teacher)
    assert all(row["teacher_share"] == 1 for row in rows)
    # The last one may be below 0: it is an estimate from the sampled tokens.
    assert rows[-1]["reverse_kl"] < rows[0]["reverse_kl"]


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_trainer_keeps_its_process_reward_model(tmp_path: Path, cache: dict[str, str]) -> None:
    checkpoint, rows = killed_and_replayed(tmp_path, cache, *IMPLICIT)
    assert (checkpoint / "rows" / "prm-00000-of-00001.safetensors").exists()
    assert rows[0]["prm_reward_mean"] == 0 and all(row["prm_reward_mean"] != 0 for row in rows[1:])
    assert audit_run(tmp_path / "runs" / "x").is_clean
