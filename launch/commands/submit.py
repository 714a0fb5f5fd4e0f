"""`areal-like submit`: starts a run on a cluster: a buffer, a trainer, and rollout servers.

`--slurm`: as jobs of Slurm, which share the run's directory, where their batch scripts are (`slurm/`). After
this command nothing of it stays: each job restarts itself, and all end with the run.

`--ray`: as actors of a Ray cluster that own a process each. This command stays and starts again what fails.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import keep_files_private
from launch.commands.configuration import CONFIG_FILE, file_and_settings
from launch.commands.foreground import StopSignals
from launch.commands.parser import SETTINGS, argument, command, flag, group
from launch.nodes.settings import is_finished, settings_for_nodes
from launch.nodes.start import ROLES
from launch.ray.cluster import STRATEGIES, RayOptions, import_ray
from launch.ray.driver import run_on_ray
from launch.run_directory.open_run import is_begun
from launch.run_directory.rundir import find_run
from launch.slurm.kept_options import complete, keep, read_kept
from launch.slurm.pool import add_servers
from launch.slurm.prepare import begin, scripts
from launch.slurm.scheduler import kill_wait_s
from launch.slurm.script import Options


@command(
    "submit",
    "Start a run, or continue it, on a cluster: a buffer, a trainer on N nodes, and rollout servers. With "
    "--slurm they are jobs that restart themselves, and this command ends at once; with --ray they are "
    "actors that own a process each, and this command stays until the run has ended.",
    flag("--slurm", "as jobs of Slurm"),
    flag("--ray", "as actors of a Ray cluster"),
    argument("--rollout-jobs", metavar="N", type=int, help="default: rollout.num_servers"),
    argument("--trainer-nodes", metavar="N", type=int, help="default: 1"),
    argument("--interface", metavar="NAME", help="network interface that the daemons listen on"),
    argument("--max-failures", metavar="N", type=int, help="in a row; default: 5"),
    CONFIG_FILE,
    group(
        "Slurm",
        argument("--join", metavar="RUN", default="", help="only add rollout jobs to this run"),
        argument("--partition", metavar="NAME", help="default: the cluster's"),
        argument("--time", metavar="LIMIT", help="time limit of each job, as of sbatch"),
        argument("--sbatch-args", metavar="OPTIONS", help="for sbatch, of all jobs; one quoted word"),
        *(
            argument(f"--{role}-args", metavar="OPTIONS", help=f"for sbatch, of the {role} jobs")
            for role in ROLES
        ),
        flag("--dry-run", "print the batch scripts, submit nothing"),
    ),
    group(
        "Ray",
        argument("--address", metavar="ADDRESS", default="auto", help="of the cluster; default: auto"),
        argument(
            "--strategy",
            metavar="NAME",
            choices=STRATEGIES,
            default=STRATEGIES[0],
            help=f"placement: {', '.join(STRATEGIES)}",
        ),
        argument("--cpus", metavar="N", type=float, default=1.0, help="of each actor; default: 1"),
        argument("--wait", metavar="S", type=float, default=300.0, help="longest, for resources (300)"),
    ),
    SETTINGS,
    examples=[
        "submit --slurm --config job.yaml name=myrun --rollout-jobs 4 --time 24:00:00",
        "submit --slurm --join myrun --rollout-jobs 2",
        "submit --ray --trainer-nodes 2 --config job.yaml name=myrun",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when the jobs are in the queue, or when the run is finished already."""
    if args.slurm == args.ray:
        raise ConfigError("submit: give --slurm or --ray, the scheduler of the cluster")
    keep_files_private()
    if args.ray:
        return _ray(args)
    if args.join:
        return _join(args)
    settings = file_and_settings(args)
    paths = RunPaths.of(load_config(settings))
    kept = _kept(args, paths)
    options = _options(args)
    config = settings_for_nodes(settings, trainer_nodes=args.trainer_nodes)
    number = _number(args.rollout_jobs, default=config.rollout.num_servers)
    if kept:
        sys.stdout.write(f"options of the last submission: {kept}\n")
    if args.dry_run:
        for role, text in scripts(config, options).items():
            sys.stdout.write(f"##### {paths.root}/slurm/{role}.sh\n{text}\n")
        sys.stdout.write(f"##### 1 buffer, 1 trainer and {number} rollout jobs; nothing was submitted\n")
        return 0
    if is_finished(config):
        sys.stdout.write(f"the run in {paths.root} is finished; trainer.num_steps=MORE continues it\n")
        return 0
    _warn_of_kill_wait(config.daemon.drain_timeout_s)
    for role, numbers in begin(config, options, num_servers=number).items():
        sys.stdout.write(f"{role}: job {', '.join(map(str, numbers))}\n")
    keep(paths, args)
    sys.stdout.write(
        f"the run is in {paths.root}; `areal-like status {paths.root}` shows it, `areal-like scale "
        f"{paths.root} N` changes the number of rollout servers\n"
    )
    return 0


