"""The comparison with TRL: both sides get the same prompts, and the figures are read from the steps' rows."""

import json
import os
import random
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import Config
from benchmarks import counting, trl
from benchmarks.report import RESULTS
from benchmarks.trl_report import PHASES, phases_of, result_of, seconds_to, table_of, tables, tuning_of
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


def run_of(
    side: str, rewards: list[float], *, peak_mib: float = 1, limit_s: float = 60.0, **more: Any
) -> dict[str, Any]:
    facts = {"start_s": 3.0, "peak_mib": peak_mib}
    run = {
        "stage": "compare", "job": "default", "seed": 0, "side": side, "method": "tis", "lr": 8e-5,
        "limit_s": limit_s, "greedy": 0.9, "sampled": 0.6,
    }  # fmt: skip
    return run | result_of(facts, rows_with(rewards), limit_s=limit_s) | more


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_both_sides_get_the_same_prompts() -> None:
    task = SortTask(seed=0)
    expected = {task.example("train", index).prompt for index in FIRST_TRAINED}
    assert {example.prompt for example in trl.examples_of(task, 16, seed=0)} == expected


def test_reward_is_reached_by_a_mean_of_five_steps() -> None:
    run = run_of("ours", [0.1, 1.0, 1.0, 0.5, 0.5, 0.5, 0.7, 0.8, 0.9, 0.9, 0.9])
    # Steps 2 to 6 have the first mean of .7; no five steps have one of .9.
    assert run["reached"] == {"0.7": {"seconds": 3.0, "samples": 768}, "0.9": None}
    assert run["tokens_per_s"] == 2000


def test_a_run_that_never_arrives_counts_as_the_limit() -> None:
    """Steps after the limit do not count: the reward of .9 came too late."""
    run = run_of("ours", [0.7] * 6 + [0.9] * 6, limit_s=4.0)
    assert run["steps"] == 8
    assert (seconds_to(run, 0.7), seconds_to(run, 0.9)) == (2.5, 4.0)
    line = cells_of(table_of([run, run_of("ours", [0.9] * 5, limit_s=4.0)]).splitlines()[2])
    assert line[5] == "3.250 (2.500 to 4.000), 1 of 2 never"
    assert line[6] == "1 of 2 runs"


def test_table_has_ratios_of_medians() -> None:
    runs = [
        run_of("ours", [0.9] * 5, peak_mib=800),
        run_of("TRL", [0.0] * 5 + [0.9] * 5, peak_mib=400, greedy=0.45),
    ]
    ratio = cells_of(table_of(runs).splitlines()[-1])
    assert ratio[:3] == ["default", "TRL / ours", ""]
    assert ratio[3:] == ["1.80", "1.80", "2.00", "2.00", "0.50", "1.00", "1.00", "1.00", "0.50"]


def test_runs_of_an_earlier_release_can_be_shown() -> None:
    old = json.loads((RESULTS / "trl.json").read_text())["runs"]
    without = [run for run in old if "stage" not in run] or [
        {key: value for key, value in old[0].items() if key not in ("stage", "limit_s", "method", "greedy")}
    ]
    assert without[0]["job"] in tables(without)


def test_both_sides_have_the_same_budget_for_tuning() -> None:
    job = trl.JOBS["long"]
    ours, theirs = (trl.settings_to_try(job, side) for side in ("ours", "TRL"))
    assert len(ours) == len(theirs) == 6
    assert {s.lr for s in ours} == {s.lr for s in theirs} == {2e-4, 4e-4, 8e-4}
    assert trl.JOBS["default"].lr == Config().trainer.lr


def test_the_best_setting_reaches_the_last_reward_first() -> None:
    """.9 counts before .7, and what no run reaches is decided by the greedy reward."""
    job = trl.JOBS["default"]
    tuned = {"stage": "tune", "seed": trl.TUNING_SEED}
    slow = run_of("ours", [0.7] * 5 + [0.9] * 5, method="tis", **tuned)
    fast = run_of("ours", [0.0] * 3 + [0.9] * 5, method="VCPO", lr=1.6e-4, **tuned)
    assert trl.best_setting(job, "ours", [slow, fast]) == trl.Setting(side="ours", method="VCPO", lr=1.6e-4)
    none, better = (
        run_of("TRL", [0.5] * 9, lr=lr, greedy=g, **tuned) for lr, g in ((1e-4, 0.8), (2e-4, 0.9))
    )
    other = run_of("ours", [0.9] * 5)
    assert trl.best_setting(job, "TRL", [none, better, other, slow]).lr == 2e-4


