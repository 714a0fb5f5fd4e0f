"""`areal-like completion SHELL`: prints the script with which a shell completes command lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from areal_like.errors import ConfigError
from launch.commands.parser import Parser
from launch.completion import SHELLS, candidates, script


def add_arguments(parser: Parser) -> None:
    """SHELL; the scripts themselves call with the words typed so far."""
    parser.describe(
        "Print the script with which a shell completes verbs, options, runs, servers and settings. For bash, "
        "put `source <(areal-like completion bash)` into ~/.bashrc.",
        "completion bash",
    )
    parser.add_argument("shell", metavar="SHELL", nargs="?", choices=SHELLS, help=", ".join(SHELLS))
    parser.add_argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Prints the script, or the words that may follow."""
    if args.words is not None:
        sys.stdout.writelines(f"{word}\n" for word in candidates(args.words, directory=Path()))
    elif args.shell is None:
        raise ConfigError(f"completion: name a shell ({', '.join(SHELLS)})")
    else:
        sys.stdout.write(script(args.shell))
    return 0
