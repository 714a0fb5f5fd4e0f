"""Whole cells of the real model's study with a tiny model: killed, continued, evaluated, reported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.paths import RunPaths, find_checkpoints
from benchmarks import real_model_gap as gap
from benchmarks.real_model import run_cell
from benchmarks.real_model_cells import Study
from benchmarks.real_model_report import BEGIN, END, write_report
from benchmarks.real_model_result import collect
from benchmarks.real_model_trl import trl_spec
from launch.samples.reading import RunLedgers, Selection
from tests.support.launching import ROOT, TEST_LIMIT_S, processes_of, wait_until
from tests.support.tiny_study import NAMES, NUM_EVAL, NUM_MORE, NUM_STEPS, tiny_study


def processes_in(folder: Path) -> list[int]:
    """Processes whose command line names the folder: launcher and daemons."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def result_of(study: Study, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((study.results / name / "result.json").read_text())
    return found


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_killed_cell_continues_and_is_reported(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    cell = study.cells["rl-0"]
    command = [sys.executable, "-m", "tests.support.tiny_study", str(tmp_path), cell.name]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    checkpoints = RunPaths(study.run(cell)).checkpoints
    wait_until(lambda: find_checkpoints(checkpoints), what="the first checkpoint", process=process)
    process.kill()
    process.wait()
    for pid in processes_in(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: not processes_in(tmp_path) and not processes_of(study.run(cell)),
        what="the end of all processes",
    )
    steps = study.progress(cell).steps
    assert steps > 0 and not study.is_trained(cell)
    collect(study, cell)  # of an interrupted run
    early = result_of(study, "rl-0")
    assert (early["finished"], early["evaluation"], early["steps"]) == (False, None, steps)

    run_cell(study, "rl-0")
    assert study.progress(cell).steps == NUM_STEPS
    assert json.loads((study.run(cell) / "summary.json").read_text())["resumed_from_step"] > 0
    for name in ("base", "start-0", "rl-0"):
        result = result_of(study, name)
        assert result["finished"] is True
        evaluation = result["evaluation"]
        assert isinstance(evaluation, dict)
        assert {one: len(marks) for one, marks in evaluation["greedy"].items()} == dict.fromkeys(
            NAMES, NUM_EVAL
        )
        assert all(
            len(numbers) == NUM_EVAL and max(numbers) <= 8 for numbers in evaluation["solved"].values()
        )
        assert len(evaluation["samples"]) == 3 * len(NAMES)
        avg = sum(map(int, evaluation["greedy"]["chain_sum"])) / NUM_EVAL
        assert evaluation["sets"]["chain_sum"]["avg"] == pytest.approx(avg)
    kept = {path.name: path for path in (study.results / "rl-0").iterdir()}
    assert sorted(kept) == ["audit.json", "config.yaml", "evaluations.jsonl", "metrics.jsonl", "result.json"]
    assert json.loads(kept["audit.json"].read_text())["clean"] is True
    assert all(str(tmp_path) not in path.read_text() for path in kept.values())
    assert sum(path.stat().st_size for path in kept.values()) < 60_000

    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}")
    text = write_report(study, page=page, plot=tmp_path / "plot.png")
    assert "\n| rl-0 | 12 | " in text and "Not complete: `killed-0`, `sft-0`" in text
    run_cell(study, "rl-0")  # complete: nothing runs

    # TRL gets the prompts that this project has trained on first.
    settings = study.config(cell)
    settings["model"] |= {"path": study.checkpoint(study.cells["start-0"])}
    spec = trl_spec(tmp_path, settings)
    ledgers = RunLedgers(study.run(cell))
    first = {row.prompt_index for row in ledgers.find(Selection(step=0))}
    files = [study.rows / f"{name}.train.jsonl" for name in NAMES]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    asked = {rows[index]["question"] for index in first}
    assert len(spec["prompts"]) == 2 * NUM_STEPS
    assert asked <= {
        prompt.partition("<user>")[2].partition("<assistant>")[0] for prompt in spec["prompts"][:8]
    }


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_calculator_is_learned_by_the_same_way(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    run_cell(study, "tools-0")
    result = result_of(study, "tools-0")
    assert result["finished"] is True and result["steps"] == 2
    evaluation = result["evaluation"]
    assert isinstance(evaluation, dict) and list(evaluation["greedy"]) == ["calculator"]
    lines = (study.results / "tools-0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["sample_metrics"]["tool_errors"] >= 0 and rows[0]["turns"] >= 1


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_student_is_compared_with_its_teacher(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    measured = gap.measure(study, "distill-0", num_more=NUM_MORE)
    scores, rows = measured["scores"], gap.rows_of(measured)[1]
    assert list(scores) == ["base", "teacher", "student"] and len(rows) == 4
    assert list(scores["student"]) == [*NAMES, "all"]
    assert all(0.0 <= one["score"] <= 1.0 for sets in scores.values() for one in sets.values())
    result = result_of(study, "distill-0")
    assert result["finished"] is True and result["steps"] == NUM_STEPS
    metrics = result["metrics"]
    assert isinstance(metrics, dict) and metrics["reverse_kl"] > 0
    hours = study.progress(study.cells["rl-0"]).hours
    assert gap.measure(study, "distill-0", num_more=NUM_MORE) == measured
    assert study.progress(study.cells["rl-0"]).hours == hours
