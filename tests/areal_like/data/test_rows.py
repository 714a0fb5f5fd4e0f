"""Rows from files: formats, errors with file and line, fingerprints, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from areal_like.data import open_rows, reading
from areal_like.data.cache import open_selection
from areal_like.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "areal_like" / "rows"


def write(path: Path, *lines: object) -> str:
    """Writes lines, those that are no text as JSON."""
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_lines_of_mixed_shapes_stay_what_they_are(tmp_path: Path) -> None:
    rows = [
        {"a": 1},
        {"a": 1.5, "b": {"x": [1, "2"]}},
        {"a": "text", "b": None},
        {"b": {"y": 1}, "c": "é\U0001f600"},
    ]
    source = write(tmp_path / "x.jsonl", rows[0], "", rows[1], "  ", *rows[2:])
    opened = open_rows(source, key="task.train")
    assert [opened[index] for index in range(len(opened))] == rows
    assert [opened.place(index) for index in range(4)] == ["x.jsonl:1", "x.jsonl:3", "x.jsonl:5", "x.jsonl:6"]
    with pytest.raises(IndexError):
        opened[4]


def test_parquet_lists_and_patterns_are_one_sequence(tmp_path: Path) -> None:
    verl = {"prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": "2"}}
    parquet.write_table(pyarrow.Table.from_pylist([verl] * 3), tmp_path / "v.parquet")
    first, second = write(tmp_path / "a1.jsonl", {"n": 1}), write(tmp_path / "a2.jsonl", {"n": 2}, {"n": 3})
    rows = open_rows([str(tmp_path / "v.parquet"), str(tmp_path / "a?.jsonl")], key="task.train")
    assert [rows[index] for index in range(6)] == [verl] * 3 + [{"n": 1}, {"n": 2}, {"n": 3}]
    assert (rows.place(2), rows.place(5)) == ("v.parquet:3", "a2.jsonl:2")
    assert open_rows([first, second], key="k").fingerprint != open_rows([second, first], key="k").fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', r"task\.train: x\.jsonl:3: not JSON \("),
        ("[1]", r"x\.jsonl:3: want an object .* got list"),
        ("NULL", r"x\.jsonl:3: not JSON"),
        ('{"a": ["\\ud800"]}', r"x\.jsonl:3: .* is half of a surrogate pair"),
        ('{"a": %s}' % ("1" * 5000), r"x\.jsonl:3: .*4300 digits"),
        ("[" * 100_000, r"x\.jsonl:3: the JSON is nested too deeply|not JSON"),
    ],
)
def test_broken_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    source = write(tmp_path / "x.jsonl", {"a": 1}, "", line, {"a": 2})
    with pytest.raises(ConfigError, match=message):
        open_rows(source, key="task.train")


def test_a_row_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    parquet.write_table(pyarrow.table({"a": ["x", "y" * 1000]}), tmp_path / "x.parquet")
    for source in (str(tmp_path / "x.parquet"), write(tmp_path / "x.jsonl", {"a": 1}, {"a": "y" * 1000})):
        with pytest.raises(ConfigError, match=r"x\.(parquet|jsonl):2: the row has \d+ bytes"):
            open_rows(source, key="task.train")


def test_a_small_parquet_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred rows share one text of 100 kB, which the file has once."""
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"a": ["y" * 100_000] * 200}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(reading, "_BATCH_BYTES", 400_000)
    before = pyarrow.total_allocated_bytes()
    rows = reading.texts_of_file(path, key="task.train")
    for number in range(1, 20):
        assert next(rows)[1] == number
        assert pyarrow.total_allocated_bytes() - before < 2_000_000


def test_what_cannot_be_read_says_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    (tmp_path / "no.parquet").write_text("no parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.json").write_text('[\n{"a": 1}]\n')
    for source, message in {
        str(tmp_path / "latin.jsonl"): r"latin\.jsonl:2: not UTF-8",
        str(tmp_path / "no.parquet"): "not a readable parquet file",
        str(tmp_path / "empty.jsonl"): "there are no rows",
        str(tmp_path / "list.json"): "each line must be one row",
        str(tmp_path / "absent.jsonl"): "there is no such file",
        str(tmp_path / "*.csv"): "no file matches",
        str(tmp_path): "is a directory",
        "": "name a file",
    }.items():
        with pytest.raises(ConfigError, match=message) as raised:
            open_rows(source, key="task.train")
        assert "task.train" in str(raised.value)


