"""A real job, then the same training again from its recording: to the last bit with its own settings, differently with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config
from tests.support.launching import areal_like
from trainer.replay.recording import Recording

pytestmark = [pytest.mark.timeout(480), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "trainer.num_steps=6",
    "trainer.checkpoint_interval=3",
    "eval.num_prompts=0",
    "max_staleness=2",
)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_replay_gives_the_same_weights_and_another_objective_others(
    tmp_path: Path, cache: dict[str, str]
) -> None:
    ran = areal_like("run", *SMALL, "buffer.retain_trajectories=true", cwd=tmp_path, environment=cache)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    same = areal_like("replay", "x", cwd=tmp_path, environment=cache)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "weights after step 3, 6: equal to those of the run, to the last bit" in same.stdout
    moved = [row["grad_norm"] for row in rows(tmp_path / "runs" / "x")]
    assert min(moved) > 0, "equal weights prove nothing where nothing was learned"
    original, replayed = rows(tmp_path / "runs" / "x"), rows(tmp_path / "runs" / "x-replay")
    assert [row["loss"] for row in replayed] == [row["loss"] for row in original]
    assert [row["lag_mean"] for row in replayed] == [row["lag_mean"] for row in original]

    other = areal_like(
        "replay", "x", "objective=ppo", "buffer.cache_bytes=0", cwd=tmp_path, environment=cache
    )
    assert other.returncode == 0, other.stdout + other.stderr
    assert (
        "weights after step 3, 6: not those of the run" in other.stdout
        and "buffer.cache_bytes=0 has no effect" in other.stdout
    )
    assert [row["reward_mean"] for row in rows(tmp_path / "runs" / "x-replay-2")] == [
        row["reward_mean"] for row in original
    ]

    recording = Recording(tmp_path / "runs" / "x")
    config = load_config(["--config", str(tmp_path / "runs" / "x" / "config.yaml")])
    assert recording.num_whole_steps(groups_per_step=config.trainer.groups_per_step) == 6
    recording.close()
    wider = areal_like("replay", "x", "trainer.groups_per_step=8", cwd=tmp_path, environment=cache)
    assert (wider.returncode, wider.stderr.count("\n")) == (
        2,
        1,
    ) and "no whole step of 8 groups" in wider.stderr


def test_where_no_ledger_is_nothing_can_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        Recording(tmp_path)
