"""The arguments CONFIG and key=value of commands that work on the configuration of a job."""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import SCALE, add_config_option, presets
from launch.commands.parser import Parser, add_settings


def add_configuration(parser: Parser, *, has_presets: bool = True) -> None:
    """CONFIG (a file, or with `has_presets` also a preset of configs/scale/), `--config` and settings."""
    known = f" or a preset: {', '.join(presets(SCALE))}" if has_presets else ""
    parser.add_argument("configuration", metavar="CONFIG", nargs="?", help=f"a *.yaml file{known}")
    add_config_option(parser)
    add_settings(parser)


def settings_of(verb: str, args: argparse.Namespace, *, has_presets: bool = True) -> list[str]:
    """The arguments for `load_config`. Raises ConfigError if CONFIG is not a configuration."""
    config, settings = args.configuration, list(args.settings)
    if config is not None and "=" in config:
        config, settings = None, [config, *settings]
    if config is None:
        return [*([] if args.config is None else ["--config", args.config]), *settings]
    if args.config is not None:
        raise ConfigError(f"{verb}: {config} and --config {args.config} both name a file: give one of them")
    if has_presets and config in presets(SCALE):
        return [f"{SCALE}={config}", *settings]
    if has_presets and not config.endswith((".yaml", ".yml")):
        known = ", ".join(presets(SCALE))
        raise ConfigError(
            f"{verb} {config}: give a configuration file (*.yaml) or one of the presets {known}"
        )
    return ["--config", config, *settings]
