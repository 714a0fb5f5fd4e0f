"""The built wheel, installed into an empty environment, runs the default job outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def _run(*command: str | Path, cwd: Path, timeout_s: float) -> str:
    """Output of a command that succeeds, without the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MAKELEVEL")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_installed_wheel_runs_the_default_job(tmp_path: Path) -> None:
    # From a copy: setuptools would pack whatever an earlier build has left in build/.
    source = tmp_path / "source"
    leave_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "outputs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave_out)
    _run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source),
        cwd=tmp_path,
        timeout_s=300,
    )
    (wheel,) = tmp_path.glob("areal_like-*.whl")
    environment = tmp_path / "environment"
    _run(sys.executable, "-m", "venv", environment, cwd=tmp_path, timeout_s=120)
    pip = (environment / "bin" / "python", "-m", "pip", "install", "-q", "-q")
    _run(*pip, "-r", ROOT / "requirements.txt", cwd=tmp_path, timeout_s=900)
    # With dependencies: the pinned versions must satisfy those of the wheel, so nothing more is fetched.
    _run(*pip, wheel, cwd=tmp_path, timeout_s=300)
    home = _run(
        *(environment / "bin" / "python", "-c", "import launch; print(launch.__file__)"),
        cwd=tmp_path,
        timeout_s=60,
    )
    assert Path(home.strip()).is_relative_to(environment)
    command = environment / "bin" / "areal-like"
    _run(command, "run", "name=x", cwd=tmp_path, timeout_s=600)
    summary = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())
    assert summary["steps"] == 600 and summary["eval_after"] > 0.9, summary
    _run(command, "audit", "x", cwd=tmp_path, timeout_s=120)