def test_a_tuning_run_ends_when_it_has_lost(tmp_path: Path) -> None:
    """After one run has reached the last reward, the others of its side and job get the same seconds."""
    job, comparison = trl.JOBS["default"], trl.Comparison(tmp_path / "trl.json", trl.METHODS)
    comparison.runs += [
        run_of("ours", [0.0] * 5 + [0.9] * 5, stage="tune"),
        run_of("ours", [0.9] * 5, stage="compare"),
        run_of("TRL", [0.0] * 9, stage="tune", limit_s=job.limit_s),
    ]
    assert comparison._tuning_limit_s(job, "ours") == seconds_to(comparison.runs[0], 0.9) < job.limit_s
    assert comparison._tuning_limit_s(job, "TRL") == job.limit_s
    stopped = run_of("TRL", [0.0] * 9, stage="tune", method="dapo", lr=1e-4, greedy=0.1, stopped_s=24.5)
    assert "| > 24.5 | > 24.5 |" in tuning_of([stopped])


def test_comparison_tunes_first_and_resumes(tmp_path: Path) -> None:
    """Both sides alternate; runs in the file are not repeated, and those that were not tuned are left out."""
    job, path = trl.JOBS["default"], tmp_path / "trl.json"
    path.write_text(json.dumps({"runs": [{"job": "default", "seed": 0, "side": "ours"}]}))
    first = trl.Comparison(path, trl.METHODS)
    wanted = first.missing(job, seeds=[0, 1])
    assert len(wanted) == 12 and {(stage, seed) for stage, _, seed in wanted} == {("tune", trl.TUNING_SEED)}
    assert [setting.side for _, setting, _ in wanted] == ["ours", "TRL"] * 6
    runs = [
        run_of(
            s.side, [0.9 * (s.lr > 2e-4)] * 9, method=s.method, lr=s.lr, stage=stage, seed=seed,
            greedy=0.9 + 0.05 * (s.method in ("VCPO", "dapo, two updates a batch")),
        )
        for stage, s, seed in wanted
    ]  # fmt: skip
    runs.append(run_of("ours", [0.9] * 9, method="VCPO", lr=job.lr * 4))
    path.write_text(json.dumps({"runs": runs}))
    best = {"ours": "VCPO", "TRL": "dapo, two updates a batch"}
    assert [
        (stage, s.side, s.method, s.lr, seed)
        for stage, s, seed in trl.Comparison(path, trl.METHODS).missing(job, seeds=[0, 1])
    ] == [
        ("compare", side, best[side], job.lr * 4, seed)
        for side, seed in (("TRL", 0), ("ours", 1), ("TRL", 1))
    ]
    assert len(trl.Comparison(path, trl.METHODS, again=True).missing(job, seeds=[0])) == 12


def test_phases_are_means_over_steps() -> None:
    rows = rows_with([0.1, 0.2])
    for row, wait_s in zip(rows, (0.1, 0.3), strict=True):
        row |= {"lag": 1.0, "phases_s": dict.fromkeys(PHASES, 0.05) | {"wait_data_s": wait_s}}
    facts = {"start_s": 3.0, "peak_mib": 800, "generation_idle": 0.25}
    run = {"job": "default", "side": "ours"} | result_of(facts, rows, limit_s=60)
    assert cells_of(phases_of([run]).splitlines()[-1]) == ["default", "200.0", *["50.0"] * 5, "40%", "25%"]


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


