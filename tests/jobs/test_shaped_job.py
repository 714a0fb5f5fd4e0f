"""A job whose trainer has context groups and replicas: it survives the loss of a rank, is resumed in other
shapes, and its replay is that of one rank."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.jobs.test_lora_job import SMALL
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    processes_of,
    wait_for_steps,
)


def words_of(world_size: int, size: int, replicas: int) -> tuple[str, ...]:
    return (
        f"trainer.world_size={world_size}",
        f"trainer.context_parallel={size}",
        f"trainer.replicas={replicas}",
    )


def rank_of(root: Path, rank: int) -> int:
    """Process id of a rank of the trainer."""
    for pid, words in processes_of(root).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if "-m trainer" in words and f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_job_with_context_groups_and_replicas(tmp_path: Path, cache: dict[str, str]) -> None:
    """Two replicas whose ranks are a context of two, then two data ranks with contexts, then one rank."""
    job = [
        *("name=x", "resume=auto"),
        *(word for word in SMALL if not word.startswith("trainer.num_steps")),
    ]
    root = tmp_path / "runs" / "x"
    first = (*job, "trainer.num_steps=8", *words_of(4, 2, 2))
    with launcher(*first, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(2, root, process=process)
        os.kill(rank_of(root, 3), signal.SIGKILL)
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert "trainer ended (exit code 137): starting it again" in out
    for num_steps, shape in ((10, (4, 2, 1)), (12, (1, 1, 1))):
        words = ("run", *job, f"trainer.num_steps={num_steps}", *words_of(*shape))
        done = areal_like(*words, cwd=tmp_path, environment=cache)
        assert done.returncode == 0, done.stdout + done.stderr
    assert audit_run(root).is_clean
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert all((row.get("mismatch_abs") or 0.0) < 1e-4 for row in rows)
    for replay in (
        ["replay", "x", "name=one"],
        ["replay", "x", "name=two", *words_of(4, 2, 2)],
        ["replay", "x", "--against", "one", "--tolerance", "1e-5"],
        ["replay", "one", "--against", "two", "--tolerance", "1e-5"],
    ):
        done = areal_like(*replay, cwd=tmp_path, environment=cache)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference\n" in done.stdout, done.stdout
