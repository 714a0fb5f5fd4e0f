"""docs/guides/preferences.md: its commands run one after the other, with a tiny model and few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from areal_like.sorting import Split, sort_example
from launch.audit.run import audit_run
from tests.support.launching import ROOT, TEST_LIMIT_S, areal_like
from trainer.models.tiny import build_tiny_model

PAGE = (ROOT / "docs" / "guides" / "preferences.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^areal-like (.*)$", PAGE.replace("\\\n", ""), re.M)]
SMALL = {
    "reward-model": ["reward_model.num_steps=4", "reward_model.batch_rows=8"],
    "run": [
        "trainer.num_steps=4",
        "trainer.groups_per_step=4",
        "sampling.group_size=4",
        "eval.num_prompts=8",
        "weights.check_interval_s=0",
    ],
    "preferences": ["preferences.num_steps=4", "preferences.batch_rows=8"],
    "eval": ["eval.num_prompts=8"],
}
"""Verb -> settings in addition to those of the guide."""


def write_rows(folder: Path) -> None:
    """The files that the guide names: sorted digits are preferred to the same in another order."""
    for split, pairs, prompts, num in (
        (Split.TRAIN, "pairs", "prompts", 64),
        (Split.HELD_OUT, "held_out", "prompts_held_out", 16),
    ):
        examples = [sort_example(seed=0, split=split, index=index) for index in range(num)]
        rows = [
            {"prompt": one.prompt, "chosen": one.answer, "rejected": one.answer[::-1]}
            for one in examples
            if one.answer != one.answer[::-1]
        ]
        (folder / f"{pairs}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"prompt": one.prompt, "answer": one.answer} for one in examples]
        (folder / f"{prompts}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def words_of(command: list[str], model: Path) -> list[str]:
    """The command, with the tiny model and the last checkpoint of four steps."""
    words = [word.replace("step_000200", "step_000004") for word in command]
    return [f"model.path={model}" if word == "model=smollm2" else word for word in words]


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_commands_of_the_guide_run(tmp_path: Path) -> None:
    write_rows(tmp_path)
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=0, swap_prob=0.5)
    assert [command[0] for command in COMMANDS] == list(SMALL)
    for command in COMMANDS:
        done = areal_like(*words_of(command, model), *SMALL[command[0]], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs"
    rows = [json.loads(line) for line in (runs / "against" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(0 < row["reward_mean"] < 1 and row["reward_gold_mean"] >= 0 for row in rows)
    assert all(row["kl_coef"] > 0 for row in rows)
    assert audit_run(runs / "against").is_clean
    for name in ("judge", "direct"):
        assert json.loads((runs / name / "summary.json").read_text())["finished"] is True
    assert json.loads((runs / "direct-eval" / "summary.json").read_text())["finished"] is True
