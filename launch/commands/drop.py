"""`areal-like drop RUN TICKET ...`: permanently removes harmful tickets from the steps that contain them.

Either all of the tickets are dropped or none. With several shards, each gets the whole list and drops its own
tickets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launch.commands.ledger_change import change_ledger
from launch.commands.parser import Parser
from launch.commands.running_job import add_job, job_of
from launch.observation.reach import RunningJob


def add_arguments(parser: Parser) -> None:
    """The job and the tickets' numbers."""
    parser.describe(
        "Permanently remove harmful tickets from the step in which they are recorded; other tickets take "
        "their places. The step must not be trained yet. All of the tickets are dropped, or none.",
        "drop myrun 1718 1723",
    )
    add_job(parser)
    parser.add_argument("tickets", metavar="TICKET", nargs="+", type=_ticket_id, help="its number")


def _ticket_id(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a ticket number")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Drops the tickets and prints the result."""
    sys.stdout.write(drop_tickets(job_of(args), args.tickets) + "\n")
    return 0


def drop_tickets(job: RunningJob, ticket_ids: Sequence[int]) -> str:
    """Drops the tickets; returns a message for the user. Raises ConfigError with the reason of a refusal."""
    tickets = ", ".join(map(str, ticket_ids))
    option = ("--drop", ",".join(map(str, ticket_ids)))
    if change_ledger(job, verb="drop", body={"tickets": list(ticket_ids)}, option=option):
        dropped = f"the running buffer has dropped tickets {tickets}"
        return f"{dropped}; the trainer restarts from its newest checkpoint"
    dropped = f"dropped tickets {tickets} from the ledger of a job that is not running"
    return f"{dropped}; continue the job with resume=latest"
