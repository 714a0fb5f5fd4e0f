"""`areal-like unfence RUN ROLE`: takes a role's name from the process that has it, so that a new one gets it.

A new process gets a name by itself when its predecessor is gone or does not answer. This is for the rest: a
predecessor that cannot be ended and still answers, and a ledger with a number that no process can have. The
ledger keeps an entry in its table `operations`.
"""

from __future__ import annotations

import argparse
import sys

from launch.commands.ledger_change import change_ledger
from launch.commands.parser import Parser
from launch.commands.running_job import add_job, job_of
from launch.observation.reach import RunningJob


def add_arguments(parser: Parser) -> None:
    """The job and ROLE."""
    parser.describe(
        "Take the name ROLE from the process that has it, so that a new one gets it. This is needed only "
        "when a process that cannot be ended still responds under the name.",
        "unfence myrun trainer",
    )
    add_job(parser)
    parser.add_argument("role", metavar="ROLE", help="trainer, or the name of a rollout server")


def main(args: argparse.Namespace) -> int:
    """Takes the name and prints the result."""
    sys.stdout.write(unfence(job_of(args), args.role) + "\n")
    return 0


def unfence(job: RunningJob, role: str) -> str:
    """Takes the name at every shard; returns a message for the user.

    Raises ConfigError if no process of the job has had the name.
    """
    if change_ledger(job, verb="unfence", body={"name": role}, option=("--unfence", role)):
        return f"{role} is unfenced: its process is refused from now on, start it again"
    return f"{role} is unfenced in the ledger of a job that is not running"
