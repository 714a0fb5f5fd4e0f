"""Helpers of the launcher's tests: a launcher as a process, waiting for its progress, its process table."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.local_job.child import RUN_MARKER
from tests.support import warm_start

ROOT = Path(__file__).resolve().parents[2]
STALL_LIMIT_S = 240.0
"""A wait fails when the run's logs and metrics have not grown for this time."""
WAIT_LIMIT_S = 600.0
"""A wait fails after this time in any case. The limit ends a hang; it does not measure speed."""
TEST_LIMIT_S = 1800
"""pytest's limit for tests that wait; above the sum of their waits."""
Process = subprocess.Popen[str] | subprocess.Popen[bytes]
_ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "MAKELEVEL"}
"""The environment of a user who types `areal-like run`, also under `make test`."""


@contextlib.contextmanager
def launcher(
    *settings: str,
    cwd: Path,
    environment: dict[str, str] | None = None,
    verb: str = "run",
    is_forked: bool = True,
) -> Iterator[subprocess.Popen[str]]:
    """`areal-like run`, or another verb, with its run directories under `cwd/runs`, in a new session.

    The process is killed at the end if it still runs. `is_forked`: it and its daemons are forks of a process
    with their imports (warm_start.py); otherwise they start as a user's.
    """
    start = warm_start.Popen if is_forked else subprocess.Popen
    process = start(
        [sys.executable, "-m", "launch", verb, *settings],
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
    """Runs `areal-like WORDS`, as a user would in another shell, and waits for its end."""
    return warm_start.run(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=_ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def processes_of(run_root: Path) -> dict[int, str]:
    """pid -> command line of every living process that a launcher of this run directory has started.

    Processes that its daemons have started are included.
    """
    marker = f"{RUN_MARKER}={run_root}:".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(item.startswith(marker) for item in (folder / "environ").read_bytes().split(b"\0")):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
    return found


def wait_until(
    condition: Callable[[], object],
    *,
    what: str,
    run_root: Path | None = None,
    process: Process | None = None,
    timeout_s: float = WAIT_LIMIT_S,
) -> None:
    """Polls until `condition()` is true.

    Fails with `what` in the message if `process` ends first, if no log of `run_root` grows for
    STALL_LIMIT_S, or after `timeout_s`. A slow machine that makes progress does not fail the wait.
    """
    started_s = changed_s = time.monotonic()
    before: dict[str, int] = {}
    while not condition():
        now_s = time.monotonic()
        if process is not None and process.poll() is not None:
            assert condition(), f"exit code {process.returncode} before: {what}"
            return
        if run_root is not None and (state := _sizes(run_root)) != before:
            before, changed_s = state, now_s
        is_stalled = run_root is not None and now_s - changed_s > STALL_LIMIT_S
        assert not is_stalled, f"nothing has moved for {STALL_LIMIT_S:.0f} s before: {what}"
        assert now_s - started_s < timeout_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


def _sizes(run_root: Path) -> dict[str, int]:
    """Sizes of the files that grow while the run makes progress."""
    sizes = {}
    with contextlib.suppress(FileNotFoundError):  # a launcher that refuses to start removes its run directory
        for path in [run_root / "metrics.jsonl", *(run_root / "logs").iterdir()]:
            if path.exists():
                sizes[path.name] = path.stat().st_size
    return sizes


def wait_for_steps(num_steps: int, run_root: Path, *, process: subprocess.Popen[str] | None = None) -> None:
    """Waits until metrics.jsonl has more than `num_steps` rows; fails when `process` ends before."""
    wait_until(
        lambda: num_steps_done(run_root) > num_steps,
        what=f"step {num_steps}",
        run_root=run_root,
        process=process,
    )


def finish(process: subprocess.Popen[str], run_root: Path) -> tuple[int, str, str]:
    """Waits for the end of a launcher; returns its exit code, stdout and stderr."""
    wait_until(lambda: process.poll() is not None, what="the end of the launcher", run_root=run_root)
    out, err = process.communicate()
    return process.returncode, out, err


def num_steps_done(run_root: Path) -> int:
    """The number of optimizer steps in metrics.jsonl."""
    path = run_root / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def launcher_log(run_root: Path) -> list[str]:
    """The messages in the launcher's log."""
    path = run_root / "logs" / "launcher.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["message"] for line in lines]


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
