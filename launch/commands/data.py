"""`areal-like data stats ...`: what is in a file, in the task of a configuration, or in that of a run.

The rows are read by `python -m rollout_server.data_stats`, because tasks belong to the rollout server. For a
run this command also reads the results per prompt from its ledger, and passes them on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import OneValue, load_config
from launch.commands.configuration import CONFIG_FILE
from launch.commands.foreground import run_role
from launch.commands.parser import JSON, argument, as_typed, command, settings_argument
from launch.observation.heard_prompts import read_heard_prompts
from launch.run_directory.rundir import find_run

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


@command(
    "data",
    "Count and check rows: lengths, repeated prompts, held-out prompts that are also in training, labels and "
    "broken rows. The rows come from files (the first is the training split), from the task of a "
    "configuration, or from the task of a run, in which case the solve rates so far are shown too.",
    argument("action", metavar="ACTION", choices=["stats"], help="stats"),
    CONFIG_FILE,
    argument("--rows", metavar="N", action=OneValue, help="read at most N rows of each split"),
    JSON,
    settings_argument(
        metavar="FILE|CONFIG|RUN|key=value",
        help="files (*.jsonl, *.json, *.parquet, hf:...), a configuration (*.yaml), a run, settings",
    ),
    examples=[
        "data stats train.jsonl test.jsonl model.path=Qwen/Qwen3-0.6B",
        "data stats job.yaml",
        "data stats myrun --rows 1000",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Prints the numbers; returns the exit code of the process that reads the rows."""
    words = sort_words(args.settings)
    if args.config is not None:
        words = words._replace(configs=[*words.configs, args.config])
    if len(words.configs) + len(words.runs) + bool(words.files) == 0:
        raise ConfigError("data stats: name files of rows, a configuration (*.yaml) or a run")
    if (words.files and (words.configs or words.runs)) or len(words.configs) > 1 or len(words.runs) > 1:
        raise ConfigError("data stats: give either files of rows, or one configuration, one run or both")
    options = as_typed(args, "json", "rows")
    settings, heard = words.settings, ""
    if words.runs:
        paths = RunPaths(find_run(words.runs[0]))
        settings = ["--config", words.configs[0] if words.configs else str(paths.config), *settings]
        options.append("--heard")
        heard = _heard(paths, settings)
        settings = [*settings, f"name={paths.root.resolve().name}", f"runs_dir={paths.root.resolve().parent}"]
    elif words.configs:
        settings = ["--config", words.configs[0], *settings]
    for file in words.files:
        options += ["--file", file]
    return run_role("rollout_server.data_stats", *options, *settings, input=heard).returncode


class Words(NamedTuple):
    """The words of a command line, by kind."""

    files: list[str]
    configs: list[str]
    runs: list[str]
    settings: list[str]


def sort_words(words: list[str]) -> Words:
    """A setting has a `=`, a configuration ends in .yaml, a data set is a file, a glob or `hf:...`; the rest
    are runs."""
    found = Words([], [], [], [])
    for word in words:
        if "=" in word and not Path(word).exists():
            found.settings.append(word)
        elif word.endswith((".yaml", ".yml")):
            found.configs.append(word)
        elif word.endswith(_DATA_SUFFIXES) or word.startswith("hf:"):
            found.files.append(word)
        else:
            found.runs.append(word)
    return found


def _heard(paths: RunPaths, settings: list[str]) -> str:
    if not paths.ledgers:
        raise ConfigError(
            f"{paths.root} has no ledger: with buffer.durability=none a run records nothing about its prompts"
        )
    buffer = load_config(settings).buffer
    heard = read_heard_prompts(
        paths.ledgers, reward_low=buffer.curriculum_reward_low, reward_high=buffer.curriculum_reward_high
    )
    return json.dumps({"num_drawn": heard.num_drawn, "prompts": heard.rows})
