"""The real model's study: its rows, its cells, what is read from their files, and its page."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.config import from_mapping
from areal_like.evaluation.statistics import pass_at_k
from areal_like.paths import write_json
from areal_like.runtime.command_line import load_config
from benchmarks import real_model_data
from benchmarks.processes import run_program
from benchmarks.real_model import kept_settings, status
from benchmarks.real_model_cells import SAMPLED, Cell, Study, cells_of, hours_left, write_config
from benchmarks.real_model_data import CALCULATOR, DATA, NUM_TRAIN, TOOL_PROMPT, calculations, disjoint
from benchmarks.real_model_gap import scores_of, share_of
from benchmarks.real_model_report import BEGIN, END, curve, write_report
from benchmarks.real_model_result import binned, num_solved
from benchmarks.real_model_statistics import gain_of
from benchmarks.real_model_tools import Calculations
from launch.samples.reading import Row
from rollout_server.environments.scripted import call, play, say
from tests.support.launching import ROOT
from tests.support.waiting import is_alive

NAMES = [data.name for data in DATA]


def questions(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


def test_no_question_is_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(real_model_data, "NUM_TRAIN", 300)
    real_model_data.write_rows(tmp_path)
    files = sorted(tmp_path.glob("*.jsonl"))
    by_file = {file.name: questions(file) for file in files}
    every = [question for found in by_file.values() for question in found]
    assert len(every) == len(set(every)) == disjoint(tmp_path)["questions"] == 4 * (200 + 64 + 300)
    assert len(by_file["sft.jsonl"]) == 3 * 64
    held_out = by_file["chain_sum.eval.jsonl"]

    # Another number of training rows leaves the held-out ones as they are, and complete files are kept.
    (tmp_path / "sft.jsonl").unlink()
    monkeypatch.setattr(real_model_data, "NUM_TRAIN", 100)
    real_model_data.write_rows(tmp_path)
    assert questions(tmp_path / "chain_sum.eval.jsonl") == held_out
    times = [file.stat().st_mtime_ns for file in files]
    real_model_data.write_rows(tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == times


def test_a_repeated_question_is_found(tmp_path: Path) -> None:
    """Whatever its case and spaces, and its answer."""
    (tmp_path / "a.eval.jsonl").write_text('{"question": "What is 1 + 2?", "answer": "3"}\n')
    (tmp_path / "a.train.jsonl").write_text('{"question": "What is 1 + 3?", "answer": "4"}\n')
    assert disjoint(tmp_path)["files"]["a.eval.jsonl"]["rows"] == 1
    with (tmp_path / "a.train.jsonl").open("a") as file:
        file.write('{"question": "what  is 1 + 2? ", "answer": "4"}\n')
    with pytest.raises(ValueError, match=r"a\.eval\.jsonl:1 and a\.train\.jsonl:2"):
        disjoint(tmp_path)


def test_jobs_name_the_files_that_are_written() -> None:
    config = load_config(["--config", str(ROOT / "configs/jobs/smollm2.yaml")])
    assert [part["label"] for part in config.task["tasks"]] == list(config.eval.sets) == NAMES
    for part in config.task["tasks"]:
        for split in ("train", "eval"):
            assert part[split] == f"runs/real_model/rows/{part['label']}.{split}.jsonl"
        assert part["system_prompt"] == config.sft.system_prompt == real_model_data.SYSTEM_PROMPT
        held_out = config.eval.sets[part["label"]]
        assert held_out.task["eval"] == part["eval"]
        assert held_out.task["system_prompt"] == part["system_prompt"]
        assert held_out.num_prompts == real_model_data.NUM_EVAL
    assert config.trainer.num_steps * config.trainer.groups_per_step == len(DATA) * NUM_TRAIN
    tools = load_config(["--config", str(ROOT / "configs/jobs/smollm2_tools.yaml")])
    assert tools.task["system_prompt"] == TOOL_PROMPT
    assert tools.eval.sets[CALCULATOR].num_prompts == real_model_data.NUM_EVAL


def test_the_calculator_has_the_answers_of_the_rows() -> None:
    rows = list(itertools.islice(calculations(), 50))
    assert len({row["question"] for row in rows}) == 50
    for row in rows:
        shown = real_model_data.demonstration(row, uses_calculator=True)["messages"]
        written = json.loads(shown[2]["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
        episode = play(Calculations(shown[:2]), [call(written["name"], **written["arguments"]), say("x")])
        assert episode.messages[3]["content"] == row["answer"] == shown[3]["content"]
        assert episode.is_done and episode.metrics["tool_errors"] == 0 and not episode.tools


@pytest.mark.parametrize("cell", cells_of().values(), ids=lambda cell: cell.name)
def test_each_cell_is_a_job(cell: Cell, tmp_path: Path) -> None:
    study = Study(work=tmp_path)
    settings = study.config(cell)
    settings["model"] |= {"path": study.model}
    if cell.teacher:
        settings["distill"] |= {"teachers": {"default": study.model}}
        assert study.cells[cell.teacher].seed == cell.seed
    config = load_config(["--config", str(write_config(tmp_path / "config.yaml", settings))])
    assert config.resolved_objective["name"] == ("distill" if cell.teacher else "gspo")
    assert config.overdue == ("wait" if config.max_staleness == 0 else "close")
    assert config.seed == cell.seed and (cell.start in study.cells or cell.name == "base")
    assert cell.num_steps in (0, config.trainer.num_steps)
    assert str(config.task).count(f"{tmp_path}/rows/") == (6 if cell.job == "smollm2" else 2)
    if cell.name == "sft-2":
        assert config.sft.num_steps * config.sft.batch_rows == len(DATA) * NUM_TRAIN
        assert all(str(file).startswith(f"{tmp_path}/rows/") for file in config.sft.train)
    evaluation = from_mapping(study.evaluation_config(cell))
    assert not evaluation.model.lora.is_on and evaluation.seed == 0
    greedy = [name for name in evaluation.eval.sets if not name.endswith(SAMPLED)]
    assert greedy == list(config.eval.sets)
    for name in greedy:
        sampled = evaluation.eval.sets[name + SAMPLED]
        assert (sampled.num_samples, sampled.temperature, sampled.ks) == (16, 1.0, (1, 8))
        assert sampled.num_prompts == evaluation.eval.sets[name].num_prompts == 200


def test_pass_at_k_is_a_share_of_subsets() -> None:
    """Of all choices of k of n completions, those with at least one that is solved."""
    for n, k in ((8, 8), (9, 4), (6, 1)):
        for num in range(n + 1):
            solved = [True] * num + [False] * (n - num)
            subsets = list(itertools.combinations(solved, k))
            assert pass_at_k(n, num, k) == pytest.approx(statistics.mean(map(any, subsets)))


def test_bootstrap_over_seeds_is_the_exact_one() -> None:
    """Without differences between prompts all 27 draws of three seeds are equally likely."""
    gains = [0.0, 0.1, 0.5]
    before_SP = np.zeros((3, 7))
    found = gain_of(before_SP, before_SP + np.array(gains)[:, None], sizes=[3, 4])
    means = sorted(statistics.mean(drawn) for drawn in itertools.product(gains, repeat=3))
    assert (found.mean, found.before, found.num_seeds, found.num_prompts) == (pytest.approx(0.2), 0.0, 3, 7)
    # 1 of 27 means is the least and 1 the largest: each is beyond the 2.5 % point.
    assert (found.low, found.high) == (pytest.approx(means[0]), pytest.approx(means[-1]))


def test_bootstrap_over_prompts_is_nearly_normal() -> None:
    """With one seed it has the width of the mean's standard error, within each set."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(0.2, 1.0, 400), rng.normal(5.0, 0.1, 400)]
    after_SP = np.concatenate(parts)[None]
    found = gain_of(np.zeros_like(after_SP), after_SP, sizes=[400, 400])
    error = np.sqrt(sum(part.var() / 400 for part in parts)) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.04)
    # Prompts of the two sets are not exchanged: the difference of their means is no variance.
    one_set = gain_of(np.zeros_like(after_SP), after_SP, sizes=[800])
    assert found.high - found.low < 0.5 * (one_set.high - one_set.low)
    with pytest.raises(ValueError, match="data sets"):
        gain_of(after_SP, after_SP, sizes=[400])


