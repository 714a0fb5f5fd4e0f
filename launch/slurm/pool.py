"""The pool of rollout servers of a run on Slurm: one job each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from launch.slurm.scheduler import Job, end_job, jobs_in_queue, submit
from launch.slurm.script import job_name, scripts_of

_TICK_S = 0.5
_MARGIN_S = 60.0


def add_servers(config: Config, paths: RunPaths, number: int) -> list[int]:
    """Submits rollout jobs to a run whose buffer is in the queue; returns their numbers.

    Raises ConfigError.
    """
    script = scripts_of(paths) / "rollout.sh"
    buffers = jobs_in_queue(paths.root, [job_name(config, "buffer")])
    if not script.is_file() or not buffers:
        raise ConfigError(
            f"{paths.root} has no jobs in the queue: start or continue it with `areal-like submit --slurm "
            f"name={paths.root.name}`"
        )
    after = f"--dependency=after:{buffers[0].job_id}"
    return [submit(script, after) for _ in range(number)]


def servers(config: Config, paths: RunPaths) -> list[Job]:
    """The rollout jobs in the queue, oldest first."""
    return jobs_in_queue(paths.root, [job_name(config, "rollout")])


def to_end(jobs: Sequence[Job], number: int) -> list[Job]:
    """The jobs to end so that `number` of them stay: those that wait before those that run, newest first."""
    by_cost = sorted(jobs, key=lambda job: (not job.is_pending, -job.job_id))
    return by_cost[: max(0, len(jobs) - number)]


def remove_servers(config: Config, paths: RunPaths, jobs: Sequence[Job]) -> None:
    """Drains these jobs, and waits until they have left the queue. Raises ArealError if one stays."""
    for job in jobs:
        end_job(job)
    deadline_s = time.monotonic() + config.daemon.drain_timeout_s + _MARGIN_S
    ending = {job.job_id for job in jobs}
    while left := ending & {job.job_id for job in servers(config, paths)}:
        if time.monotonic() > deadline_s:
            raise ArealError(f"jobs {sorted(left)} have not ended: see their output in {paths.logs}")
        time.sleep(_TICK_S)
