"""`areal-like plan CONFIG`: tells whether a job fits on its GPUs, the expected speed, and what to change.

The work is done by `python -m trainer.planning`: the launcher imports no torch.
"""

from __future__ import annotations

import argparse

from areal_like.runtime.command_line import OneValue
from launch.commands.configuration import configuration, settings_of
from launch.commands.foreground import run_role
from launch.commands.parser import JSON, argument, as_typed, command, flag


@command(
    "plan",
    "Tell whether a job fits on its GPUs, by tracing its step without a GPU, and what speed to expect. Exit "
    "code 2 if it does not fit.",
    *configuration(),
    argument(
        "--gpus",
        metavar="N+MxGPU",
        action=OneValue,
        help="N GPUs of engines and M of the trainer, such as 4+4xH100; 1xH100: both share it",
    ),
    argument("--host-memory", metavar="GIB", action=OneValue, help="memory of a host, if not 1.9 TB (H100)"),
    argument("--prompt-tokens", metavar="N", action=OneValue, help="mean length of a prompt"),
    argument("--response-tokens", metavar="N", action=OneValue, help="mean length of a response"),
    JSON,
    flag("--explain", "print every formula and assumption"),
    examples=[
        "plan 8xh100_8b",
        "plan job.yaml --gpus 4+4xH100",
        "plan job.yaml --gpus 1xH100 --response-tokens 2000 --explain",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Runs the planner; returns its exit code: 0 fits, 2 does not, or a mistake."""
    options = as_typed(args, "gpus", "host_memory", "prompt_tokens", "response_tokens", "json", "explain")
    return run_role("trainer.planning", *options, *settings_of("plan", args)).returncode
