"""The batch scripts of a run that Slurm is to run, and the jobs that begin it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from launch.local_job.child import python_path
from launch.nodes.settings import make_directory
from launch.nodes.start import ROLES
from launch.slurm.scheduler import jobs_in_queue, run_command, submit
from launch.slurm.script import Options, job_name, job_script, scripts_of


def scripts(config: Config, options: Options) -> dict[str, str]:
    """Role -> its batch script."""
    return {
        role: job_script(
            config,
            role,
            options,
            python=sys.executable,
            python_path=python_path(),
            directory=Path.cwd(),
        )
        for role in ROLES
    }


def begin(config: Config, options: Options, *, num_servers: int) -> dict[str, list[int]]:
    """Writes the run's directory and submits its jobs; returns their numbers by role.

    If one is refused, those before it are cancelled. Raises ConfigError, also if jobs of the run are in the
    queue or a launcher runs it.
    """
    paths = RunPaths.of(config)
    if jobs := jobs_in_queue(paths.root, [job_name(config, role) for role in ROLES]):
        numbers = ", ".join(str(job.job_id) for job in jobs)
        raise ConfigError(
            f"{paths.root} has jobs already ({numbers}): `areal-like scale` changes the number of its "
            f"rollout servers, `scancel {numbers.replace(',', '')}` drains the run"
        )
    make_directory(config, folders=[scripts_of(paths)])
    _write(paths, scripts(config, options))
    numbers_by_role: dict[str, list[int]] = {}
    try:
        buffer = submit(scripts_of(paths) / "buffer.sh")
        numbers_by_role["buffer"] = [buffer]
        # A job that began before the buffer's would hold its nodes for nothing.
        after = f"--dependency=after:{buffer}"
        numbers_by_role["trainer"] = [submit(scripts_of(paths) / "trainer.sh", after)]
        numbers_by_role["rollout"] = []
        for _ in range(num_servers):
            numbers_by_role["rollout"].append(submit(scripts_of(paths) / "rollout.sh", after))
    except ArealError:
        submitted = [str(number) for each in numbers_by_role.values() for number in each]
        if submitted:
            run_command("scancel", "--quiet", *submitted)
        raise
    return numbers_by_role


def _write(paths: RunPaths, texts: Mapping[str, str]) -> None:
    try:
        for role, text in texts.items():
            (scripts_of(paths) / f"{role}.sh").write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {paths.root}: {error.strerror}") from None
