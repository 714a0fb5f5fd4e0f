"""`areal-like drop RUN TICKET ...`: permanently removes harmful tickets from the steps that contain them.

Either all of the tickets are dropped or none. With several shards, each gets the whole list and drops its own
tickets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.shards import all_shards
from launch.commands.ledger_change import change_ledger
from launch.commands.parser import add_run
from launch.run_directory.rundir import find_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the tickets' numbers."""
    add_run(parser)
    parser.add_argument("tickets", metavar="TICKET", nargs="+", type=_ticket_id, help="its number")


def _ticket_id(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a ticket number")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Drops the tickets and prints the result."""
    sys.stdout.write(drop_tickets(find_run(args.run), args.tickets) + "\n")
    return 0


def drop_tickets(root: Path, ticket_ids: Sequence[int]) -> str:
    """Drops the tickets; returns a message for the user. Raises ConfigError with the reason of a refusal."""
    paths = RunPaths(root)
    shards = all_shards(load_config(["--config", str(paths.config)]).buffer.num_shards)
    tickets = ", ".join(map(str, ticket_ids))
    ids = ",".join(map(str, ticket_ids))
    body = {"tickets": list(ticket_ids)}
    are_running = [
        change_ledger(paths, shard, verb="drop", body=body, option=("--drop", ids)) for shard in shards
    ]
    if any(are_running):
        dropped = f"the running buffer has dropped tickets {tickets}"
        return f"{dropped}; the trainer restarts from its newest checkpoint"
    dropped = f"dropped tickets {tickets} from the ledger of a job that is not running"
    return f"{dropped}; continue the job with resume=latest"
