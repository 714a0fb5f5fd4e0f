"""The arguments CONFIG and key=value of commands that work on the configuration of a job, and RUN of those
that add a daemon to a running one."""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import SCALE, add_config_option, presets
from launch.commands.parser import SETTINGS, Argument, argument, as_typed, run_argument
from launch.run_directory.rundir import find_run, is_over

CONFIG_FILE: Argument = add_config_option
"""`--config FILE`; None by default."""
RUNNING_JOB: tuple[Argument, ...] = (
    argument("--config", metavar="FILE", help="the job's settings, where RUN is not given"),
    run_argument(nargs="?"),
    SETTINGS,
)
"""The running job to which a verb adds a daemon."""


def configuration(*, has_presets: bool = True) -> tuple[Argument, ...]:
    """CONFIG (a file, or with `has_presets` also a preset of configs/scale/), `--config` and settings."""
    known = f" or a preset: {', '.join(presets(SCALE))}" if has_presets else ""
    config = argument("configuration", metavar="CONFIG", nargs="?", help=f"a *.yaml file{known}")
    return config, CONFIG_FILE, SETTINGS


def file_and_settings(args: argparse.Namespace, *first: str) -> list[str]:
    """The arguments for `load_config` of a verb with CONFIG_FILE and SETTINGS. `first`: settings to put
    before the user's."""
    return [*as_typed(args, "config"), *first, *args.settings]


def settings_of(verb: str, args: argparse.Namespace, *, has_presets: bool = True) -> list[str]:
    """The arguments for `load_config`. Raises ConfigError if CONFIG is not a configuration."""
    config = args.configuration
    if config is None:
        return file_and_settings(args)
    if "=" in config:
        return file_and_settings(args, config)
    if args.config is not None:
        raise ConfigError(f"{verb}: {config} and --config {args.config} both name a file: give one of them")
    if has_presets and config in presets(SCALE):
        return [f"{SCALE}={config}", *args.settings]
    if has_presets and not config.endswith((".yaml", ".yml")):
        known = ", ".join(presets(SCALE))
        raise ConfigError(
            f"{verb} {config}: give a configuration file (*.yaml) or one of the presets {known}"
        )
    return ["--config", config, *args.settings]


def running_job(verb: str, args: argparse.Namespace, *first: str) -> tuple[RunPaths | None, list[str]]:
    """The directory of RUN, and the arguments for `load_config`, of a verb with RUNNING_JOB.

    `first`: with RUN, settings to put before the user's. Without RUN, on a machine that cannot see its
    directory, returns None and what the user gave. Raises ConfigError if RUN is no run, is over, or is given
    with --config.
    """
    if not args.run:
        return None, file_and_settings(args)
    if "=" in args.run:
        return None, file_and_settings(args, args.run)
    if args.config is not None:
        raise ConfigError(
            f"{verb}: --config is for the form without RUN: the settings of {args.run} are in its directory"
        )
    paths = RunPaths(find_run(args.run))
    if is_over(paths):
        raise ConfigError(f"{paths.root}: this run is over; start it again with resume=latest")
    own = ["--config", str(paths.config), f"runs_dir={paths.root.resolve().parent}"]
    return paths, [*own, *first, *args.settings]
