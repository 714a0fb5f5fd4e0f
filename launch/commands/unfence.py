"""`areal-like unfence RUN ROLE`: takes a role's name from the process that has it, so that a new one gets it.

A new process gets a name by itself when its predecessor is gone or does not answer. This is for the rest: a
predecessor that cannot be ended and still answers, and a ledger with a number that no process can have. The
ledger keeps an entry in its table `operations`.
"""

from __future__ import annotations

import argparse
import sys

from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.shards import all_shards
from launch.commands.ledger_change import change_ledger
from launch.commands.parser import add_run
from launch.run_directory.rundir import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and ROLE."""
    add_run(parser)
    parser.add_argument("role", metavar="ROLE", help="trainer, or the name of a rollout server")


def main(args: argparse.Namespace) -> int:
    """Takes the name and prints the result."""
    sys.stdout.write(unfence(args.run, args.role) + "\n")
    return 0


def unfence(run: str, role: str) -> str:
    """Takes the name at every shard; returns a message for the user.

    Raises ConfigError without such a run, or if no process of it has had the name.
    """
    paths = RunPaths(find_run(run))
    shards = all_shards(load_config(["--config", str(paths.config)]).buffer.num_shards)
    are_running = [
        change_ledger(paths, shard, verb="unfence", body={"name": role}, option=("--unfence", role))
        for shard in shards
    ]
    if any(are_running):
        return f"{role} is unfenced: its process is refused from now on, start it again"
    return f"{role} is unfenced in the ledger of a job that is not running"
