"""What `status`, `why` and `top` say of a run that has ended."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config
from launch.cli import main
from launch.report.ended import read_end
from launch.run_directory.kept_settings import keep
from tests.support.report_runs import log_entry, row, write_run

EXIT = "areal_like.runtime.exit"
FAILED = {
    "trainer-0": [log_entry("no group for step 5\x1b[2J", level="ERROR", time_s=9.0, logger=EXIT)],
    "launcher": [log_entry("trainer died 4 times in a row", level="ERROR", time_s=10.0)],
}


def run_of(folder: Path, *, steps: tuple[int, ...] = (), **content: Any) -> Path:
    """A run that a launcher has begun, with five steps and these checkpoints."""
    root = write_run(folder / "runs" / "x", [row(step) for step in range(5)], **content)
    (root / ".lock").touch()
    for step in steps:
        (root / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"summary": {"finished": True}, "steps": (5,)},
            ["finished", "all 5 steps", "name=x resume=latest trainer.num_steps=MORE  (trains more steps)"],
        ),
        (
            {"summary": {"finished": False}, "steps": (2, 4)},
            ["drained", "stopped after 5 steps", "resume=latest  (from step 4, its newest checkpoint)"],
        ),
        ({"logs": FAILED}, ["failed", "trainer-0: no group for step 5\\x1b[2J", "(from step 0: it has no"]),
        ({}, ["ended", "killed, or its machine was lost"]),
    ],
)
def test_a_run_says_how_it_ended_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any],
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    root = run_of(tmp_path, **content)
    # A daemon that was killed has left this.
    write_json(root / "endpoints" / "rollout-0.json", {"role": "rollout", "pid": 1, "http": "127.0.0.1:1"})
    for verb in ("status", "why", "top"):
        assert main([verb, "x"]) == 1
        out, err = capsys.readouterr()
        lines = (out + err).splitlines()
        assert lines[0].endswith("no daemon is running") and lines[1].startswith(f"{expected[0]} at 20")
        assert all(part in out + err for part in expected)
        assert ("last error: launcher, " in out + err) == ("logs" in content)
    for verb in ("status", "why"):
        assert main([verb, "x", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["ended"]["how"] == expected[0]


def test_the_newest_changes_of_settings_are_shown(tmp_path: Path) -> None:
    root = run_of(tmp_path, steps=(4,))
    paths = RunPaths(root)
    for rate in ("1e-5", "2e-5", "3e-5", "4e-5"):
        keep(load_config(["--config", str(paths.config), f"trainer.lr={rate}"]), paths, by="resume")
    end = read_end(root)
    assert end is not None and len(end.settings) == 3
    assert end.settings[-1].endswith("from step 4 on (resume): trainer.lr: 3e-05 -> 4e-05")
    assert end.next_command == f"areal-like run name=x runs_dir={root.parent} resume=latest"


def test_a_run_that_goes_on_has_no_end(tmp_path: Path) -> None:
    root = run_of(tmp_path)
    held = os.open(root / ".lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert read_end(root) is None
    os.close(held)
    (root / ".lock").unlink()  # its roles were started by hand
    end = read_end(root)
    assert end is not None and end.lines()[-1] == "next: start its roles again, with resume=latest"
