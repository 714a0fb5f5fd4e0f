"""`areal-like reward-model`: trains a reward model on comparisons of completions, in a run of its own."""

from __future__ import annotations

import argparse

from launch.commands.configuration import configuration, settings_of
from launch.commands.offline import run_offline
from launch.commands.parser import command
from launch.offline_verbs import REWARD_MODEL


@command(
    "reward-model",
    "Train a reward model on comparisons of completions (reward_model.train=FILE), in the run "
    "NAME-reward-model. The result is a directory for AutoModelForSequenceClassification. resume=latest "
    "continues a run that was stopped.",
    *configuration(has_presets=False),
    examples=[
        "reward-model name=mine model=smollm2 reward_model.train=pairs.jsonl",
        "reward-model job.yaml name=mine resume=latest",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Trains to the end; returns the exit code. Raises ConfigError before a step was trained."""
    return run_offline(REWARD_MODEL, settings_of("reward-model", args, has_presets=False))
