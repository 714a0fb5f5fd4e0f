"""Measures the cost of a crash: kill -9 of each role of a real job, in trajectory-seconds and samples.

    python -m benchmarks.crash_cost [--only ROLE DURABILITY] [--kills N] [--report]

The unit is that of verl's RFC 7579: the time that agents, tools and engine have spent on trajectories that
are then not trained on. The job (benchmarks/crash_run.py) is small and complete: two rollout servers with
agents that mostly wait for their tools (1 to 3 calls of .4 s in the median, at most 2 s), steps of 8 groups
of 4, a checkpoint every 5 steps, all on one machine. Roles are killed in turn, each at a random moment after
the job has settled. After each kill the benchmark waits until the job makes new steps. It restarts the job
itself, at once, only where nothing else would: after a kill of `job`, which is every process at the same
time, as when a machine fails; after a kill of the launcher, whose daemons then end by themselves (the trainer
writes a checkpoint first); and after a kill of the buffer with `buffer.durability=none`, which ends the run.

Measured for each kill (benchmarks/crash_books.py has the arithmetic):

- *lost trajectory-seconds*: from the journal that agents and trainer write continuously (crash_job.py). It
  does not depend on the buffer, so the measure is the same no matter what the buffer keeps. A killed server
  loses the trajectories in progress. A killed trainer loses complete trajectories where the buffer drops
  (`abandoned`) those sampled with weights of undone steps.
- *trained twice*: samples of completed steps that were undone and that were then trained on again; *undone*:
  all samples of those steps. Where the buffer has lost the samples, others are trained on in their place.
- *seconds to repair*: from the kill until the killed role works again. Buffer: its first response to GET
  /status. Server: the first complete trajectory of its new process. Trainer, launcher and job: the first
  completed step. *Until a new step*: until a step is completed that had not been before the kill.

*As peers do it* is the row of `job` with `none`: everything is killed and resumed from the newest checkpoint,
and trajectories in flight and in the buffer are gone. This is what happens after any crash to a job whose
buffer is in memory and whose processes cannot be restarted one by one. Undone steps grow with the interval of
checkpoints, here 5 steps; with the buffer's ledger their samples are kept.

A kill is a line of benchmarks/results/crash_cost.jsonl, appended at the end of its job, which has a few kills
of each role. Kills that are already in the file are not repeated, so the benchmark may be stopped and
continued. At its end it prints the table and draws docs/crash_cost.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from areal_like.paths import RunPaths
from benchmarks import report
from benchmarks.crash_books import Kill, attempts_of, costs
from benchmarks.crash_job import TOOL_TIMES, read_journal
from benchmarks.crash_report import as_table, draw
from benchmarks.crash_run import GROUP_SIZE, GROUPS_PER_STEP, SETTINGS, CrashJob, crash_job
from launch.audit.run import audit_run

ROLES = ("server", "buffer", "trainer", "launcher", "job")
KILLS = {"process_crash": 20, "none": 5, "power_loss": 5}
"""Kills of each role, by buffer.durability."""
_KILLS_OF_JOB = {"process_crash": 10, "none": 10, "power_loss": 5}
"""Kills of role `job`: these are for comparison, and slow."""
JOB_KEY = hashlib.sha256(json.dumps([SETTINGS, TOOL_TIMES]).encode()).hexdigest()[:8]
"""Distinguishes the kills of exactly this job from those of another."""
_ROUNDS_A_JOB = 4
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Makes the missing kills, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs=2, metavar=("ROLE", "DURABILITY"))
    parser.add_argument(
        "--kills", type=positive, help="of each role; default 20 with process_crash, else 5, and 10 of `job`"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=report.RESULTS / "crash_cost.jsonl")
    parser.add_argument("--figure", type=Path, default=report.ROOT / "docs" / "crash_cost.png")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args(argv)
    if args.only and not (args.only[0] in ROLES and args.only[1] in KILLS):
        parser.error(
            f"--only {' '.join(args.only)}: a role is {', '.join(ROLES)}, and then {', '.join(KILLS)}"
        )
    if not args.report:
        wanted = Counter(
            {
                (role, durability): args.kills or (_KILLS_OF_JOB if role == "job" else KILLS)[durability]
                for durability in KILLS
                for role in ROLES
                if args.only in (None, [role, durability])
            }
        )
        run(wanted, args.results, scratch=args.scratch)
    rows = read_rows(args.results)
    if not rows:
        parser.error(f"{args.results} has no kill of this job: omit --report")
    print(as_table(rows))
    draw(rows, args.figure)
    return 0


def positive(text: str) -> int:
    """A number of kills."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a number from 1 on, got {text!r}")
    return int(text)


def read_rows(path: Path) -> list[Row]:
    """The kills of exactly this job; those with other settings are left out."""
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row for row in rows if row["job"]["key"] == JOB_KEY]


def append_rows(path: Path, rows: list[Row]) -> None:
    """Appends kills. Removes an incomplete last line, which a benchmark that was killed may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n") and text:
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run(wanted: Counter[tuple[str, str]], path: Path, *, scratch: Path | None) -> None:
    """Makes the kills that the file does not have yet, one job at a time."""
    number = 0
    while True:
        done = Counter((row["role"], row["durability"]) for row in read_rows(path))
        missing = wanted - done
        if not missing:
            return
        durability = next(each for each in KILLS if any(each == kind for _, kind in missing))
        rounds = [
            [role for role in ROLES if missing[role, durability] > number] for number in range(_ROUNDS_A_JOB)
        ]
        directory = Path(tempfile.mkdtemp(prefix="areal-like-crash-", dir=scratch))
        made = measured(directory, durability, [role for part in rounds for role in part], seed=number)
        append_rows(path, made)
        shutil.rmtree(directory)  # kept when the job fails
        number += 1


def measured(directory: Path, durability: str, roles: list[str], *, seed: int) -> list[Row]:
    """Rows of one job in which these roles are killed in turn."""
    seed += int(time.time())
    with crash_job(directory, durability, seed=seed) as job:
        loads = []
        for role in roles:
            loads.append(round(os.getloadavg()[0], 2))
            job.kill(role)
            print(f"{time.strftime('%H:%M:%S')} {durability} {job.kills[-1]}", file=sys.stderr, flush=True)
        return rows_of(job, durability, loads)


def rows_of(job: CrashJob, durability: str, loads: list[float]) -> list[Row]:
    """Ends the job and computes the rows."""
    kills: list[Kill] = job.kills
    stopped_s, last_step = job.stop()
    attempts = attempts_of(
        read_journal(job.journal), kills, groups_per_step=GROUPS_PER_STEP, last_step=last_step
    )
    found = costs(attempts, kills, samples_per_step=GROUP_SIZE * GROUPS_PER_STEP, until_s=stopped_s)
    summary = json.loads(RunPaths(job.root).summary.read_text())
    is_clean = audit_run(job.root).is_clean if durability != "none" else None
    return [
        {
            "role": kill.role,
            "durability": durability,
            **{name: round(value, 3) for name, value in asdict(cost).items()},
            "undone_steps": kill.num_undone,
            "load": load,
            "job": {
                "key": JOB_KEY,
                "trajectories": len(attempts),
                "drops": summary["drops"],
                "audit_is_clean": is_clean,
            },
            **report.machine(),
        }
        for kill, cost, load in zip(kills, found, loads, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