def trained_by_trl(folder: Path, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of the run, and its rows."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [str(trl.PYTHON), "-P", str(ROOT / "benchmarks/trl_side.py"), str(folder / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "out").read_text().splitlines()]


RUNS = """
import os, runpy, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
script, *specs = sys.argv[1:]
for spec in specs:
    if not os.fork():
        sys.argv[1:] = [spec]
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Runs TRL's side once for each specification: forks, which share its imports."""


@pytest.fixture(scope="module")
def runs_of_trl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what TRL's side wrote in three steps, under `1` and `2`, its updates a batch."""
    folder = tmp_path_factory.mktemp("trl")
    build_tiny_model(folder / "model", seed=0, warm_start_steps=0, swap_prob=0.5)
    examples = trl.examples_of(SortTask(seed=0), 6, seed=0)
    settings = trl.settings_of(trl.JOBS["default"], lr=8e-5) | {"samples": 4, "group_size": 2}
    specs = []
    for num_updates in (1, 2):
        out = folder / str(num_updates)
        out.mkdir()
        spec = {
            "model": str(folder / "model"), "prompts": [e.prompt for e in examples],
            "answers": [e.answer for e in examples], "out": str(out / "out"), "seed": 0, "num_threads": 1,
            "trl": {"num_iterations": num_updates}, "stop_at": 2.0, "stop_after_s": 600.0, "window": 5,
            "weights": str(out / "weights"), "settings": settings | {"num_steps": 3 * num_updates},
        }  # fmt: skip
        specs.append(out / "spec.json")
        specs[-1].write_text(json.dumps(spec))
    command = [str(trl.PYTHON), "-P", "-c", RUNS, str(ROOT / "benchmarks/trl_side.py"), *map(str, specs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.skipif(not trl.PYTHON.exists(), reason="needs TRL in an environment of its own: make trl")
@pytest.mark.parametrize("num_updates", [1, 2])
def test_trl_takes_prompts_in_order(
    runs_of_trl: Path, num_updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = trl.examples_of(SortTask(seed=0), 6, seed=0)
    written = runs_of_trl / str(num_updates)
    facts, *rows = [json.loads(line) for line in (written / "out").read_text().splitlines()]
    assert facts["arguments"]["loss_type"] == "dapo"
    assert facts["arguments"]["num_iterations"] == num_updates
    assert [row["first_prompt"] for row in rows] == [examples[i].prompt for i in (0, 2, 4)]
    assert [row["samples"] for row in rows] == [4, 4, 4]
    assert rows[0]["prompt_tokens"] == 2 * sum(len(e.prompt) for e in examples[:2])
    # A linear warm-up of ten steps to 8e-5, then constant.
    assert [row["next_lr"] for row in rows] == pytest.approx([8e-6 * (1 + row["step"]) for row in rows])
    monkeypatch.setattr(trl, "HELD_OUT_PROMPTS", 32)
    weights = written / "weights"
    assert trl.held_out(trl.JOBS["default"], weights, seed=0) == {"greedy": 0.0, "sampled": 0.0}


@pytest.mark.long
@pytest.mark.skipif(not trl.PYTHON.exists(), reason="needs TRL in an environment of its own: make trl")
def test_trl_continues_from_its_checkpoint(tmp_path: Path) -> None:
    """With micro-batches: the row of a step after the checkpoint is replaced, and no prompt comes twice."""
    build_tiny_model(tmp_path / "model", seed=0, warm_start_steps=0, swap_prob=0.5)
    examples = trl.examples_of(SortTask(seed=0), 6, seed=0)
    settings = trl.settings_of(trl.JOBS["default"], lr=8e-5) | {"samples": 4, "group_size": 2}
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    spec = {
        "model": str(tmp_path / "model"), "prompts": [e.prompt for e in examples],
        "answers": [e.answer for e in examples], "out": str(tmp_path / "out"), "seed": 0, "num_threads": 1,
        "trl": micro, "stop_at": 2.0, "stop_after_s": 600.0, "window": 5, "strips": True,
        "weights": str(tmp_path / "weights"), "settings": settings | {"num_steps": 2},
        "checkpoints": str(tmp_path / "checkpoints"), "save_steps": 2,
    }  # fmt: skip
    assert [row["step"] for row in trained_by_trl(tmp_path, spec)[1:]] == [1, 2]
    with (tmp_path / "out").open("a") as out:
        out.write(json.dumps({"step": 3, "seconds": 1e6, "first_prompt": "?"}) + "\n")
        out.write('{"step": 4, "sec')
    facts, *rows = trained_by_trl(tmp_path, spec | {"settings": settings | {"num_steps": 3}})
    assert "arguments" in facts
    assert [(row["step"], row["samples"]) for row in rows] == [(1, 4), (2, 4), (3, 4)]
    assert [row["first_prompt"] for row in rows] == [examples[i].prompt for i in (0, 2, 4)]
    assert rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"] < 1e5
    assert (tmp_path / "weights" / "config.json").exists()
