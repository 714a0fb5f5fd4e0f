"""The account of a run: what is said of its rows at the end, from the file alone."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics.run_files import WARM_UP_STEPS, MetricsFile


def row(step: int) -> dict[str, Any]:
    """Every seventh step has no reward."""
    luck = random.Random(step)
    return {
        "step": step,
        "reward_mean": math.nan if step % 7 == 2 else luck.random(),
        "loss": luck.gauss(0, 1),
        "step_s": 0.1 + luck.random(),
        "wait_data_s": 0.1 * luck.random(),
        "tokens_trained": luck.randrange(1000),
    }


def mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


@pytest.mark.parametrize("num_rows", [0, 1, 3, 9, 10, 11, 57, 230])
def test_the_account_is_that_of_all_rows_and_a_resume_changes_nothing(tmp_path: Path, num_rows: int) -> None:
    path = tmp_path / "metrics.jsonl"
    resumed_at = num_rows // 3
    file = MetricsFile(path, start_step=0)
    for step in range(resumed_at + 2):  # two more than the checkpoint has
        file.append(row(step))
    file.close()
    path.write_text(path.read_text() + '{"step": ')  # a crash
    file = MetricsFile(path, start_step=resumed_at)
    assert file.last.get("step", -1) == resumed_at - 1
    for step in range(resumed_at, num_rows):
        file.append(row(step))
    account = file.account()
    file.append(row(num_rows))  # a look at the file does not move its end
    file.close()

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(num_rows + 1))
    rows = [row(step) for step in range(num_rows)]
    tenth = max(1, num_rows // 10)
    assert account.num_steps == num_rows and account.tokens_trained == sum(
        row["tokens_trained"] for row in rows
    )
    assert account.reward_first == pytest.approx(mean([row["reward_mean"] for row in rows[:tenth]]))
    assert account.reward_last == pytest.approx(mean([row["reward_mean"] for row in rows[-tenth:]]))
    assert account.loss_last == pytest.approx(mean([row["loss"] for row in rows[-tenth:]]))
    steady = rows[WARM_UP_STEPS:]
    idle = (
        sum(row["wait_data_s"] for row in steady) / sum(row["step_s"] for row in steady) if steady else None
    )
    assert account.trainer_idle_fraction == (None if idle is None else pytest.approx(idle, abs=1e-4))


def test_rows_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step) | {"reward_mean": 0.5}) + "\n" for step in range(10_000)))
    tracemalloc.start()
    file = MetricsFile(path, start_step=10_000)
    for step in range(10_000, 12_000):
        file.append(row(step))
    assert file.account().num_steps == 12_000
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    file.close()
    assert most_bytes < path.stat().st_size / 4, "somewhere all rows are in memory"
