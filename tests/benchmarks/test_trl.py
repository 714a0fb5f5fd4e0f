"""The comparison with TRL: both sides get the same prompts, and the figures are read from the steps' rows."""

import json
import random
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import counting, trl
from benchmarks.trl_report import PHASES, phases_of, result_of, table_of
from rollout_server.tasks.sort import SortTask
from tests.support.launching import ROOT
from trainer.models.tiny import build_tiny_model

# Of the ledger of a default job with seed 0: prompts of the tickets that were trained first.
FIRST_TRAINED = {
    945003, 396988, 834960, 472773, 86009, 846573, 170040, 111657,
    801984, 981271, 770303, 616486, 403551, 310977, 701361, 834670,
}  # fmt: skip


def rows_with(rewards: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "reward": reward,
            "seconds": 0.5 * (i + 1),
            "samples": 128,
            "sampled_tokens": 900,
            "prompt_tokens": 100,
        }
        for i, reward in enumerate(rewards)
    ]


def run_of(side: str, rewards: list[float], *, peak_mib: float) -> dict[str, Any]:
    facts = {"start_s": 3.0, "peak_mib": peak_mib}
    return {"job": "default", "seed": 0, "side": side} | result_of(facts, rows_with(rewards))


def test_both_sides_get_the_same_prompts() -> None:
    task = SortTask(seed=0)
    expected = {task.example("train", index).prompt for index in FIRST_TRAINED}
    assert {example.prompt for example in trl.examples_of(task, 16, seed=0)} == expected


def test_reward_is_reached_by_a_mean_of_five_steps() -> None:
    run = run_of("ours", [0.1, 1.0, 1.0, 0.5, 0.5, 0.5, 0.7, 0.8, 0.9, 0.9, 0.9], peak_mib=1)
    # Steps 2 to 6 have the first mean of .7; no five steps have one of .9.
    assert run["reached"] == {"0.7": {"seconds": 3.0, "samples": 768}, "0.9": None}
    assert run["tokens_per_s"] == 2000


def test_table_has_ratios_of_medians() -> None:
    runs = [
        run_of("ours", [0.9] * 5, peak_mib=800),
        run_of("TRL", [0.0] * 5 + [0.9] * 5, peak_mib=400),
    ]
    ratio = [cell.strip() for cell in table_of(runs).splitlines()[-1].strip("| ").split("|")]
    assert ratio == ["default", "TRL / ours", "1.80", "1.80", "2.00", "2.00", "1.00", "1.00", "0.50"]


def test_phases_are_means_over_steps() -> None:
    rows = rows_with([0.1, 0.2])
    for row, wait_s in zip(rows, (0.1, 0.3), strict=True):
        row |= {"lag": 1.0, "phases_s": dict.fromkeys(PHASES, 0.05) | {"wait_data_s": wait_s}}
    facts = {"start_s": 3.0, "peak_mib": 800, "generation_idle": 0.25}
    run = {"job": "default", "side": "ours"} | result_of(facts, rows)
    cells = [cell.strip() for cell in phases_of([run]).splitlines()[-1].strip("| ").split("|")]
    assert cells == ["default", "200.0", *["50.0"] * 5, "40%", "25%"]


def test_answers_of_counting_have_a_long_tail() -> None:
    task = counting.Counting(seed=0)
    examples = [task.example("train", i) for i in range(2000)]
    lengths = [len(example.answer) for example in examples]
    assert max(lengths) == counting.MAX_CHARACTERS
    assert statistics.median(lengths) < 20 < statistics.quantiles(lengths, n=20)[-1]
    assert task.example("train", 7) == task.example("train", 7)
    prompt, numbers = counting.example(random.Random(0))
    first, last = map(int, prompt.rstrip("=").split("-"))
    assert numbers == list(range(first, last + 1))
    assert max(len(example.prompt) for example in examples) <= task.max_prompt_tokens
    answer = examples[0].answer
    assert task.reward(examples[0], answer) == 1.0
    assert task.reward(examples[0], answer + "0") == 0.0


@pytest.mark.skipif(not trl.PYTHON.exists(), reason="needs TRL in an environment of its own: make trl")
def test_trl_takes_prompts_in_order(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "model", seed=0, warm_start_steps=0, swap_prob=0.5)
    examples = trl.examples_of(SortTask(seed=0), 6, seed=0)
    settings = trl.settings_of(trl.JOBS["default"]) | {"samples": 4, "group_size": 2, "num_steps": 3}
    spec = {
        "model": str(tmp_path / "model"), "prompts": [e.prompt for e in examples],
        "answers": [e.answer for e in examples], "out": str(tmp_path / "out"), "seed": 0, "num_threads": 1,
        "trl": {}, "stop_at": 2.0, "window": 5, "settings": settings,
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [str(trl.PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts, *rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert facts["arguments"]["loss_type"] == "dapo"
    assert [row["first_prompt"] for row in rows] == [examples[i].prompt for i in (0, 2, 4)]
    assert [row["samples"] for row in rows] == [4, 4, 4]
    assert rows[0]["prompt_tokens"] == 2 * sum(len(e.prompt) for e in examples[:2])
    # The third step's is the last: its successor would have the rate 0.
    assert [row["next_lr"] for row in rows] == pytest.approx([1.6e-5, 2.4e-5, 0.0])
