"""The files of a run's logs stay below their limits, whoever writes to them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.config.job import DaemonConfig
from areal_like.errors import ConfigError
from areal_like.runtime.logs import LogBounds, Outputs, copy_and_empty, log_file
from tests.support.growing_files import sizes_of
from tests.support.launching import wait_until

BOUNDS = LogBounds(max_bytes=2_000, num_backups=3)


def record_of(number: int) -> logging.LogRecord:
    # Each from its own place in the code, so that the limit of lines from one place is not reached.
    return logging.LogRecord("tests", logging.INFO, "file.py", number, "line %d", (number,), None)


def numbers_in(path: Path) -> list[int]:
    return [int(json.loads(line)["message"].split()[1]) for line in path.read_text().splitlines()]


def test_a_full_log_becomes_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    file = log_file(path, bounds=BOUNDS)
    for number in range(200):
        file.handle(record_of(number))
    file.close()
    files = [tmp_path / f"x.log.{n}" for n in (3, 2, 1)] + [path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    kept = [number for each in files for number in numbers_in(each)]
    assert kept == list(range(kept[0], 200)), "the newest lines are kept, in order"
    assert all(each.stat().st_size < BOUNDS.max_bytes + 200 for each in files)


def test_a_log_without_a_limit_is_one_file(tmp_path: Path) -> None:
    file = log_file(tmp_path / "x.log")
    for number in range(200):
        file.handle(record_of(number))
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]
    assert numbers_in(tmp_path / "x.log") == list(range(200))


def test_two_processes_of_one_name_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    bounds = LogBounds(max_bytes=2_000, num_backups=99)
    old, new = log_file(path, bounds=bounds), log_file(path, bounds=bounds)
    for number in range(0, 200, 2):
        old.handle(record_of(number))
        new.handle(record_of(number + 1))
    old.close()
    new.close()
    files = list(tmp_path.iterdir())
    assert len(files) > 3 and sorted(n for file in files for n in numbers_in(file)) == list(range(200))


def test_a_log_is_opened_again_after_logrotate(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    file = log_file(path, bounds=BOUNDS)
    file.handle(record_of(0))
    path.rename(tmp_path / "x.log-20260101")
    file.reopen()
    for number in range(1, 30):
        file.handle(record_of(number))
    file.close()
    assert numbers_in(tmp_path / "x.log-20260101") == [0]
    assert numbers_in(tmp_path / "x.log.1")[0] == 1


def test_output_is_copied_and_emptied(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    with path.open("ab") as writer:
        for number in range(6):
            writer.write(f"{number}".encode() * 2_500)
            writer.flush()
            copy_and_empty(path, BOUNDS)
            copy_and_empty(path, BOUNDS)  # of another process: nothing is left to do
        writer.write(b"end")
    assert path.read_bytes() == b"end"
    copies = [(tmp_path / f"engine.log.{n}").read_bytes() for n in (1, 2, 3)]
    assert copies == [b"5" * 2_500, b"4" * 2_500, b"3" * 2_500]
    assert len(list(tmp_path.iterdir())) == 4


def test_output_is_emptied_even_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.write_bytes(b"x" * 3_000)
    (tmp_path / "engine.log.1").mkdir()
    with pytest.raises(OSError, match=r"engine\.log\.1"):
        copy_and_empty(path, LogBounds(max_bytes=2_000, num_backups=1))
    assert path.stat().st_size == 0


def test_one_bad_output_keeps_no_other_from_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outputs, "_files", {})
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    good.write_bytes(b"x" * 3_000)
    for path in (bad, good):
        Outputs.bound(path, BOUNDS)
    with pytest.raises(IsADirectoryError, match="bad"):
        Outputs.shorten()
    assert good.stat().st_size == 0


PROGRAM = """
import subprocess, sys, time
from pathlib import Path
from areal_like.config import Config
from areal_like.config.job import DaemonConfig
from areal_like.runtime.logs import configure_logging
from areal_like.runtime.signals import handle_log_signals
config = Config(runs_dir=sys.argv[1], name="x", daemon=DaemonConfig(log_max_mb=0.01, log_backups=2))
configure_logging(config, "buffer")
handle_log_signals()
# A program that holds the open file and knows nothing of its limit, as SGLang's processes do.
subprocess.run(["sh", "-c", "for i in $(seq 60); do head -c 1000 /dev/zero | tr '\\\\0' x; sleep 0.05; done"])
print("THE END", flush=True)
sys.stdin.read()
"""


def test_a_process_bounds_its_output(tmp_path: Path) -> None:
    logs = tmp_path / "x" / "logs"
    logs.mkdir(parents=True)
    output = logs / "buffer.out"
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=os.environ | {"AREAL_LIKE_OUTPUT_FILE": str(output)},
        )

    def has(pattern: str, text: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            return any(text in path.read_bytes() for path in logs.glob(pattern))
        return False

    try:
        # The last line may be in an older file already.
        wait_until(lambda: has("buffer.out*", b"THE END"), what="the last line")
        expected = ["buffer.log", "buffer.out", "buffer.out.1", "buffer.out.2"]
        # The last rotation may be under way: it moves the copies first.
        wait_until(lambda: sorted(path.name for path in sizes_of(logs)) == expected, what="the copies")
        # A second's output may come on top of the limit.
        assert all(num_bytes < 60_000 for num_bytes in sizes_of(logs).values())
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: has("buffer.log", b"reopened"), what="the log file to be opened again")
        assert process.poll() is None
    finally:
        process.communicate()


@pytest.mark.parametrize(
    "settings", [{"log_max_mb": -1}, {"log_max_mb": 0.001}, {"log_max_mb": float("nan")}, {"log_backups": 0}]
)
def test_limits_of_logs_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"daemon\.log_"):
        DaemonConfig(**settings)  # type: ignore[arg-type]
