"""A whole job in which an operator changes settings, loses the trainer right after, resumes, and replays."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.jobs.test_resumption import SMALL, command, pid_of, query, rows_of
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    num_steps_done,
    wait_for_steps,
    wait_until,
)

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.chaos]
SETTINGS = (
    *SMALL,
    "eval.num_prompts=4",
    "eval.interval=100000",
    "trainer.num_steps=100000",
    "trainer.world_size=2",
    "trainer.checkpoint_interval=100000",
    "trainer.keep_checkpoints=9",
    "trainer.lr=0.001",
    "trainer.lr_schedule=constant",
    "buffer.retain_trajectories=true",
)
WANTED = {
    "trainer.lr": "0.003",
    "max_staleness": "1",
    "daemon.log_level": "DEBUG",
    "checkpoint": "now",
    "evaluate": "now",
}


@pytest.mark.parametrize("num_shards", [1, 2])
def test_changes_hold_by_step_in_every_later_life(
    tmp_path: Path, cache: dict[str, str], num_shards: int
) -> None:
    root = tmp_path / "runs" / "x"
    shards = f"buffer.num_shards={num_shards}"
    with launcher(*SETTINGS, shards, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(3, root, process=process)
        words = [f"{key}={value}" for key, value in WANTED.items()]
        out = command("set", "x", *words, cwd=tmp_path)
        changed = int(re.search(r"trainer\.lr=0\.003 from step (\d+) on \(before: 0\.001\)", out)[1])  # type: ignore[index]
        asked = int(re.search(r"checkpoint: after step (\d+)", out)[1])  # type: ignore[index]
        assert changed == asked + 1
        wait_until(
            (root / "checkpoints" / f"step_{asked + 1:06d}").exists,
            what="the checkpoint",
            run_root=root,
            process=process,
        )
        wait_for_steps(changed + 2, root, process=process)
        os.kill(pid_of(root, "-m trainer "), signal.SIGKILL)
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        refused = areal_like("set", "x", "trainer.lr=0.5", "trainer.num_steps=7", cwd=tmp_path)
        assert refused.returncode == 2 and "only these can change during the run" in refused.stderr
        shown = command("status", "x", cwd=tmp_path)
        assert f"from step {changed} on: trainer.lr=0.003" in shown, shown
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    resumed = num_steps_done(root)
    settings = ("name=x", "resume=latest", "trainer.lr=0.0005", f"trainer.num_steps={resumed + 3}")
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err

    rows = rows_of(root)
    lrs = [0.001] * changed + [0.003] * (resumed - changed) + [0.0005] * 3
    assert [row["lr_base"] for row in rows] == lrs
    assert [row["max_staleness"] for row in rows] == [2.0] * changed + [1.0] * (len(rows) - changed)
    evaluated = [json.loads(line)["step"] for line in (root / "evaluations.jsonl").read_text().splitlines()]
    assert evaluated == [0, asked + 1, resumed + 3]
    if num_shards == 1:
        rollbacks = query(root, "SELECT to_step FROM rollbacks")
        assert rollbacks[0] == (asked + 1,), "it began at another checkpoint"
    buffers = ("buffer",) if num_shards == 1 else ("buffer-0", "buffer-1")
    for daemon in ("trainer-0", "trainer-1", "rollout-0", *buffers):
        assert "the log level is now DEBUG" in (root / "logs" / f"{daemon}.log").read_text(), daemon
    audit = json.loads(command("audit", "x", "--json", cwd=tmp_path))
    checked = {check["text"]: check["num_checked"] for check in audit["checks"]}
    assert checked["every step was trained with the settings that were in force"] == 2 * len(rows)
    saved = f"{asked + 1}, {resumed}, {len(rows)}"
    assert f"weights after step {saved}: equal to the recorded run's, to the last bit" in command(
        "replay", "x", "trainer.checkpoint_interval=1", "trainer.keep_checkpoints=1000", cwd=tmp_path
    )
