"""`areal-like merge ADAPTER --into DIRECTORY`: a base model and its LoRA adapter as one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import ADAPTER_CONFIG
from launch.commands.parser import argument, command
from launch.run_directory.rundir import newest_checkpoint


@command(
    "merge",
    "Write the model that a LoRA adapter makes of its base: the weights are added in float32 and then "
    "rounded. ADAPTER is a PEFT directory, a checkpoint of a run with model.lora, such a run (its newest "
    "checkpoint), or an adapter of the hub.",
    argument("adapter", metavar="ADAPTER", help="the adapter, or a run"),
    argument("--into", metavar="DIRECTORY", required=True, help="the new directory"),
    argument(
        "--base",
        metavar="MODEL",
        default="",
        help="directory or hub name of the base; by default the one that the adapter names",
    ),
    argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="",
        help="dtype of the merged weights; by default the base's",
    ),
    examples=[
        "merge runs/mine/checkpoints/step_000500 --into merged",
        "merge mine --into merged --dtype bfloat16",
        "merge adapter --base Qwen/Qwen3-0.6B --into merged",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Writes the directory and prints its name."""
    adapter = find_adapter(args.adapter)
    from trainer.merge import merge  # imports torch and peft

    into = Path(args.into).expanduser()
    base = merge(adapter, into, base=args.base, dtype=args.dtype)
    print(f"{into}: {base} with the adapter {adapter}")
    return 0


def find_adapter(word: str) -> str:
    """The PEFT directory or hub name that a word of the command line names. Raises ConfigError."""
    folder = Path(word).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return str(folder)
    if (newest := newest_checkpoint(word, verb="merge")) is not None:
        if not (newest / ADAPTER_CONFIG).is_file():
            raise ConfigError(f"merge {word}: {newest} has all weights of a model: there is nothing to merge")
        return str(newest)
    if (folder / "config.json").is_file():
        raise ConfigError(f"merge {word}: it has no {ADAPTER_CONFIG}: it is a whole model already")
    if word.count("/") != 1 or folder.exists():
        raise ConfigError(
            f"merge {word}: give a PEFT directory ({ADAPTER_CONFIG}), a run or its checkpoint, or an "
            "owner/name"
        )
    return word
