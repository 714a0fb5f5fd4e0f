"""`areal-like data stats`: what the words of its command line are, and the numbers of a task and of a run."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from areal_like.config import from_mapping
from areal_like.runtime.command_line import save_config
from buffer.storage import sql
from launch.cli import main
from launch.commands.data import sort_words
from tests.support.launching import areal_like


def test_words_are_files_configurations_runs_and_settings() -> None:
    words = [
        "a.jsonl",
        "job.yaml",
        "hf:me/data",
        "model.path=x.jsonl",
        "runs/one",
        "b.parquet",
        "data/*.json",
    ]
    found = sort_words(words)
    assert found.files == ["a.jsonl", "hf:me/data", "b.parquet", "data/*.json"]
    assert (found.configs, found.runs, found.settings) == (["job.yaml"], ["runs/one"], ["model.path=x.jsonl"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name files of rows, a configuration"),
        (["a.jsonl", "one"], "either files of rows, or one configuration"),
        (["a.yaml", "--config", "b.yaml"], "either files of rows, or one configuration"),
        (["nothing-of-this-name"], "there is no run"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_ledger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(from_mapping({}), tmp_path / "config.yaml")
    assert main(["data", "stats", str(tmp_path)]) == 2
    assert "has no ledger" in capsys.readouterr().err


def test_numbers_of_a_run(tmp_path: Path) -> None:
    root = tmp_path / "one"
    task = {"name": "sort", "num_train": 40, "num_eval": 7}
    sets = {"same": {}, "other": {"num_prompts": 5, "task": {"name": "sort", "seed": 5}}}
    config = {"name": "one", "task": task, "eval": {"num_prompts": 4, "sets": sets}}
    save_config(from_mapping(config), root / "config.yaml")
    (root / "ledger").mkdir()
    with closing(sqlite3.connect(root / "ledger" / "ledger.sqlite3", isolation_level=None)) as ledger:
        sql.migrate(ledger, path=root)
        ledger.execute("INSERT INTO marks VALUES ('cursor', 60)")
    told = areal_like("data", "stats", str(root), "--rows", "30", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    train, held_out = report["splits"]["train"], report["splits"]["eval"]
    assert (train["rows"], train["of_rows"], held_out["rows"]) == (30, 40, 7)
    assert train["prompt_chars"]["max"] == 9 and train["prompt_tokens"] is None
    assert report["splits"]["eval.sets.other"]["rows"] == 5 and len(report["splits"]) == 3
    assert [overlap["split"] for overlap in report["overlaps"]] == ["eval", "eval.sets.other"]
    assert report["overlaps"][0]["normalised"] == 0, "a multiset of digits belongs to one split"
    assert report["heard"] | {"epochs": 1.5, "never_issued": 40, "heard": 0} == report["heard"]
    assert "contains no model" in report["notes"][0]
    told = areal_like("data", "stats", str(root), cwd=tmp_path)
    assert "the run: 1.5 epochs; 40 (100.0%) of the prompts were never issued" in told.stdout


def test_numbers_of_files(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "What is 1+1?", "answer": "2", "data_source": "sums"},
        {"question": "what is 1+1", "answer": 3},
        {"answer": "4"},
        {"question": "What is 1-1?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "Hi", "completion": "You!"},
    ]
    for name, part in (("a.jsonl", rows), ("b.jsonl", rows[:1] + rows[4:5])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    told = areal_like(
        "data",
        "stats",
        "a.jsonl",
        "b.jsonl",
        "--json",
        cwd=tmp_path,
        environment={"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    first = report["splits"]["a.jsonl"]
    assert (first["rows"], first["labels"], first["without_answer"]) == (6, {"sums": 1}, 2)
    ((problem, broken),) = first["problems"].items()
    assert "prompt, question" in problem and broken == {"rows": 1, "examples": ["a.jsonl:3"]}
    assert first["response_chars"] == first["response_chars"] | {"num": 2, "min": 4, "max": 5}
    repeated = first["duplicates"]
    assert (repeated["exact"], repeated["normalised"]) == (1, 2)
    assert repeated["examples"] == [["a.jsonl:1", "a.jsonl:2"], ["a.jsonl:5", "a.jsonl:6"]]
    assert repeated["conflicting_examples"][0] == ["a.jsonl:1", "a.jsonl:2"]
    (overlap,) = report["overlaps"]
    assert (overlap["split"], overlap["exact"], overlap["rows"]) == ("b.jsonl", 2, 2)
    assert overlap["examples"] == [["b.jsonl:1", "a.jsonl:1"], ["b.jsonl:2", "a.jsonl:5"]]
