"""The settings and batch scripts of a run that Slurm is to run, and the jobs that begin it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config, save_config
from areal_like.security.keys import KeyDirectory
from launch.local_job.child import python_path
from launch.run_directory.open_run import is_begun, with_own_settings
from launch.run_directory.rundir import is_trained, release_for_others
from launch.slurm.scheduler import jobs_in_queue, run_command, submit
from launch.slurm.script import DRAINED, ROLES, Options, job_name, job_script, scripts_of


def settings_for_slurm(argv: Sequence[str], options: Options) -> Config:
    """The configuration of a run, new or begun, with what its roles need as jobs of Slurm.

    Raises ConfigError for settings with which the roles would not find or admit each other.
    """
    config = load_config(argv)
    paths = RunPaths.of(config)
    if is_begun(paths) and "--config" not in argv:
        config = with_own_settings(config, argv, own=paths.config)
    config = dataclasses.replace(
        config,
        runs_dir=str(paths.root.parent),
        resume="auto",
        buffer=dataclasses.replace(config.buffer, discovery="run_dir", ports=()),
        daemon=dataclasses.replace(config.daemon, exit_code_on_drain=DRAINED),
        security=dataclasses.replace(config.security, keys=_absolute(config.security.keys)),
    )
    _check(config, options)
    return config


def _check(config: Config, options: Options) -> None:
    nodes, world_size = options.trainer_nodes, config.trainer.world_size
    if nodes < 1 or world_size % nodes:
        raise ConfigError(
            f"--trainer-nodes {nodes}: trainer.world_size={world_size} ranks cannot be divided evenly over "
            "them: change one of the two"
        )
    if config.trainer.num_hosts != 1:
        raise ConfigError("submit: leave trainer.num_hosts out, --trainer-nodes N sets it")
    if config.buffer.num_shards != 1:
        raise ConfigError(
            f"submit: buffer.num_shards={config.buffer.num_shards}: a run on Slurm has one, set it to 1"
        )
    if config.security.keys:
        KeyDirectory(Path(config.security.keys))
    elif not config.security.insecure:
        raise ConfigError(
            "submit: the roles speak over the network, so they need keys: make them with `areal-like keys "
            "init DIR`, in a directory that the nodes see and only you can read, and give security.keys=DIR"
        )


def _absolute(directory: str) -> str:
    return str(Path(directory).expanduser().resolve()) if directory else ""


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


def is_finished(config: Config) -> bool:
    """True if the run has no step left to train."""
    return is_trained(RunPaths.of(config), num_steps=config.trainer.num_steps)


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
    release_for_others(paths)
    for stale in paths.endpoints.glob("*.json"):
        stale.unlink()
    _write(paths, config, scripts(config, options))
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


def _write(paths: RunPaths, config: Config, texts: Mapping[str, str]) -> None:
    try:
        for folder in (paths.root, paths.logs, paths.endpoints, scripts_of(paths)):
            folder.mkdir(parents=True, exist_ok=True)
        partial = paths.config.with_name(f".{paths.config.name}.{os.getpid()}")
        save_config(config, partial)
        partial.replace(paths.config)
        for role, text in texts.items():
            (scripts_of(paths) / f"{role}.sh").write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {paths.root}: {error.strerror}") from None
