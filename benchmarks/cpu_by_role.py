"""CPU time of an optimizer step, by role and by thread.

    python -m benchmarks.cpu_by_role [--steps 200] [--warm-up 30] [--config FILE] [key=value ...]

Runs a job as `areal-like run` does, by default the default job without evaluations, and reads the CPU time
(user and system) of all its processes between two optimizer steps: trainer ranks, engines, rollout servers,
buffers, task workers (rewards, environments, agents), the launcher, and whatever these have started. Prints
milliseconds per step, per sample and per thousand tokens of the samples (prompt and completion, including
groups without a learning signal, which are not run), and the threads of each role.

CPU time depends less on other load than wall time does, but is not independent of it: two hyper-threads share
one core, and caches are shared too. The result states whether the machine was quiet.

The time of a process is read from /proc/PID/stat: its own time, including threads that have ended, and the
time of children that it has waited for. A program that a tool starts and that ends within a step therefore
counts for its parent's role. The time of threads is read from /proc/PID/task/TID/schedstat. Writes
benchmarks/results/cpu_by_role.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, table, write
from launch.local_job.child import RUN_MARKER

ROLES = {
    "launch": "launcher",
    "trainer": "trainer",
    "buffer": "buffer",
    "rollout_server": "rollout server",
    "rollout_server.engine": "engine",
    "sglang.launch_server": "engine",
    "rollout_server.workers.zygote": "task workers",
}
"""Module of `python -m` -> role. Another process has the role of the nearest ancestor that has one."""
OWN_SETTINGS = ("eval.num_prompts=0",)
_TICK_MS = 1e3 / os.sysconf("SC_CLK_TCK")
_MIN_THREAD_MS = 0.05
"""Threads that use less than this, in milliseconds per step, are not listed in the result."""
_MIN_SHOWN_MS = 1.0
"""The same for the table."""


@dataclass(kw_only=True)
class Usage:
    """CPU time of a job's processes up to one moment, in milliseconds."""

    by_role: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_thread: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """By (role, thread)."""
    num_processes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Process:
    """One line of the process table."""

    parent: int
    cpu_ms: float
    """CPU time of the process and of its children that have ended."""
    words: tuple[str, ...]
    """The command line."""


def used(launcher: int, root: Path) -> Usage:
    """CPU time of the launcher and of all processes of its run, whose directory is `root`."""
    found = {launcher: read_process(launcher)} | {pid: read_process(pid) for pid in marked(root)}
    living = {pid: process for pid, process in found.items() if process is not None}
    usage = Usage()
    for pid, process in living.items():
        role = role_of(pid, living)
        usage.by_role[role] += process.cpu_ms
        usage.num_processes[role] += 1
        for name, cpu_ms in threads(pid):
            usage.by_thread[role, name] += cpu_ms
    return usage


def marked(root: Path) -> list[int]:
    """The processes that carry the marker of a run."""
    prefix, found = f"{RUN_MARKER}={root}:".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        # OSError: the process has meanwhile ended, or belongs to another user.
        with contextlib.suppress(OSError):
            if any(word.startswith(prefix) for word in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def read_process(pid: int) -> Process | None:
    """The process; None if it has ended."""
    try:
        # The name in brackets may contain spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return Process(
        parent=int(fields[1]), cpu_ms=_TICK_MS * sum(map(int, fields[11:15])), words=tuple(words[:-1])
    )


