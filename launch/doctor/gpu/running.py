"""Runs the stages of `areal-like doctor --gpu`, each in its own process with a time limit. No torch here.

A stage that raises, crashes or hangs fails alone: its process group is killed, and what it had written until
then is its result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.doctor.gpu.report import StageResult
from launch.doctor.gpu.stages import TOTAL_S, Measured, Outcome, Request, Stage, Verdict, failed, skipped

_HANG = "run it again; if it hangs at the same place, send us the file"
_CRASH = "send us the file"
_TAIL_BYTES = 1 << 16
_KILL_S = 10.0
"""Longest wait for the end of a killed stage: one that hangs in the driver does not end."""
_ERROR = re.compile(r"[\w.]*(?:Error|Exception)\b|.*\berror:")


def run_stages(
    stages: Sequence[Stage],
    request: Request,
    *,
    on_start: Callable[[Stage], None] = lambda stage: None,
    total_s: float = TOTAL_S,
) -> Iterator[StageResult]:
    """Runs the stages in order and yields their results.

    `request.scratch` must exist and belong to the user only. After a needed stage has failed, and after
    `total_s`, the others are skipped.
    """
    scratch = Path(request.scratch)
    (scratch / "request.json").write_text(request.to_json())
    started_s = time.monotonic()
    lost = ""
    for stage in stages:
        left_s = total_s - (time.monotonic() - started_s)
        if lost or left_s <= 0:
            reason = lost or f"the {total_s:g} s of all stages are over"
            yield StageResult(stage=stage, verdict=skipped(reason), seconds=0.0)
            continue
        on_start(stage)
        result = _run(stage, scratch, limit_s=min(stage.limit_s, left_s))
        if stage.is_needed and result.verdict.outcome is Outcome.FAILED:
            lost = f"needs {stage.name}"
        yield result


def _run(stage: Stage, scratch: Path, *, limit_s: float) -> StageResult:
    started_s = time.monotonic()
    log = scratch / f"{stage.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.doctor.gpu.process", stage.name, str(scratch)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    code: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=limit_s)
    finally:
        # Also its ranks, which are in its group. Engines have groups of their own and die with their parent.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_KILL_S)
    measured, place, verdict = read_notes(scratch / f"{stage.name}.jsonl")
    errors, last = _ends_with(log)
    if verdict is None and code is None:
        verdict = failed(f"did not end within {limit_s:.0f} s, at: {place}", _HANG)
    elif verdict is None:
        verdict = failed(f"{errors or last or f'exit code {code}'} (at: {place})", _CRASH)
    elif verdict.outcome is Outcome.FAILED and errors:  # of a rank or an engine
        verdict = replace(verdict, reason=f"{verdict.reason}; its log has: {errors}")
    return StageResult(stage=stage, verdict=verdict, seconds=time.monotonic() - started_s, measured=measured)


def read_notes(path: Path) -> tuple[dict[str, Measured], str, Verdict | None]:
    """(what the stage has measured, where it was last, its verdict)"""
    measured: dict[str, Measured] = {}
    place, verdict = "starting", None
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:  # killed while it wrote the last line
            continue
        measured |= found.get("measured", {})
        place = found.get("at", place)
        if given := found.get("verdict"):
            verdict = Verdict(**{**given, "outcome": Outcome(given["outcome"])})
    return measured, place, verdict


def _ends_with(log: Path) -> tuple[str, str]:
    """(the last line of a process's output that names an error, its last line); empty without one."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or [""])[-1], (lines or [""])[-1]
