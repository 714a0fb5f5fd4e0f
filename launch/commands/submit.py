"""`areal-like submit`: starts a run on a cluster: a buffer, a trainer, rollout servers, and the score servers
and routers that its settings ask for.

`--slurm`: as jobs of Slurm that share the run's directory, with their batch scripts in `slurm/`. This command
ends when they are submitted: each job restarts itself, and all end with the run.

`--ray`: as actors of a Ray cluster that each own a process. This command keeps running and restarts what
fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

from areal_like.config import Config
from areal_like.config.arguments import add_arguments
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import keep_files_private
from launch.commands.configuration import CONFIG_FILE, file_and_settings
from launch.commands.foreground import StopSignals
from launch.commands.parser import SETTINGS, argument, command, flag, group
from launch.nodes.settings import ClusterOptions, counts_of, settings_for_nodes
from launch.nodes.start import read_run
from launch.ray.cluster import RayOptions, import_ray
from launch.ray.driver import run_on_ray
from launch.run_directory.open_run import is_begun
from launch.run_directory.rundir import is_trained
from launch.slurm.jobs import add_servers, begin
from launch.slurm.options import SlurmOptions, kept_text, read_kept
from launch.slurm.scheduler import kill_wait_s
from launch.slurm.script import job_scripts

_COMMON = [field.name for field in dataclasses.fields(ClusterOptions)]


@command(
    "submit",
    "Start a run, or continue it, on a cluster: a buffer, a trainer on N nodes, and rollout servers. With "
    "--slurm they are jobs that restart themselves, and this command returns at once; with --ray they are "
    "actors that each own a process, and this command keeps running until the run has ended.",
    flag("--slurm", "as jobs of Slurm"),
    flag("--ray", "as actors of a Ray cluster"),
    lambda parser: add_arguments(parser, ClusterOptions),
    CONFIG_FILE,
    group(
        "Slurm",
        argument("--join", metavar="RUN", default="", help="only add rollout jobs to this run"),
        lambda parser: add_arguments(parser, SlurmOptions, leaves_out=_COMMON),
        flag("--dry-run", "print the batch scripts, submit nothing"),
    ),
    group("Ray", lambda parser: add_arguments(parser, RayOptions, leaves_out=_COMMON)),
    SETTINGS,
    examples=[
        "submit --slurm --config job.yaml name=myrun --rollout-jobs 4 --time 24:00:00",
        "submit --slurm --join myrun --rollout-jobs 2",
        "submit --ray --trainer-nodes 2 --config job.yaml name=myrun",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when the jobs are in the queue or the run is finished already; on Ray the run's exit code."""
    if args.slurm == args.ray:
        raise ConfigError("submit: give --slurm or --ray, the scheduler of the cluster")
    keep_files_private()
    if args.ray:
        return _ray(args)
    return _join(args) if args.join else _slurm(args)


def _slurm(args: argparse.Namespace) -> int:
    """Submits the jobs of a run, or prints their scripts."""
    paths = RunPaths.of(load_config(file_and_settings(args)))
    kept = read_kept(paths) if is_begun(paths) else {}
    if any(setting.startswith("rollout.num_servers=") for setting in args.settings):
        kept.pop("rollout_jobs", None)
    options = SlurmOptions.of(args, kept)
    config = settings_for_nodes(file_and_settings(args), trainer_nodes=options.trainer_nodes)
    number = options.num_servers(default=config.rollout.num_servers)
    scripts = job_scripts(config, options)
    if text := kept_text(args, kept):
        sys.stdout.write(f"options of the last submission: {text}\n")
    if args.dry_run:
        for role, text in scripts.items():
            sys.stdout.write(f"##### {paths.root}/slurm/{role}.sh\n{text}\n")
        counts = counts_of(config, num_servers=number).items()
        listed = ", ".join(f"{number} {role}" for role, number in counts)
        sys.stdout.write(f"##### jobs: {listed}; nothing was submitted\n")
        return 0
    if _is_finished(config):
        return 0
    _warn_of_kill_wait(config.daemon.drain_timeout_s)
    for role, numbers in begin(config, scripts, num_servers=number).items():
        sys.stdout.write(f"{role}: job {', '.join(map(str, numbers))}\n")
    options.keep(paths)
    sys.stdout.write(
        f"the run is in {paths.root}; `areal-like status {paths.root}` shows it, `areal-like scale "
        f"{paths.root} N` changes the number of rollout servers\n"
    )
    return 0


def _join(args: argparse.Namespace) -> int:
    """Adds rollout jobs to a run on Slurm."""
    if args.settings or args.config is not None:
        raise ConfigError("submit --join: the run has its settings; leave others out")
    paths, config = read_run(args.join)
    numbers = add_servers(config, paths, SlurmOptions.of(args).num_servers(default=1))
    sys.stdout.write(f"rollout: job {', '.join(map(str, numbers))}\n")
    return 0


def _ray(args: argparse.Namespace) -> int:
    """Runs the run on Ray to its end; returns its exit code."""
    of_slurm = ["join", "dry_run", *(field.name for field in dataclasses.fields(SlurmOptions))]
    given = [name for name in of_slurm if name not in _COMMON and getattr(args, name)]
    if wrong := [f"--{name.replace('_', '-')}" for name in given]:
        raise ConfigError(f"submit --ray: {', '.join(wrong)} is an option of Slurm; leave it out")
    options = RayOptions.of(args)
    import_ray()
    config = settings_for_nodes(file_and_settings(args), trainer_nodes=options.trainer_nodes)
    if _is_finished(config):
        return 0

    def listen() -> Callable[[], bool]:
        signals = StopSignals()
        return lambda: signals.count > 0

    number = options.num_servers(default=config.rollout.num_servers)
    return run_on_ray(config, options, num_servers=number, listen=listen)


def _is_finished(config: Config) -> bool:
    """True if the run has no step left to train; tells the user so."""
    paths = RunPaths.of(config)
    is_finished = is_trained(paths, num_steps=config.trainer.num_steps)
    if is_finished:
        sys.stdout.write(f"the run in {paths.root} is finished; trainer.num_steps=MORE continues it\n")
    return is_finished


def _warn_of_kill_wait(drain_timeout_s: float) -> None:
    """Warns if Slurm may kill daemons in the middle of a drain, KillWait seconds after SIGTERM."""
    limit_s = kill_wait_s()
    if limit_s is not None and limit_s < drain_timeout_s:
        sys.stderr.write(
            f"areal-like: Slurm's KillWait is {limit_s} s and daemon.drain_timeout_s={drain_timeout_s:g}: "
            "after `scancel` or a preemption the daemons may be killed before they have drained; ask for a "
            f"larger KillWait, or set daemon.drain_timeout_s={max(1, limit_s - 5)}\n"
        )