def test_prompts_that_all_seeds_share_vary_together() -> None:
    """Equal gains of all seeds are no more certain than those of one seed."""
    gain_P = np.random.default_rng(1).integers(-1, 2, 300).astype(float)
    one, three = (gain_of(np.zeros((n, 300)), np.broadcast_to(gain_P, (n, 300)), sizes=[300]) for n in (1, 3))
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)


def row_of(prompt: int, sample: int, *, reward: float, failure: str = "") -> Row:
    return Row(
        ticket=prompt, sample=sample, prompt_index=prompt, eval_set="a", step=1, state="evaluated", reason="",
        is_greedy=False, reward=reward, num_sampled=3, oldest_version=0, newest_version=0, failure=failure,
    )  # fmt: skip


def test_share_of_a_gap() -> None:
    """Three of four questions that the teacher gained; of 400 questions, so that the interval is narrow."""
    base = {"a": np.zeros(200), "b": np.tile([1.0, 0.0], 100)}
    teacher = {"a": np.ones(200), "b": np.ones(200)}
    student = {"a": np.tile([1.0, 1.0, 1.0, 0.0], 50), "b": np.tile([1.0, 1.0, 1.0, 0.0], 50)}
    share = share_of(base, teacher, student)
    assert share["share"] == pytest.approx(200 / 300)
    assert 0.59 < share["low"] < 0.64 and 0.69 < share["high"] < 0.74
    scores = scores_of(student)
    assert scores["all"]["score"] == 0.75
    assert scores["all"]["error"] == pytest.approx((0.75 * 0.25 / 399) ** 0.5)


