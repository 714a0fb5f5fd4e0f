"""The command line: one message and exit code 2 for a mistake, and a quick start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def areal_like(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-m", "launch", *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "unknown command 'rnu': did you mean `run`?"),
        (["run", "trainer.num_stpes=3"], "unknown key `trainer.num_stpes`: did you mean `trainer.num_steps`?"),
        (["run", "trainer.num_steps=0"], "trainer.num_steps must be at least 1"),
        (["run", "max_staleness=soon"], "max_staleness"),
        (["run", "objective=magic"], "known choices are"),
        (["run", "fast"], "key=value"),
        (["run", "--config", "nowhere.yaml"], "no such file"),
        (["run", "resume=latest"], "there is no run in"),
        (["run", "runs_dir=/proc/1/nowhere"], "cannot create the run directory"),
        (["status", "nowhere"], "no run 'nowhere'"),
        (["audit", "nowhere"], "no run 'nowhere'"),
        (["audit"], "name one run"),
        (["drop", "nowhere"], "drop: name one run"),
        (["replay", "objective=ppo"], "replay: name one run"),
        (["status"], "name one run"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(args: list[str], message: str, tmp_path: Path) -> None:
    done = areal_like(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    assert not list(tmp_path.iterdir()), "a mistake left something behind"


def test_help_names_the_keys_with_their_defaults(tmp_path: Path) -> None:
    done = areal_like("run", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "trainer.num_steps=" in done.stdout and "max_staleness=4" in done.stdout and "model=smollm2|tiny" in done.stdout
    assert len(done.stdout.splitlines()) < 80


def test_the_command_imports_neither_torch_nor_a_daemon() -> None:
    code = (
        "import sys, launch.cli, launch.run; "
        "print([name for name in ('torch', 'transformers', 'buffer', 'trainer', 'rollout_server') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
