"""`areal-like reward-model`, as a user runs it: killed and continued, on two ranks, on bad rows."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from areal_like.paths import RunPaths
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.offline import files_of, metrics_of
from tests.support.preferences import sorting_pairs
from tests.support.sft_model import write_rows, write_sft_model

NUM_STEPS = 100
"""So many that a killed run does not end before it is killed, on a slow machine either."""


@pytest.fixture
def settings(tmp_path: Path) -> Sequence[str]:
    write_sft_model(tmp_path / "model", template=None)
    write_rows(tmp_path / "train.jsonl", sorting_pairs(200, seed=1))
    write_rows(tmp_path / "eval.jsonl", sorting_pairs(20, seed=2))
    return (
        f"model.path={tmp_path}/model",
        f"reward_model={{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}",
        f"reward_model.num_steps={NUM_STEPS}",
        "reward_model.num_epochs=99",
        "reward_model.eval_interval=9",
        "trainer={lr: 0.001, warmup_steps: 2, checkpoint_interval: 7}",
    )


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_run_continues_to_the_last_bit(settings: Sequence[str], tmp_path: Path) -> None:
    whole = areal_like("reward-model", *settings, "name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    words = (*settings, "name=killed", "resume=auto")
    root = tmp_path / "runs" / "killed"
    with launcher(*words, cwd=tmp_path, verb="reward-model") as process:
        wait_for_steps(9, root, process=process)
        for pid in processes_of(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code, out, err = finish(process, root)
        assert code == 1, out + err
    wait_until(lambda: not processes_of(root), what="the end of the trainer")
    num_rows = len((root / "metrics.jsonl").read_text().splitlines())
    assert 9 < num_rows < NUM_STEPS
    done = areal_like("reward-model", *words, cwd=tmp_path)
    assert done.returncode == 0 and "resume of step" in done.stdout, done.stdout + done.stderr
    paths = [RunPaths(tmp_path / "runs" / name) for name in ("whole", "killed")]
    assert metrics_of(paths[0]) == metrics_of(paths[1])
    last = f"step_{NUM_STEPS:06d}"
    assert files_of(paths[0].checkpoints / last) == files_of(paths[1].checkpoints / last)
    assert done.stdout.splitlines()[-1] == f"model.path={paths[1].checkpoints / last}"
    other = areal_like("sft", "name=killed", "resume=latest", cwd=tmp_path)
    assert other.returncode == 2 and "is a run of `areal-like reward-model`" in other.stderr


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_two_ranks_learn_what_one_does(settings: Sequence[str], tmp_path: Path) -> None:
    few = (*settings, "reward_model.num_steps=6", "trainer.checkpoint_interval=6")
    models, losses = [], []
    for world_size in (1, 2):
        name = f"ranks-{world_size}"
        words = (*few, f"name={name}", f"trainer.world_size={world_size}", "sft.batch_rows=3")
        done = areal_like("reward-model", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sft.batch_rows=3 has no effect: it belongs to `areal-like sft`" in done.stdout
        paths = RunPaths(tmp_path / "runs" / name)
        models.append(load_file(paths.checkpoints / "step_000006" / "model.safetensors"))
        rows = metrics_of(paths)
        losses.append([row["loss"] for row in rows] + [rows[-1]["eval_ece"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, tensor in models[0].items():
        assert tensor.allclose(models[1][name], atol=2e-6), name


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_row_that_cannot_be_used_is_named(settings: Sequence[str], tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "2"}
    source = write_rows(tmp_path / "broken.jsonl", [*sorting_pairs(3, seed=1), row])
    words = (*settings, f"reward_model.train={source}", "trainer.world_size=2")
    done = areal_like("reward-model", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "broken.jsonl:4: `chosen` and `rejected` are equal" in done.stdout + done.stderr
    named = areal_like("reward-model", *settings, "trainer.num_steps=3", cwd=tmp_path)
    assert named.returncode == 2
    assert "here this is reward_model.num_epochs or reward_model.num_steps" in named.stderr