def test_missing_and_failed_completions_are_not_solved() -> None:
    rows = [row_of(0, 0, reward=1.0), row_of(0, 1, reward=1.0, failure="reward_timeout")]
    rows += [row_of(2, 0, reward=0.5), row_of(2, 1, reward=1.0)]
    assert num_solved(rows, 4) == [1, 0, 1, 0]


def test_metrics_are_means_of_ten_steps() -> None:
    rows = [
        {
            "step": step,
            "reward_mean": step / 10,
            "lag_max": step % 4,
            "by_label": {"a": {"reward_mean": step}},
        }
        for step in range(13)
    ]
    rows[11]["mismatch_abs"] = 0.25
    first, last = binned(rows)
    assert (first["first_step"], first["num_steps"], first["reward_mean"]) == (0, 10, 0.45)
    assert first["lag_max"] == 3 and first["by_label"] == {"a": {"reward_mean": 4.5}}
    assert (last["num_steps"], last["mismatch_abs"]) == (3, 0.25) and "mismatch_abs" not in first


def write_steps(study: Study, name: str, *, steps: int, step_s: float, finished: bool) -> None:
    folder = study.run(study.cells[name])
    folder.mkdir(parents=True)
    rows = [{"step": step, "step_s": step_s} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "summary.json", {"finished": finished})


def test_hours_are_those_of_steps_and_evaluations(tmp_path: Path) -> None:
    study = Study(work=tmp_path)
    assert set(hours_left(study).values()) == {None}
    write_steps(study, "rl-0", steps=100, step_s=18.0, finished=False)
    write_json(
        study.evaluation(study.cells["base"]) / "summary.json", {"finished": True, "wall_seconds": 360}
    )
    left = hours_left(study)
    assert left["base"] == 0 and left["rl-0"] == pytest.approx(400 * 18 / 3600 + 0.1)
    assert left["rl-1"] == left["lag0-2"] == pytest.approx(2.6)  # as fast as the cell that has run
    assert left["trl-2"] is left["tools-0"] is left["sft-2"] is None
    study.note_attempt(study.cells["rl-0"], began_unix_s=1.0, wall_s=1800.0, peak_mib=2048.0)
    study.note_attempt(study.cells["rl-0"], began_unix_s=5.0, wall_s=360.0, peak_mib=1024.0)
    own = study.progress(study.cells["rl-0"])
    assert (own.hours, own.peak_gib, own.steps) == (pytest.approx(0.6), 2.0, 100)
    lines = status(study).splitlines()
    (line,) = [line for line in lines if line.startswith("| rl-0 ")]
    assert line.startswith("| rl-0 | begun | 100 / 500 | 18.0 | 0.6 | 2.1 |")
    assert "cells like none that has run" in lines[-1]