def test_an_entry_that_cannot_be_read_names_the_cache(tmp_path: Path, cache: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"n": 1})
    open_rows(source, key="task.train")
    (about,) = cache.glob("*.json")
    about.unlink()
    about.mkdir()
    with pytest.raises(ConfigError, match=r"task\.train: .*\.arrow cannot be read: .*XDG_CACHE_HOME"):
        open_rows(source, key="task.train")


def test_fingerprint_is_of_the_content_alone(tmp_path: Path, cache: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"a": 1}, {"a": 2})
    os.utime(source, ns=(1, 1))
    before = open_rows(source, key="k")
    (tmp_path / "sub").mkdir()
    moved = write(tmp_path / "sub" / "y.jsonl", {"a": 1}, {"a": 2})
    assert open_rows(moved, key="k").fingerprint == before.fingerprint
    write(tmp_path / "x.jsonl", {"a": 1}, {"a": 3})  # of the same length and, below, with the same time
    os.utime(source, ns=(1, 1))
    after = open_rows(source, key="k")
    assert after.fingerprint != before.fingerprint
    assert (before[1], after[1]) == ({"a": 2}, {"a": 3}), "a job goes on with the rows it has opened"
    pinned = open_rows(before.cached, key="k")
    assert (pinned.fingerprint, pinned[1], pinned.place(1)) == (before.fingerprint, {"a": 2}, "x.jsonl:2")
    for entry in cache.glob("*.json"):
        entry.unlink()
    with pytest.raises(ConfigError, match="was removed while the job runs"):
        open_rows(before.cached, key="k")


def test_selections_reach_other_processes_by_name(tmp_path: Path, cache: Path) -> None:
    rows = open_rows(write(tmp_path / "x.jsonl", *({"n": n} for n in range(10))), key="k")
    odd = rows.only(np.arange(1, 10, 2))
    chosen = odd.only(np.array([4, 0]))
    again = open_rows(chosen.cached, key="k")
    assert [again[0], again[1]] == [{"n": 9}, {"n": 1}] and len(again) == 2 and again.place(0) == "x.jsonl:10"
    assert again.fingerprint == chosen.fingerprint
    assert len({rows.fingerprint, odd.fingerprint, chosen.fingerprint}) == 3
    assert rows.only(np.arange(10)) is rows
    for path in cache.rglob("*.npy"):
        path.write_bytes(b"")  # as after a power failure
        with pytest.raises(ConfigError, match="was removed"):
            open_selection(path.stem, key="k")
        path.unlink()
    with pytest.raises(ConfigError, match="was removed"):
        open_rows(chosen.cached | {"selection": "0" * 32}, key="k")


def test_processes_may_build_the_same_entry_at_once(tmp_path: Path, cache: Path) -> None:
    source = write(tmp_path / "x.jsonl", *({"n": number} for number in range(20_000)))
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: open_rows(source, key="k"), range(8)))
    assert len({rows.fingerprint for rows in opened}) == 1 and opened[-1][19_999] == {"n": 19_999}
    assert len(list(cache.glob("*.arrow"))) == 1 and not list(cache.glob(".*"))


_MEASURED = """
import resource, sys
from areal_like.data import open_rows, reading
def anonymous_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
import pyarrow, json
rows = open_rows(sys.argv[1], key="k")  # imports and allocators are warm
before = anonymous_kb()
rows = open_rows(sys.argv[2], key="k")
total = sum(len(rows[index]["question"]) for index in range(0, len(rows), 7))
print(len(rows), total, anonymous_kb() - before, "torch" in sys.modules)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def grown_kb(num_rows: int) -> int:
        warm = write(tmp_path / "warm.jsonl", {"question": "", "not_yet_cached": num_rows})
        path = tmp_path / f"{num_rows}.jsonl"
        text = "x" * 400
        path.write_text("".join(f'{{"question": "{text}", "answer": {row}}}\n' for row in range(num_rows)))
        output = subprocess.run(
            [sys.executable, "-c", _MEASURED, warm, str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        assert output[0] == str(num_rows) and output[3] == "False"
        return int(output[2])

    small, large = grown_kb(20_000), grown_kb(200_000)
    assert large < small + 20_000, f"{small} KB and {large} KB for a file of 86,000 KB"