def threads(pid: int) -> list[tuple[str, float]]:
    """Name and CPU time of each living thread. The threads of a pool (`name_3`) share one name."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            if int(task.name) == pid:
                name = "main"
            cpu_ms = int((task / "schedstat").read_text().split()[0]) / 1e6
            found.append((name.rstrip("0123456789").rstrip("_-/") or name, cpu_ms))
    return found


def role_of(pid: int, living: dict[int, Process]) -> str:
    """The role of the process or of its nearest ancestor with a role; `other` if there is none."""
    while (process := living.get(pid)) is not None:
        if (role := own_role(process.words)) is not None:
            return role
        pid = process.parent
    return "other"


def own_role(words: Sequence[str]) -> str | None:
    """The role that a command line names."""
    for flag, module in itertools.pairwise(words):
        if flag == "-m" and module in ROLES:
            return ROLES[module]
    return None


def measured(overrides: Sequence[str], *, warm_up: int, num_steps: int, runs_dir: Path) -> dict[str, Any]:
    """Runs a job until `num_steps` steps after the warm-up; returns its CPU time in between."""
    named = {setting.partition("=")[0] for setting in overrides}
    own = [setting for setting in OWN_SETTINGS if setting.partition("=")[0] not in named]
    root = runs_dir.resolve() / "job"
    # More steps than are measured: the job makes steps while it is being read, and is drained at the end.
    last_step = 2 * (warm_up + num_steps) + 50
    last = [f"name={root.name}", f"runs_dir={root.parent}", f"trainer.num_steps={last_step}"]
    command = [sys.executable, "-m", "launch", "run", *own, *overrides, *last]
    with (runs_dir / "out").open("wb") as out:
        job = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        first = wait_for_rows(root / "metrics.jsonl", warm_up, job=job, out=runs_dir / "out")
        before, begun_s = used(job.pid, root), time.monotonic()
        end = wait_for_rows(root / "metrics.jsonl", first + num_steps, job=job, out=runs_dir / "out")
        after, ended_s = used(job.pid, root), time.monotonic()
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=120)
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()[first:end]]
    return difference(before, after, rows=rows, seconds=ended_s - begun_s)


def wait_for_rows(path: Path, count: int, *, job: subprocess.Popen[bytes], out: Path) -> int:
    """Waits until this many steps are done; returns the number done. Raises RuntimeError if the job ends
    first."""
    while (found := num_rows(path)) < count:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended before step {count}:\n{out.read_text()[-2000:]}")
        time.sleep(0.01)
    return found


def num_rows(path: Path) -> int:
    """Number of steps in the metrics file; 0 if it does not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def difference(before: Usage, after: Usage, *, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Milliseconds per step between two moments, by role and by thread."""
    num_steps = len(rows)
    num_samples = sum(row["num_sequences"] for row in rows)
    num_tokens = sum(
        row["num_sequences"] * (row["prompt_tokens"] + row["response_length_mean"]) for row in rows
    )
    roles: dict[str, Any] = {}
    for role in after.by_role:
        step_ms = (after.by_role[role] - before.by_role[role]) / num_steps
        by_thread = {
            name: (cpu_ms - before.by_thread[of, name]) / num_steps
            for (of, name), cpu_ms in after.by_thread.items()
            if of == role
        }
        roles[role] = {
            "processes": after.num_processes[role],
            "step_ms": round(step_ms, 2),
            "sample_ms": round(step_ms * num_steps / num_samples, 3),
            "thousand_tokens_ms": round(1e3 * step_ms * num_steps / num_tokens, 2),
            "threads_ms": {
                name: round(cpu_ms, 2)
                for name, cpu_ms in sorted(by_thread.items(), key=lambda item: -item[1])
                if cpu_ms >= _MIN_THREAD_MS
            },
            # Threads and children that have ended, and threads too small to be listed.
            "rest_ms": round(step_ms - sum(ms for ms in by_thread.values() if ms >= _MIN_THREAD_MS), 2),
        }
    return {
        "steps": num_steps,
        "seconds": round(seconds, 2),
        "samples_per_step": round(num_samples / num_steps, 1),
        "tokens_per_step": round(num_tokens / num_steps, 1),
        "step_ms": round(sum(role["step_ms"] for role in roles.values()), 2),
        "roles": dict(sorted(roles.items(), key=lambda item: -item[1]["step_ms"])),
    }


def as_table(result: dict[str, Any]) -> str:
    """The table of docs/results.md: a row for each role, then their sum."""
    header = ["role", "processes", "CPU ms a step", "a sample", "1,000 tokens", "threads"]
    rows: list[list[object]] = [
        [
            role_name,
            role["processes"],
            f"{role['step_ms']:.1f}",
            f"{role['sample_ms']:.2f}",
            f"{role['thousand_tokens_ms']:.2f}",
            ", ".join(f"{name} {ms:.1f}" for name, ms in role["threads_ms"].items() if ms >= _MIN_SHOWN_MS),
        ]
        for role_name, role in result["roles"].items()
    ]
    per_sample = result["step_ms"] / result["samples_per_step"]
    per_thousand = 1e3 * result["step_ms"] / result["tokens_per_step"]
    total = ["all", "", f"{result['step_ms']:.1f}", f"{per_sample:.2f}", f"{per_thousand:.2f}", ""]
    return table(header, [*rows, total])


def main() -> None:
    """Measures one job and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps that are measured")
    parser.add_argument("--warm-up", type=int, default=30, help="optimizer steps before")
    parser.add_argument("--to", default="cpu_by_role", help="name of the result's file")
    args, overrides = parser.parse_known_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(overrides, warm_up=args.warm_up, num_steps=args.steps, runs_dir=Path(scratch))
    result = {"overrides": overrides, "load_before": load, "was_quiet": load < 0.5} | result
    write(args.to, result)
    print(as_table(result))
    if not result["was_quiet"]:
        print(f"The machine was not quiet before (load {load:.1f}).")


if __name__ == "__main__":
    main()