def write_result(study: Study, name: str, *, greedy: str, solved: list[int], **more: Any) -> None:
    cell = study.cells[name]
    result = {
        "cell": name, "kind": cell.kind, "start": cell.start, "finished": True, "steps": 20, "num_steps": 20,
        "machine": {"cpu": "CPU", "cores": 2}, "rows": {"questions": 4}, "hours": 1.5, "step_seconds": 9.0,
        "peak_gib": 7.0, "metrics": {"lag_mean": 3.1, "lag_max": 4, "mismatch_abs": 0.02},
        "failures": {"reward_timeout zero": 2},
        "evaluation": {
            "greedy": {"a": greedy[:2], "b": greedy[2:]}, "solved": {"a": solved[:2], "b": solved[2:]},
            "num_samples": 8,
            "samples": [{"question": "1|2", "answer": "3", "completion": f"of {name}", "reward": 1.0}],
        },
    }  # fmt: skip
    write_json(study.results / name / "result.json", result | more)
    evaluations = [
        {"step": step, "set": one, "avg": avg, "num_prompts": 2, "num_samples": 1}
        for step, one, avg in ((0, "a", 0.5), (0, "b", 0.0), (20, "a", 1.0), (20, "b", 1.0), (25, "a", 0.0))
    ]
    bins = [{"first_step": 0, "num_steps": 10, "reward_mean": 0.25, "entropy": 1.0}]
    bins.append({"first_step": 10, "num_steps": 10, "reward_mean": 0.5, "entropy": 0.75})
    for file, rows in (("evaluations.jsonl", evaluations), ("metrics.jsonl", bins)):
        (study.results / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_page_shows_every_seed(tmp_path: Path) -> None:
    """Also one that became worse, and which cells are missing; what surrounds the section stays."""
    study = Study(work=tmp_path, results=tmp_path / "results")
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert "no results" in write_report(study, page=page, plot=plot) and not plot.exists()
    for seed, greedy in ((0, "1111"), (1, "0000")):
        write_result(study, f"start-{seed}", greedy="0100", solved=[0, 4, 0, 8])
        write_result(study, f"rl-{seed}", greedy=greedy, solved=[8, 8, 8, 8])
    text = write_report(study, page=page, plot=plot)
    assert page.read_text() == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    assert "Worse than its start: rl-1." in text and "`rl-2`" in text and plot.stat().st_size > 1000
    lines = text.splitlines()
    assert "| rl-0 | 4 | 0.250 | 1.000 | +0.750 (+0.500 to +1.000) |" in lines
    assert "| rl-1 | 4 | 0.250 | 0.000 | -0.250 (-0.500 to +0.000) |" in lines
    assert any(line.startswith("| rl, 2 seeds | 4 | 0.250 | 0.500 | +0.250 (") for line in lines)
    # pass@1 is 3/8 before, pass@8 1/2; both are 1 after.
    (passes,) = [line for line in lines if line.startswith("| rl-0 | 0.375 | 1.000 | +0.625")]
    assert "| 0.500 | 1.000 | +0.500" in passes and "not different from 0" in text
    assert any("reward_timeout zero 2" in line and "1.000 → 0.750" in line for line in lines)
    assert "| rl-0 | `1\\|2` | `3` | `of start-0` | `of rl-0` | 1 → 1 |" in lines
    assert curve(study, "rl-0") == {0: 0.25, 20: 1.0}  # the last evaluation was not complete

    for name, greedy in (("start-2", "0000"), ("rl-2", "1100"), ("lag0-2", "1110")):
        write_result(study, name, greedy=greedy, solved=[8, 8, 0, 0])
    text = write_report(study, page=page, plot=plot)
    assert "| lag0-2 beside rl-2 | 0.500 | 0.750 | +0.250 (" in text
    assert text.count(" beside rl-") == 1

    page.write_text("no section")
    with pytest.raises(ValueError, match="has no lines"):
        write_report(study, page=page, plot=plot)


def test_all_cells_of_a_study_have_the_same_settings(tmp_path: Path) -> None:
    """Those of its first `run`; `status` and `report` know them, and begin nothing."""
    given = {"model.dtype": "float32"}
    assert kept_settings(tmp_path, {}, begins=False) == {} and not list(tmp_path.iterdir())
    assert kept_settings(tmp_path, given, begins=True) == given
    assert kept_settings(tmp_path, {}, begins=True) == kept_settings(tmp_path, {}, begins=False) == given
    with pytest.raises(ValueError, match=r"began with \{'model\.dtype': 'float32'\}"):
        kept_settings(tmp_path, {"model.dtype": "bfloat16"}, begins=True)


def test_a_program_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    text = f"sleep 600 & echo $! > {child}.part; mv {child}.part {child}; wait"
    code = run_program(
        ["bash", "-c", text],
        cwd=tmp_path,
        log=tmp_path / "log",
        env=os.environ,
        on_look=lambda mib: None,
        is_to_be_killed=child.exists,
    )
    assert code == -signal.SIGKILL
    assert not is_alive(int(child.read_text()))  # it may hold a file that the next program needs
