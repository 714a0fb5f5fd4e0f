"""`areal-like scale RUN N`: the number of rollout servers of a run that Slurm or Ray runs.

More: it submits jobs. Fewer: it drains the newest servers, which return their leases and then their
allocations. On Ray the driver of the run does both. `areal-like why RUN` says whether more servers would
help.
"""

from __future__ import annotations

import argparse
import sys

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from launch.commands.parser import RUN, argument, command
from launch.nodes.settings import MOST_SERVERS
from launch.nodes.start import read_run
from launch.ray.driver import directory_of, want_servers
from launch.slurm.jobs import add_servers, jobs_of, remove_servers, to_end
from launch.slurm.options import scripts_of


@command(
    "scale",
    "Change the number of rollout servers of a run on Slurm or Ray: start more, or drain the newest. "
    "`areal-like why RUN` says whether more would make it faster.",
    RUN,
    argument("number", metavar="N", type=int, help="number of rollout servers that the run should have"),
    examples=["scale myrun 8"],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when new jobs are in the queue, or when the drained ones have left it."""
    if not 1 <= args.number <= MOST_SERVERS:
        raise ConfigError(f"scale: {args.number} rollout servers: use 1 to {MOST_SERVERS}")
    paths, config = read_run(args.run)
    if scripts_of(paths).is_dir():
        _scale_jobs(config, paths, args.number)
    elif directory_of(paths).is_dir():
        want_servers(paths, args.number)
        sys.stdout.write(f"the run's driver was told to run {args.number} rollout servers\n")
    else:
        raise ConfigError(
            f"scale: neither Slurm nor Ray runs {paths.root.name}: add a server with `areal-like rollout "
            f"{paths.root.name} --join`, end one with `areal-like drain {paths.root.name} SERVER`; "
            "rollout.num_servers applies at the next start"
        )
    return 0


def _scale_jobs(config: Config, paths: RunPaths, number: int) -> None:
    """Submits or drains rollout jobs of Slurm, so that `number` are left."""
    jobs = jobs_of(config, paths, "rollout")
    surplus = to_end(jobs, number)
    if len(jobs) < number:
        added = add_servers(config, paths, number - len(jobs))
        sys.stdout.write(f"{len(jobs)} -> {number}: job {', '.join(map(str, added))} submitted\n")
    elif surplus:
        names = ", ".join(str(job.job_id) for job in surplus)
        sys.stdout.write(f"{len(jobs)} -> {number}: job {names} drains\n")
        sys.stdout.flush()
        remove_servers(config, paths, surplus)
    else:
        sys.stdout.write(f"the run has {number} rollout jobs\n")
