"""A job over a file of rows that are easy, middling or impossible: a curriculum issues the middle ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from areal_like.paths import RunPaths
from launch.audit.run import audit_run
from launch.observation.heard_prompts import read_heard_prompts
from tests.support.launching import TEST_LIMIT_S, areal_like, finish, launcher
from tests.support.row_rewards import EASY, IMPOSSIBLE, MIDDLE

NUM_ROWS = 60
KINDS = (EASY, MIDDLE, IMPOSSIBLE)


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_goldilocks_issues_fewer_hopeless_rows(tmp_path: Path) -> None:
    rows = [
        {"question": f"{10_000 + row}=", "answer": "", "kind": KINDS[row % 3], "data_source": KINDS[row % 3]}
        for row in range(NUM_ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "{name: data, train: rows.jsonl, eval: rows.jsonl, reward: tests.support.row_rewards.by_kind}"
    with launcher(
        "name=one",
        f"task={task}",
        "model.warm_start_steps=0",
        "sampling.max_new_tokens=4",
        "sampling.group_size=4",
        "trainer.groups_per_step=4",
        "trainer.num_steps=45",
        "eval.num_prompts=0",
        "buffer.curriculum=goldilocks",
        cwd=tmp_path,
    ) as process:
        code, _, err = finish(process, tmp_path / "runs" / "one")
    assert code == 0, err
    root = tmp_path / "runs" / "one"
    heard = read_heard_prompts(RunPaths(root).ledgers, reward_low=0.0, reward_high=1.0)
    issued: Counter[str] = Counter()
    for index, num_issued, *_ in heard.rows:
        issued[KINDS[int(index) % 3]] += int(num_issued)
    # Without a curriculum each kind is a third, to one group in an epoch. The first of the twelve epochs, in
    # which nothing is known yet, and the explored tenth of the choices are included here.
    assert heard.num_drawn > 10 * NUM_ROWS
    assert issued[MIDDLE] > 0.5 * issued.total(), issued
    assert max(issued[EASY], issued[IMPOSSIBLE]) < 0.3 * issued.total(), issued
    assert audit_run(root).is_clean
    told = areal_like("data", "stats", "one", "--json", cwd=tmp_path)
    report = json.loads(told.stdout)["heard"]
    assert report["by_label"][EASY]["always"] == report["by_label"][EASY]["heard"] > 0
    assert report["by_label"][IMPOSSIBLE]["never"] == report["by_label"][IMPOSSIBLE]["heard"] > 0
    assert 0.3 < report["by_label"][MIDDLE]["solve_rate"] < 0.7
