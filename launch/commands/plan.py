"""`areal-like plan CONFIG`: whether a job fits on its GPUs, what it is expected to do, what to change.

The work is done by `python -m trainer.planning`: the launcher imports no torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from areal_like.runtime.command_line import OneValue
from launch.commands.configuration import add_configuration, settings_of
from launch.commands.parser import Parser
from launch.local_job.child import python_path


def add_arguments(parser: Parser) -> None:
    """CONFIG, options and settings."""
    parser.describe(
        "Tell whether a job fits on its GPUs, by tracing its step without a GPU, and what speed to expect. "
        "Exit code 2 if it does not fit.",
        "plan 8xh100_8b",
        "plan job.yaml --gpus 4+4xH100",
        "plan job.yaml --gpus 1xH100 --response-tokens 2000 --explain",
    )
    add_configuration(parser)
    parser.add_argument(
        "--gpus",
        metavar="N+MxGPU",
        action=OneValue,
        help="N GPUs of engines and M of the trainer, as 4+4xH100; 1xH100: both share it",
    )
    for name in ("prompt", "response"):
        parser.add_argument(
            f"--{name}-tokens",
            metavar="N",
            action=OneValue,
            help=f"mean length of a {name}",
        )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--explain", action="store_true", help="print every formula and assumption")


def main(args: argparse.Namespace) -> int:
    """Runs the planner; returns its exit code: 0 fits, 2 does not, or a mistake."""
    words = [word for name in ("gpus", "prompt_tokens", "response_tokens") for word in _option(args, name)]
    words += [f"--{name}" for name in ("json", "explain") if getattr(args, name)]
    command = [sys.executable, "-m", "trainer.planning", *words, *settings_of("plan", args)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(command, env=environment, check=False).returncode


def _option(args: argparse.Namespace, name: str) -> list[str]:
    value = getattr(args, name)
    return [] if value is None else [f"--{name.replace('_', '-')}", value]