def _ray(args: argparse.Namespace) -> int:
    """Runs the run on Ray to its end; returns its exit code."""
    of_slurm = ("join", "partition", "time", "dry_run", "sbatch_args", *(f"{role}_args" for role in ROLES))
    if wrong := [f"--{name.replace('_', '-')}" for name in of_slurm if getattr(args, name)]:
        raise ConfigError(f"submit --ray: {', '.join(wrong)} is an option of Slurm; leave it out")
    complete(args, {})
    if not (args.cpus >= 0 and args.wait > 0 and args.max_failures >= 0):
        raise ConfigError("submit --ray: use --cpus and --max-failures of at least 0, and --wait above 0")
    options = RayOptions(
        address=args.address,
        trainer_nodes=args.trainer_nodes,
        cpus=args.cpus,
        strategy=args.strategy,
        interface=args.interface,
        max_failures=args.max_failures,
        wait_s=args.wait,
    )
    import_ray()
    config = settings_for_nodes(file_and_settings(args), trainer_nodes=args.trainer_nodes)
    paths = RunPaths.of(config)
    if is_finished(config):
        sys.stdout.write(f"the run in {paths.root} is finished; trainer.num_steps=MORE continues it\n")
        return 0
    number = _number(args.rollout_jobs, default=config.rollout.num_servers)

    def listen() -> Callable[[], bool]:
        signals = StopSignals()
        return lambda: signals.count > 0

    return run_on_ray(config, options, num_servers=number, listen=listen)


def _kept(args: argparse.Namespace, paths: RunPaths) -> str:
    """Fills in the options that were not given: those of the last submission, if the run has begun."""
    kept = read_kept(paths) if is_begun(paths) else {}
    if any(setting.startswith("rollout.num_servers=") for setting in args.settings):
        kept.pop("rollout_jobs", None)
    return complete(args, kept)


def _join(args: argparse.Namespace) -> int:
    if args.settings or args.config is not None:
        raise ConfigError("submit --join: the run has its settings; leave others out")
    paths = RunPaths(find_run(args.join).resolve())
    config = load_config(["--config", str(paths.config)])
    numbers = add_servers(config, paths, _number(args.rollout_jobs, default=1))
    sys.stdout.write(f"rollout: job {', '.join(map(str, numbers))}\n")
    return 0


def _number(given: int | None, *, default: int) -> int:
    number = default if given is None else given
    if not 1 <= number <= 1000:
        raise ConfigError(f"--rollout-jobs {number}: use 1 to 1000")
    return number


def _options(args: argparse.Namespace) -> Options:
    if args.max_failures < 0:
        raise ConfigError(f"--max-failures {args.max_failures}: use at least 0")
    return Options(
        trainer_nodes=args.trainer_nodes,
        partition=args.partition,
        time=args.time,
        interface=args.interface,
        max_failures=args.max_failures,
        arguments=_words(args.sbatch_args, "--sbatch-args"),
        role_arguments={role: _words(getattr(args, f"{role}_args"), f"--{role}-args") for role in ROLES},
    )


def _words(text: str, option: str) -> tuple[str, ...]:
    """The options in one quoted word, each as it stands on a line of #SBATCH."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{option}={text}: {error}") from None
    wrong = next((word for word in words if not word.startswith("-") or "\n" in word or '"' in word), "")
    if wrong:
        raise ConfigError(f"{option}: {wrong!r} is not an option of the form --name=value")
    return tuple(words)


def _warn_of_kill_wait(drain_timeout_s: float) -> None:
    """Slurm kills what has not ended KillWait seconds after SIGTERM, in the middle of a drain if need be."""
    limit_s = kill_wait_s()
    if limit_s is not None and limit_s < drain_timeout_s:
        sys.stderr.write(
            f"areal-like: Slurm's KillWait is {limit_s} s and daemon.drain_timeout_s={drain_timeout_s:g}: "
            "after `scancel` or a preemption the daemons may be killed before they have drained; ask for a "
            f"larger KillWait, or set daemon.drain_timeout_s={max(1, limit_s - 5)}\n"
        )
