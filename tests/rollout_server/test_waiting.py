"""Tests of `wait_until_ready`: it ends early if the process has ended or makes no progress."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until_ready


def outcome(code: str, tmp_path: Path) -> str:
    """Waits for a file that the process may write; returns the failure, or an empty text."""
    ready = tmp_path / "ready"
    with subprocess.Popen([sys.executable, "-c", code, str(ready)]) as process:
        try:
            wait_until_ready(process, logs=tmp_path / "logs", probe=ready.exists, what="child")
        except AssertionError as error:
            return str(error)
        finally:
            process.kill()
    return ""


def test_a_process_that_becomes_ready(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    assert outcome(code, tmp_path) == ""


def test_a_process_that_ends_first(tmp_path: Path) -> None:
    assert "ended with code 3" in outcome("raise SystemExit(3)", tmp_path)


def test_a_process_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.waiting.STALLED_AFTER_S", 1.0)
    assert "no progress" in outcome("import time; time.sleep(60)", tmp_path)


def test_slow_progress_ends_at_the_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.waiting.START_LIMIT_S", 3.0)
    assert "not ready after 3 s" in outcome("while True: pass", tmp_path)
