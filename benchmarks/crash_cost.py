"""What a crash costs: every role of a running job is killed with SIGKILL, again and again.

    python -m benchmarks.crash_cost [--only DURABILITY:ROLE ...] [--kills N]   runs what has no result yet
    python -m benchmarks.crash_cost --table                                    the table, docs/crash_cost.png

The unit is that of verl's RFC 7579. For each kill: the trajectory-seconds that were lost (time of generation
whose samples are never trained on because of the kill), the samples that were trained on a second time, and
the seconds until the job was repaired. The job: two rollout servers with an embedded engine each, 32 samples
a step of 48 tokens, a checkpoint every 10 steps, `max_staleness` 4.

Roles: `server`, `trainer`, `buffer`, `launcher` (the daemons of a killed launcher drain; `resume=auto`
follows at once), and `restart`: all processes are killed, and the job continues from its newest checkpoint
with an empty buffer (`resume=latest`, the ledger removed). That is what a framework does whose samples live
in its processes' memory and whose job ends with any of its processes.

Lost seconds are measured. Of a killed server: the time that its samples in progress had taken
(`sample_seconds_in_progress` of its last heartbeat, at most .2 s old), and its unacknowledged samples. Of the
other servers: the spans of samples that were cancelled. Of the buffer: samples that it refused or dropped
after the kill. A sample without a time of its own counts as the mean sample of the job. After a `restart`,
and after the end of a buffer with `buffer.durability=none`, all samples are lost that the buffer had accepted
beyond the checkpoint, and all in progress. Trained twice: the tickets in the ledger's table `rollbacks`, or
the steps beyond the checkpoint. Repaired: the trainer has completed a step that it had not before; a killed
server has delivered a sample. Appends to benchmarks/results/crash_cost.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.crash_cost_job import CrashedJob
from benchmarks.crash_cost_report import draw, rows_of
from benchmarks.report import RESULTS, ROOT, machine, table

RESULT = RESULTS / "crash_cost.jsonl"
ROLES = ("server", "trainer", "buffer", "launcher")
PLAN = {
    **{("process_crash", role): 20 for role in (*ROLES, "restart")},
    **{(durability, role): 5 for durability in ("power_loss", "none") for role in ROLES},
}
"""(durability, role) -> kills."""
KILLS_A_JOB = 10


def results() -> Iterator[dict[str, object]]:
    """The kills that have been measured."""
    if RESULT.exists():
        yield from map(json.loads, RESULT.read_text().splitlines())


def main() -> None:
    """Runs the kills that are missing, or prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[":".join(kind) for kind in PLAN])
    parser.add_argument("--kills", type=int, help="instead of the planned number of each kind")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        for kind, planned in PLAN.items():
            if ":".join(kind) in args.only:
                _measure(*kind, num_kills=planned if args.kills is None else args.kills)
    header, rows = rows_of(list(results()))
    print(table(header, rows))
    draw(list(results()), ROOT / "docs" / "crash_cost.png")


def _measure(durability: str, role: str, *, num_kills: int) -> None:
    done = sum((row["durability"], row["role"]) == (durability, role) for row in results())
    while done < num_kills:
        kills = min(KILLS_A_JOB, num_kills - done)
        with tempfile.TemporaryDirectory(prefix="crash-cost-") as scratch:
            job = CrashedJob(Path(scratch), durability=durability)
            try:
                job.start()
                for number in range(kills):
                    job.kill(
                        role, after_s=random.Random(f"{durability} {role} {done + number}").uniform(2, 5)
                    )
            finally:
                job.close()
            measured = job.finish()
        with RESULT.open("a") as file:
            for row in measured:
                row = {"machine": machine(), "durability": durability, "role": role} | row
                file.write(json.dumps(row) + "\n")
                print(row, flush=True)
        done += kills


if __name__ == "__main__":
    main()
