"""`areal-like preferences`: trains on comparisons or labels of completions, in a run of its own."""

from __future__ import annotations

import argparse

from launch.commands.configuration import configuration, settings_of
from launch.commands.offline import run_offline
from launch.commands.parser import command
from launch.offline_verbs import PREFERENCES


@command(
    "preferences",
    "Train on comparisons of completions, or on completions with labels (preferences.train=FILE), by DPO, "
    "IPO, KTO, SimPO or ORPO, in the run NAME-preferences. The result is a model for `areal-like run`. "
    "resume=latest continues a run that was stopped.",
    *configuration(has_presets=False),
    examples=[
        "preferences name=mine model=smollm2 preferences.train=pairs.jsonl",
        "preferences job.yaml name=mine preferences.method=kto preferences.train=labels.jsonl",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Trains to the end; returns the exit code. Raises ConfigError before a step was trained."""
    return run_offline(PREFERENCES, settings_of("preferences", args, has_presets=False))
