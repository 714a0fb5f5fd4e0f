"""`areal-like cordon RUN SERVER`: grants a rollout server no new leases."""

from __future__ import annotations

import argparse
import sys

from launch.commands.running_job import add_job, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job and SERVER."""
    add_job(parser)
    parser.add_argument("server", metavar="SERVER", help="its name, e.g. rollout-1")


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard of the buffer has it on disk."""
    answers = job_of(args).post_all("cordon", {"server": args.server})
    has_changed = any(answer.get("changed") for answer in answers)
    sys.stdout.write(f"{args.server} gets no new leases{'' if has_changed else ', as before'}\n")
    return 0
