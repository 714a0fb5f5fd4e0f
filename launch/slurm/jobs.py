"""The jobs of a run on Slurm: a buffer, a trainer, and one for each rollout server, score server and router.

The pool of servers grows and shrinks by whole jobs. Job arrays are not used, because a job cannot be added to
an array later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from launch.nodes.settings import counts_of, make_directory
from launch.nodes.start import ALL_ROLES
from launch.slurm.options import scripts_of
from launch.slurm.scheduler import Job, end_job, jobs_in_queue, run_command, submit
from launch.slurm.script import job_name

_TICK_S = 0.5
_MARGIN_S = 60.0


def jobs_of(config: Config, paths: RunPaths, *roles: str) -> list[Job]:
    """The jobs of these roles in the queue, oldest first."""
    return jobs_in_queue(paths.root, [job_name(config, role) for role in roles])


def begin(config: Config, scripts: Mapping[str, str], *, num_servers: int) -> dict[str, list[int]]:
    """Writes the run's directory with its scripts, and submits its jobs; returns their numbers by role.

    If one is refused, or Ctrl-C comes, those before it are cancelled. Raises ConfigError, also if jobs of the
    run are in the queue or a launcher runs it.
    """
    paths = RunPaths.of(config)
    if jobs := jobs_of(config, paths, *ALL_ROLES):
        numbers = ", ".join(str(job.job_id) for job in jobs)
        raise ConfigError(
            f"{paths.root} has jobs already ({numbers}): `areal-like scale` changes the number of its "
            f"rollout servers, `scancel {numbers.replace(',', '')}` drains the run"
        )
    make_directory(config, folders=[scripts_of(paths)])
    try:
        for role, text in scripts.items():
            (scripts_of(paths) / f"{role}.sh").write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {paths.root}: {error.strerror}") from None
    counts = counts_of(config, num_servers=num_servers)
    submitted: dict[str, list[int]] = {role: [] for role in counts}
    after: list[str] = []
    try:
        for role in (role for role, number in counts.items() for _ in range(number)):
            submitted[role].append(submit(scripts_of(paths) / f"{role}.sh", *after))
            # A job that started before the buffer's job would hold its nodes idle.
            after = [f"--dependency=after:{submitted['buffer'][0]}"]
    except (ArealError, KeyboardInterrupt):
        if begun := [str(number) for each in submitted.values() for number in each]:
            run_command("scancel", "--quiet", *begun)
        raise
    return submitted


def add_servers(config: Config, paths: RunPaths, number: int) -> list[int]:
    """Submits rollout jobs to a run whose buffer is in the queue; returns their numbers.

    Raises ConfigError.
    """
    script = scripts_of(paths) / "rollout.sh"
    buffers = jobs_of(config, paths, "buffer")
    if not script.is_file() or not buffers:
        raise ConfigError(
            f"{paths.root} has no jobs in the queue: start or continue it with `areal-like submit --slurm "
            f"name={paths.root.name}`"
        )
    after = f"--dependency=after:{buffers[0].job_id}"
    return [submit(script, after) for _ in range(number)]


def to_end(jobs: Sequence[Job], number: int) -> list[Job]:
    """The jobs to end so that `number` of them remain: pending jobs before running ones, newest first."""
    by_cost = sorted(jobs, key=lambda job: (not job.is_pending, -job.job_id))
    return by_cost[: max(0, len(jobs) - number)]


def remove_servers(config: Config, paths: RunPaths, jobs: Sequence[Job]) -> None:
    """Drains these jobs, and waits until they have left the queue. Raises ArealError if one stays."""
    for job in jobs:
        end_job(job)
    deadline_s = time.monotonic() + config.daemon.drain_timeout_s + _MARGIN_S
    ending = {job.job_id for job in jobs}
    while left := ending & {job.job_id for job in jobs_of(config, paths, "rollout")}:
        if time.monotonic() > deadline_s:
            raise ArealError(f"jobs {sorted(left)} have not ended: see their output in {paths.logs}")
        time.sleep(_TICK_S)
