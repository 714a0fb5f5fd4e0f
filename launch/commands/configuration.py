"""The arguments CONFIG and key=value of commands that work on the configuration of a job."""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import SCALE, add_config_option, presets
from launch.commands.parser import SETTINGS, Argument, argument, as_typed

CONFIG_FILE: Argument = add_config_option
"""`--config FILE`; None by default."""


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
