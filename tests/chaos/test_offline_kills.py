"""Trainings on rows whose launcher, and two ranks, are killed in turn: they continue to the last bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from areal_like.paths import RunPaths
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.offline import files_of, metrics_of
from tests.support.preference_rows import sum_pairs
from tests.support.sft_model import addition_rows, write_rows, write_sft_model

NUM_STEPS = 200
KINDS = {
    "sft": ("sft", "sft"),
    "reward-model": ("reward-model", "reward_model"),
    "dpo": ("preferences", "preferences"),
    "kto": ("preferences", "preferences"),
    "orpo": ("preferences", "preferences"),
}
"""Kind -> (verb, section)."""
LAUNCHER, RANKS = "launcher", ("RANK=1", "RANK=0")
"""Victims; a rank is found by its environment."""


def settings_of(kind: str, folder: Path) -> Sequence[str]:
    _, section = KINDS[kind]
    write_sft_model(folder / "model")
    rows = addition_rows("text", 150, seed=1) if kind == "sft" else sum_pairs(150, seed=1)
    write_rows(folder / "train.jsonl", rows)
    return (
        f"model.path={folder}/model",
        f"{section}={{train: {folder}/train.jsonl, batch_rows: 8, num_steps: {NUM_STEPS}, num_epochs: 99}}",
        *([f"preferences.method={kind}"] if section == "preferences" else []),
        "trainer={lr: 0.001, warmup_steps: 2, checkpoint_interval: 7, world_size: 2}",
    )


def rank_of(root: Path, variable: str) -> int:
    """The process of the run with this variable."""
    (pid,) = (
        pid
        for pid in processes_of(root)
        if variable.encode() in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    )
    return pid


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_continues_to_the_last_bit(kind: str, tmp_path: Path, cache: dict[str, str]) -> None:
    verb, _ = KINDS[kind]
    settings = settings_of(kind, tmp_path)
    whole = areal_like(verb, *settings, "name=whole", cwd=tmp_path, environment=cache)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    root, words = tmp_path / "runs" / "killed", (*settings, "name=killed", "resume=auto")
    for victim in (LAUNCHER, *RANKS):
        before = num_steps_done(root)
        with launcher(*words, cwd=tmp_path, environment=cache, verb=verb) as process:
            wait_for_steps(before + 10, root, process=process)
            if victim == LAUNCHER:
                process.kill()
            else:
                os.kill(rank_of(root, victim), signal.SIGKILL)
                code, out, err = finish(process, root)
                assert code == 1, out + err
            wait_until(lambda: not processes_of(root), what="the end of all ranks", run_root=root)
        assert before < num_steps_done(root) < NUM_STEPS, "the run was over too early: raise NUM_STEPS"
    done = areal_like(verb, *words, cwd=tmp_path, environment=cache)
    assert done.returncode == 0 and "resume of step" in done.stdout, done.stdout + done.stderr
    paths = [RunPaths(tmp_path / "runs" / name) for name in ("whole", "killed")]
    assert metrics_of(paths[0]) == metrics_of(paths[1])
    last = f"step_{NUM_STEPS:06d}"
    # torch seeds each process at random; the run draws nothing from that state.
    whole_files, files = (
        {name: data for name, data in files_of(each.checkpoints / last).items() if "random_state" not in name}
        for each in paths
    )
    assert files == whole_files and "model.safetensors" in files
