"""`areal-like sft`: supervised training in a run directory of its own, before `areal-like run`."""

from __future__ import annotations

import argparse

from launch.commands.configuration import configuration, settings_of
from launch.commands.offline import run_offline
from launch.commands.parser import command
from launch.offline_verbs import SFT


@command(
    "sft",
    "Train on conversations, or on prompts with completions (sft.train=FILE), in the run NAME-sft. The "
    "result is a model for `areal-like run`. resume=latest continues a run that was stopped.",
    *configuration(has_presets=False),
    examples=["sft name=mine model=smollm2 sft.train=train.jsonl", "sft job.yaml name=mine resume=latest"],
)
def main(args: argparse.Namespace) -> int:
    """Trains to the end; returns the exit code. Raises ConfigError before a step was trained."""
    return run_offline(SFT, settings_of("sft", args, has_presets=False))
