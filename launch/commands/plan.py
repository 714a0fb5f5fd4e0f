"""`areal-like plan CONFIG`: whether a job fits on its GPUs, what it is expected to do, what to change.

The work is done by `python -m trainer.planning`: the launcher imports no torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import OneValue, presets
from launch.commands.parser import add_settings
from launch.local_job.child import python_path

_PRESETS = "scale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, options and settings."""
    parser.add_argument("--gpus", metavar="N+MxGPU", action=OneValue, missing="give the GPUs, as 4+4xH100")
    for name in ("--prompt-tokens", "--response-tokens"):
        parser.add_argument(name, metavar="N", action=OneValue, missing="give a mean number of tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--explain", action="store_true", help="print every formula and assumption")
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the planner; returns its exit code: 0 fits, 2 does not, or a mistake."""
    words = [word for name in ("gpus", "prompt_tokens", "response_tokens") for word in _option(args, name)]
    words += [f"--{name}" for name in ("json", "explain") if getattr(args, name)]
    command = [sys.executable, "-m", "trainer.planning", *words, *_configuration(args.settings)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(command, env=environment, check=False).returncode


def _option(args: argparse.Namespace, name: str) -> list[str]:
    value = getattr(args, name)
    return [] if value is None else [f"--{name.replace('_', '-')}", value]


def _configuration(words: list[str]) -> list[str]:
    """CONFIG (the first word, unless it is a setting) as `--config FILE` or `scale=PRESET`, then settings."""
    if not words or "=" in words[0]:
        return words
    config, *settings = words
    if config in presets(_PRESETS):
        return [f"{_PRESETS}={config}", *settings]
    if not config.endswith((".yaml", ".yml")):
        known = ", ".join(presets(_PRESETS))
        raise ConfigError(f"plan {config}: give a configuration file (*.yaml) or one of the presets {known}")
    return ["--config", config, *settings]
