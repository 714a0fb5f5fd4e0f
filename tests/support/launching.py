"""Helpers of the launcher's tests: a launcher as a process, and what it left in the process table."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.local_job.child import RUN_MARKER

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "MAKELEVEL"}
"""Ours, but as of a person who types `areal-like run`, also under `make test`."""


@contextlib.contextmanager
def launcher(
    *settings: str, cwd: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`areal-like run` with its run directories under `cwd/runs`, in a session of its own; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "run", *settings],
        cwd=cwd,
        env=_ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def areal_like(
    *words: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`areal-like WORDS` in another shell, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=_ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def processes_of(run_root: Path) -> dict[int, str]:
    """pid -> command line of every living process that a launcher of this run directory has started, directly or not."""
    marker = f"{RUN_MARKER}={run_root}:".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(item.startswith(marker) for item in (folder / "environ").read_bytes().split(b"\0")):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
    return found


def wait_until(condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
    """Polls until `condition()` is true; fails with `what` otherwise."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def num_steps_done(run_root: Path) -> int:
    """Optimizer steps that metrics.jsonl tells of."""
    path = run_root / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
