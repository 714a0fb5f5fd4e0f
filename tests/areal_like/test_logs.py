"""Log lines have a limit in length and number, and a log file can be opened again."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from areal_like.runtime import logs
from areal_like.runtime.logs import MAX_LINE_CHARS, JsonFormatter, RateLimit, log_file
from areal_like.runtime.signals import all_stacks


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger that writes to `tmp_path/x.log` only."""
    found = logging.getLogger("tests.logs")
    found.propagate, found.handlers = False, [log_file(tmp_path / "x.log")]
    found.setLevel(logging.INFO)
    yield found
    found.handlers[0].close()
    found.handlers = []


def lines_of(path: Path) -> list[str]:
    return [json.loads(line)["message"] for line in path.read_text().splitlines()]


def test_a_long_line_is_cut(logger: logging.Logger, tmp_path: Path) -> None:
    logger.info("%s", "x" * 3_000_000)
    (line,) = lines_of(tmp_path / "x.log")
    assert len(line) < MAX_LINE_CHARS + 50 and line.endswith("(3000000 characters)")


def test_one_place_cannot_fill_the_log(logger: logging.Logger, tmp_path: Path) -> None:
    def from_one_place(number: int) -> None:
        logger.info("line %d", number)

    for number in range(5_000):
        from_one_place(number)
    logger.info("another place")
    lines = lines_of(tmp_path / "x.log")
    assert logs._BURST < len(lines) < logs._BURST + 100 and lines[-1] == "another place"


def test_the_number_of_lines_left_out_is_logged() -> None:
    limit, now_s = RateLimit(), 0.0
    record = logging.LogRecord("tests", logging.INFO, "file.py", 1, "refused %s", ("x",), None)
    admitted = [limit._admits(record, now_s=now_s) for _ in range(logs._BURST + 30)]
    assert admitted == [True] * logs._BURST + [False] * 30
    assert limit._admits(record, now_s=1.0)
    assert JsonFormatter().format(record).count("(30 such lines were left out)") == 1
    last = logging.LogRecord(logs.exit_log.name, logging.ERROR, "file.py", 1, "the reason", (), None)
    assert all(limit.filter(last) for _ in range(1_000)), "the reason of an end is always logged"


def test_two_handlers_count_the_lines_left_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_BURST", 2)
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = logging.Logger("tests.two", logging.INFO)
    log.handlers = [log_file(tmp_path / "x.log"), log_file(tmp_path / "y.log")]
    for number in range(10):
        now[0] = 100.0 * (number == 9)
        log.info("line %d", number)
    for handler in log.handlers:
        handler.close()
    expected = ["line 0", "line 1", "line 9 (7 such lines were left out)"]
    assert lines_of(tmp_path / "x.log") == lines_of(tmp_path / "y.log") == expected


def test_a_renamed_log_is_opened_again(logger: logging.Logger, tmp_path: Path) -> None:
    logger.info("before")
    (tmp_path / "x.log").rename(tmp_path / "x.log.1")
    logger.info("still in the old file")
    next(handler for handler in logger.handlers if isinstance(handler, logs.ReopenedFile)).reopen()
    logger.info("after")
    assert lines_of(tmp_path / "x.log.1") == ["before", "still in the old file"]
    assert lines_of(tmp_path / "x.log") == ["after"]


def test_stacks_name_every_thread() -> None:
    release = threading.Event()
    waiting = threading.Thread(target=release.wait, name="waits for the test")
    waiting.start()
    try:
        assert "thread waits for the test" in all_stacks() and "test_stacks_name_every_thread" in all_stacks()
    finally:
        release.set()
        waiting.join()
