"""`areal-like scale RUN N`: the number of rollout servers of a run that Slurm or Ray runs.

More: it submits jobs. Fewer: it drains the newest servers, which return their leases and then their
allocations. On Ray the driver of the run does both. Which number is useful says `areal-like why RUN`.
"""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.parser import RUN, argument, command
from launch.ray.wanted import MOST, directory_of, want_servers
from launch.run_directory.rundir import find_run
from launch.slurm.pool import add_servers, remove_servers, servers, to_end
from launch.slurm.script import scripts_of


@command(
    "scale",
    "Change the number of rollout servers of a run on Slurm or Ray: start more, or drain the newest. "
    "`areal-like why RUN` says whether more would make it faster.",
    RUN,
    argument("number", metavar="N", type=int, help="rollout servers that the run shall have"),
    examples=["scale myrun 8"],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when new jobs are in the queue, or when the drained ones have left it."""
    if not 1 <= args.number <= MOST:
        raise ConfigError(f"scale: {args.number} rollout servers: use 1 to {MOST}")
    paths = RunPaths(find_run(args.run).resolve())
    config = load_config(["--config", str(paths.config)])
    if directory_of(paths).is_dir() and not scripts_of(paths).is_dir():
        want_servers(paths, args.number)
        print(f"the run's driver is told: {args.number} rollout servers")
        return 0
    if not scripts_of(paths).is_dir():
        raise ConfigError(
            f"scale: neither Slurm nor Ray runs {paths.root.name}: add a server with `areal-like rollout "
            f"{paths.root.name} --join`, end one with `areal-like drain {paths.root.name} SERVER`; "
            "rollout.num_servers counts at the next start"
        )
    jobs = servers(config, paths)
    surplus = to_end(jobs, args.number)
    if len(jobs) < args.number:
        numbers = add_servers(config, paths, args.number - len(jobs))
        print(f"{len(jobs)} -> {args.number}: job {', '.join(map(str, numbers))} submitted")
    elif surplus:
        names = ", ".join(str(job.job_id) for job in surplus)
        print(f"{len(jobs)} -> {args.number}: job {names} drains", flush=True)
        remove_servers(config, paths, surplus)
    else:
        print(f"the run has {args.number} rollout jobs")
    return 0
