"""The real model's benchmark: no question is in two files, and scores are read from the runs' own rows."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from areal_like.evaluation.statistics import wilson_interval
from areal_like.runtime.command_line import load_config
from benchmarks import real_model_data
from benchmarks.real_model import CONFIG
from benchmarks.real_model_report import ALL, agreement, scores_by_step
from tests.support.launching import ROOT


def questions(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


def test_no_question_is_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(real_model_data, "NUM_TRAIN", 300)
    real_model_data.write_rows(tmp_path)
    files = sorted(tmp_path.glob("*.jsonl"))
    by_file = {file.name: questions(file) for file in files}
    every = [question for found in by_file.values() for question in found]
    assert len(every) == len(set(every)) == 3 * (200 + 64 + 300)
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


def test_job_names_the_files_that_are_written() -> None:
    config = load_config(["--config", str(ROOT / CONFIG)])
    names = [data.name for data in real_model_data.DATA]
    assert [part["label"] for part in config.task["tasks"]] == list(config.eval.sets) == names
    for part in config.task["tasks"]:
        for split in ("train", "eval"):
            assert part[split] == f"runs/real_model/rows/{part['label']}.{split}.jsonl"
        assert part["system_prompt"] == config.sft.system_prompt == real_model_data.SYSTEM_PROMPT
        held_out = config.eval.sets[part["label"]]
        assert (
            held_out.task["eval"] == part["eval"] and held_out.task["system_prompt"] == part["system_prompt"]
        )
        assert held_out.num_prompts == real_model_data.NUM_EVAL


def row(step: int, name: str, num_right: int, num_prompts: int) -> dict[str, Any]:
    low, high = wilson_interval(num_right / num_prompts, num_prompts)
    return {
        "step": step,
        "set": name,
        "avg": num_right / num_prompts,
        "num_prompts": num_prompts,
        "ci_low": low,
        "ci_high": high,
    }


def test_sets_are_pooled_over_their_questions(tmp_path: Path) -> None:
    rows = [row(0, "a", 20, 100), row(0, "b", 60, 300), row(20, "a", 50, 100), row(20, "b", 210, 300)]
    rows.append(row(40, "a", 99, 100))  # the run was killed before the other set
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = scores_by_step(tmp_path)
    assert list(found) == [0, 20]
    assert found[20][ALL]["score"] == pytest.approx(260 / 400)
    assert (found[20][ALL]["low"], found[20][ALL]["high"]) == pytest.approx(wilson_interval(0.65, 400))
    assert all(one[ALL]["high"] > one[ALL]["low"] for one in found.values())
    assert [late[ALL]["low"] > early[ALL]["high"] for early, late in pairwise(found.values())] == [True]


def test_steps_without_a_comparison_are_left_out() -> None:
    metrics = [{"mismatch_abs": 1e-6}, {"weight_check_abs": 2e-6}, {"mismatch_abs": 3e-6}]
    assert agreement(metrics) == {
        "mismatch_steps": 2,
        "mismatch_mean": 2e-6,
        "mismatch_max": 3e-6,
        "weight_check_max": 2e-6,
    }
    assert agreement([{}])["mismatch_mean"] is None
